"""Which builds do the package indexes list?"""
