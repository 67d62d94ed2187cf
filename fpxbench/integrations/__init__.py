"""How do other tools use fpxbench?"""
