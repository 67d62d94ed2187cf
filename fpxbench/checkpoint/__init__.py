"""What is in this checkpoint, and is it what it says?"""
