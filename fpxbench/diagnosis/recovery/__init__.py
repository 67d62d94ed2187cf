"""Which maps does an implementation apply? Experiments that recover its decode table, scale factors, block map and code order."""
