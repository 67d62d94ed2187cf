"""Tell how outputs are rounded: to nearest, or in one direction, as where a conversion to 16 bits cuts bits off.

Where the weight and the sums are exact but for the last rounding, an output is one of the two neighbours of the exact
product, and which of them tells the direction. Where more was rounded on the way, neighbours are met by chance and no
direction is told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

DIRECTIONS = ("toward zero", "away from zero", "up", "down")
NEAREST = "to nearest"
MATCHING = 0.98
"""Share of outputs, and of those whose two roundings differ, that a direction must give."""
LEAST_OUTPUTS = 100
MOST_OUTPUTS = 1 << 16
"""Of each product: more tell nothing new, and cost as much as a pass over them each."""


BF16_BITS = 8
_ENOUGH_OUTPUTS = 32
"""One output in eight of fp16 has no more bits than bf16 holds by chance."""


@dataclass
class OutputRounding:
    """How many outputs each direction gives, of all and of those that rounding to nearest does not give."""

    outputs: int = 0
    given: dict[str, int] = field(default_factory=lambda: dict.fromkeys((NEAREST, *DIRECTIONS), 0))
    apart: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIRECTIONS, 0))
    """Outputs of each direction's that lie apart from the nearest number."""
    given_apart: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIRECTIONS, 0))

    def add(self, seen: Tensor, exact: Tensor, unit: Tensor) -> None:
        """Count outputs `seen` beside the exact products; `unit`: one unit in the last place there. All float64 [T]."""
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
        """The direction, or ``to nearest``; None where it cannot be told."""
        if self.outputs < LEAST_OUTPUTS:
            return None
        enough = MATCHING * self.outputs
        if self.given[NEAREST] >= enough:
            return NEAREST
        return next((one for one in DIRECTIONS if self.given[one] >= enough and self.apart[one] >= LEAST_OUTPUTS
                     and self.given_apart[one] >= MATCHING * self.apart[one]), None)


def coarser_outputs(y: Tensor) -> str | None:
    """Return a clause where no output of many has more significand bits than bf16 holds, and their dtype holds more."""
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
    """Return whether outputs are known not to be rounded to nearest."""
    return direction in DIRECTIONS
