"""fpxbench: is low-bit floating-point matmul still right, and still fast?"""

__version__ = "0.1.0"
