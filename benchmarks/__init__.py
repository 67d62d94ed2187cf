"""What does asv run?

Imports no PyTorch: the sweep does, in processes of its own.
"""
