"""Which PyTorch builds are there, and how are they installed?"""
