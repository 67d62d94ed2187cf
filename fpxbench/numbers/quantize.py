"""Quantize a float weight by the reference codec."""

from __future__ import annotations

from torch import Tensor

from fpxbench.numbers.scheme import Scheme, checked_weight, scheme_named
from fpxbench.numbers.weight import QuantizedWeight


def quantize(weight: Tensor, scheme: Scheme | str, layout: str = "planar") -> QuantizedWeight:
    """Return a float `weight` [N, K] stored under `scheme`, its codes packed in `layout` (`fpxbench.numbers.packing`).

    Codes are rounded to nearest even and saturate. A dense scheme (``bf16``, ``fp16``) keeps the weight in 16 bits.

    Raise ValueError for a scheme or layout that does not exist and for a weight that is not a finite matrix, and
    TypeError for one that is not floating-point.
    """
    scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
    if not scheme.quantized:
        dense = checked_weight(weight, scheme.dense_dtype).contiguous()
        return QuantizedWeight(scheme, (weight.shape[0], weight.shape[1]), "dense", dense)
    codes, scales = scheme.quantize(weight)
    return QuantizedWeight.from_codes(codes, scales, scheme, layout)
