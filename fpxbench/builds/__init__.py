"""Which PyTorch is installed, which builds exist, and in which environment does each run?"""
