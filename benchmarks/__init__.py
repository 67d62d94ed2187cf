"""What ``asv run`` runs. Imports no PyTorch: the sweep does, in processes of its own."""
