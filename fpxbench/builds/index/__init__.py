"""Which wheels do the package indexes list?"""
