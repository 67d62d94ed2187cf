"""Where do notices go?"""
