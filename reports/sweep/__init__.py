"""What did one build do on one machine?"""
