"""Which wheels of PyTorch do the package indexes list?"""
