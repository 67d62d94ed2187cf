"""The chapter on builds over time."""
