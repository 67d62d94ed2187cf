"""Who is told of a confirmed regression, and how?"""
