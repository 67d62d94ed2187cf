"""The constants of torch.finfo against the definition of the format."""

from __future__ import annotations

import math

import torch

from fpxbench.casts.cast_record import EXAMPLES, Behaviour, DifferingInputs, Example, InputKind
from fpxbench.casts.conformance import Conformance, number_text
from fpxbench.casts.conversion import DTYPES, DType


def check_finfo(name: str) -> Conformance:
    """torch.finfo of the dtype `name`: each constant is an input."""
    dtype = DTYPES[name]
    told = torch.finfo(getattr(torch, dtype.torch))
    right = defined_constants(dtype)
    wrong = [
        Example(input=constant, input_value=f"torch.finfo(torch.{dtype.torch}).{constant}", got=value.hex(), got_value=number_text(value),
                expected=right[constant].hex(), expected_value=number_text(right[constant]))
        for constant in right if (value := float(getattr(told, constant))) != right[constant]
    ]
    differences = [DifferingInputs(kind=InputKind.CONSTANT, count=len(wrong), permitted=False, examples=wrong[:EXAMPLES])] if wrong else []
    return Conformance(len(right), len(wrong), Behaviour(), differences)


def defined_constants(dtype: DType) -> dict[str, float]:
    """What torch.finfo's documentation says its constants are, from the dtype's definition.

    eps : distance from 1 to the next number; resolution : ``10**-digits``, the decimal digits that are kept; tiny : smallest_normal
    """
    fmt = dtype.format
    if fmt is not None:
        mantissa_bits, bits, maximum = fmt.mantissa_bits, fmt.bits, fmt.max
        # Without mantissa and zero every code is a normal number.
        smallest_normal = fmt.min_normal if fmt.signed else fmt.value(0)
        minimum = -maximum if fmt.signed else fmt.value(0)
    else:
        mantissa_bits, bits = dtype.mantissa_bits, dtype.bits
        bias = (1 << (dtype.exponent_bits - 1)) - 1
        maximum = math.ldexp(2.0 - math.ldexp(1.0, -mantissa_bits), bias)
        smallest_normal, minimum = math.ldexp(1.0, 1 - bias), -maximum
    digits = math.floor(mantissa_bits * math.log10(2))
    return {
        "bits": float(bits), "max": maximum, "min": minimum, "eps": math.ldexp(1.0, -mantissa_bits),
        "smallest_normal": smallest_normal, "tiny": smallest_normal, "resolution": float(f"1e-{digits}"),
    }
