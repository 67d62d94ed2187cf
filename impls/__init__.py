"""Who multiplies?"""
