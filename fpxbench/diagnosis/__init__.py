"""Whose mistake a wrong product, or wrong stored codes and scales, look like (docs/diagnosis.md)."""
