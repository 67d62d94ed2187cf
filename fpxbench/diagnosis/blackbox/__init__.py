"""Which maps does an implementation effectively apply?"""
