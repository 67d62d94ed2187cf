"""How do other libraries multiply?

One file each, checked like everything else. ``pip install 'fpxbench[peers]'`` brings the libraries.
"""
