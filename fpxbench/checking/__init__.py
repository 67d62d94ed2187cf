"""Is an implementation right, and how fast is it?"""
