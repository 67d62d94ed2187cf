"""Do the casts of PyTorch and Triton conform to the formats' definitions, for every input?"""
