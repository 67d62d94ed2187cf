"""Which fault explains a wrong result?"""
