"""Do PyTorch's and Triton's casts conform to the formats?"""
