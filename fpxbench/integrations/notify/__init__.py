"""How are people notified of a confirmed regression?"""
