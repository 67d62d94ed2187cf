"""Other libraries' kernels, one file each, checked like everything else: ``pip install 'fpxbench[peers]'``."""
