"""How are the records shown?"""
