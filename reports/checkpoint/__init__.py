"""What does a checkpoint hold, and what is wrong with it?"""
