"""The chapter on PyTorch's casts."""
