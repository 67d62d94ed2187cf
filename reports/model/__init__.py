"""How is a model's table of schemes shown?"""
