"""Which GPU supports what, since which Triton?"""
