"""How does `pytest --benchmark` check and time a kernel?"""
