"""Is a quantized weight right, and how fast, inside a real model?"""
