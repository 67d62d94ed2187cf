"""What was found, and where is it kept?"""
