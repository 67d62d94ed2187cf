"""Which maps does an implementation apply to codes, scales and positions?

Experiments that recover its decode table, scale factors, block map and code order.
"""
