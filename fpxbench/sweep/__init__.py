"""Which cases are there, and how do they run safely?"""
