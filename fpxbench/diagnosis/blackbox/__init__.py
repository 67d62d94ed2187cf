"""`fpxbench inspect`: recover by experiment which maps an implementation applies, and compare them with the definition."""
