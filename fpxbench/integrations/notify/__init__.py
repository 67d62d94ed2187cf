"""Who is told what changed?"""
