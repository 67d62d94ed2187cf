"""What do the casts of a build do?"""
