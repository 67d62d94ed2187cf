"""Determine how outputs are rounded: to nearest, or in one direction, as by a conversion to 16 bits that truncates.

If only the last rounding is inexact, each output is one of the two neighbours of the exact product, which shows the
direction. With earlier roundings, outputs match neighbours only by chance, and the direction is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

DIRECTIONS = ("toward zero", "away from zero", "up", "down")
NEAREST = "to nearest"
MATCHING = 0.98
"""Share of outputs, and of those whose two roundings differ, that a direction must predict."""
LEAST_OUTPUTS = 100
MOST_OUTPUTS = 1 << 16
"""Outputs to use of each product; more would add cost, but no information."""


BF16_BITS = 8
_ENOUGH_OUTPUTS = 32
"""Fewest outputs: one fp16 output in eight fits in bf16's bits by chance."""


@dataclass
class OutputRounding:
    """Number of outputs that each direction predicts, of all and of those where it differs from rounding to nearest."""

    outputs: int = 0
    given: dict[str, int] = field(default_factory=lambda: dict.fromkeys((NEAREST, *DIRECTIONS), 0))
    apart: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIRECTIONS, 0))
    """Number of outputs for which each direction differs from rounding to nearest."""
    given_apart: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIRECTIONS, 0))

    def add(self, seen: Tensor, exact: Tensor, unit: Tensor) -> None:
        """Add outputs `seen` with their exact products and `unit`, one unit in the last place there. All float64
        [T]."""
        every = slice(None, None, 1 + seen.numel() // MOST_OUTPUTS)
        seen, exact, unit = seen[every], exact[every], unit[every]
        in_units = exact / unit
        rounded = {"toward zero": in_units.trunc(), "away from zero": in_units.sign() * in_units.abs().ceil(),
                   "up": in_units.ceil(), "down": in_units.floor()}
        got, nearest = seen / unit, in_units.round()
        self.outputs += got.numel()
        self.given[NEAREST] += int((got == nearest).sum())
        for direction, values in rounded.items():
            same, differs = got == values, values != nearest
            self.given[direction] += int(same.sum())
            self.apart[direction] += int(differs.sum())
            self.given_apart[direction] += int((same & differs).sum())

    @property
    def direction(self) -> str | None:
        """The direction, or ``to nearest``; None if unknown."""
        if self.outputs < LEAST_OUTPUTS:
            return None
        enough = MATCHING * self.outputs
        if self.given[NEAREST] >= enough:
            return NEAREST
        return next((one for one in DIRECTIONS if self.given[one] >= enough and self.apart[one] >= LEAST_OUTPUTS
                     and self.given_apart[one] >= MATCHING * self.apart[one]), None)


def coarser_outputs(y: Tensor) -> str | None:
    """Return a clause if all of many fp16 outputs fit in bf16's significand bits; else None."""
    if y.dtype != torch.float16:
        return None
    mantissa, _ = torch.frexp(y[y.isfinite() & (y != 0)].double())
    if mantissa.numel() < _ENOUGH_OUTPUTS:
        return None
    scaled = mantissa * 2.0**BF16_BITS
    if not bool((scaled == scaled.round()).all()):
        return None
    return f"no output has more than {BF16_BITS} significand bits, as if rounded to bf16 before it is rounded to fp16"


def is_directed(direction: str | None) -> bool:
    """Return whether outputs are known to be rounded in one direction."""
    return direction in DIRECTIONS
