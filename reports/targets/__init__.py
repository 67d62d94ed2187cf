"""The chapter on GPU targets: which architecture compiles what, since which Triton."""
