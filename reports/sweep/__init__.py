"""The chapter on one build on one machine."""
