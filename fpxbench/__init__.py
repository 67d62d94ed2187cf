"""fpxbench: is low-bit floating-point matmul still right, and still fast?"""

from fpxbench import _moved

__version__ = "0.1.0"

_moved.install()
