"""What does a stored code mean?"""
