"""The constants of torch.finfo against the definition of the format."""

from __future__ import annotations

import math

import torch

from fpxbench.casts.cast_record import EXAMPLES, Behaviour, DifferingInputs, Example, InputKind
from fpxbench.casts.conformance import Conformance, number_text
from fpxbench.casts.conversion import DTYPES, DType


def check_finfo(name: str) -> Conformance:
    """Check torch.finfo of the dtype `name`: each constant counts as one input."""
    dtype = DTYPES[name]
    reported = torch.finfo(getattr(torch, dtype.torch))
    defined = defined_constants(dtype)
    wrong = [
        Example(input=constant, input_value=f"torch.finfo(torch.{dtype.torch}).{constant}", got=value.hex(),
                got_value=number_text(value), expected=defined[constant].hex(),
                expected_value=number_text(defined[constant]))
        for constant in defined
        if (value := float(getattr(reported, constant))) != defined[constant]
    ]
    differences = (
        [DifferingInputs(kind=InputKind.CONSTANT, count=len(wrong), permitted=False, examples=wrong[:EXAMPLES])]
        if wrong
        else []
    )
    return Conformance(len(defined), len(wrong), Behaviour(), differences)


def defined_constants(dtype: DType) -> dict[str, float]:
    """Return what torch.finfo's documentation says its constants are, from the definition of a float dtype.

    eps : distance from 1 to the next number; resolution : ``10**-digits``, the decimal digits that are kept; tiny :
    smallest_normal
    """
    fmt = dtype.format
    digits = math.floor(fmt.mantissa_bits * math.log10(2))
    return {
        "bits": float(fmt.bits),
        "max": fmt.max,
        "min": -fmt.max if fmt.signed else fmt.value(0),
        "eps": math.ldexp(1.0, -fmt.mantissa_bits),
        "smallest_normal": fmt.min_normal,
        "tiny": fmt.min_normal,
        "resolution": float(f"1e-{digits}"),
    }
