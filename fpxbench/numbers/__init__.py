"""What a code means: formats, rounding, the codec, scalings, schemes, packed weights, and every framework's names for
them."""
