"""How do other tools (asv, pytest, GitHub) use fpxbench?"""
