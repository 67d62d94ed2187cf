"""`fpxbench inspect`: what an implementation acts by, found by experiment, beside what the definition says."""
