"""Conformance of others: what the casts that people really use make of every input, against the oracle."""
