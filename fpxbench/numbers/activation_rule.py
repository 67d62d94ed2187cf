"""ActivationRule: how an implementation quantizes its activation before it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling import Scales, scaling_named
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode, encode

NUDGE = 2.0**-20
"""Bound on the relative difference of x / s, x * (1 / s) and amax / max in fp32. Within it of a boundary between two
codes, both codes are right.
"""


@dataclass(frozen=True)
class ActivationRule:
    """How an activation [M, K] is quantized, with the blocks along K that a weight has.

    scheme : format and granularity: ``e4m3fn-row`` (one scale per token), ``e4m3fn-tensor``, ``nvfp4``, …
    rounding : how a scaled value becomes a code
    scale : a fixed scale for the whole tensor (static quantization); None: computed from the activation (dynamic)
    """

    scheme: str
    rounding: Rounding = Rounding.NEAREST_EVEN
    scale: float | None = None

    def __str__(self) -> str:
        static = "" if self.scale is None else f", fixed scale {self.scale:.6g}"
        rounding = "" if self.rounding is Rounding.NEAREST_EVEN else f", {self.rounding.value}"
        return f"{self.scheme}{rounding}{static}"

    def values(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x` [M, K], float64 [M, K]."""
        return self._rounded(*self._scaled(x)) if x.numel() else x.double()

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantized values of `x` [M, K] and the permitted deviation of each, both float64 [M, K].

        The deviation is 0 except where fp32 rounding can move a value across a boundary between two codes.
        """
        middle = self.values(x)
        if x.numel() == 0:
            return middle, middle
        nudged = [(quotients * nudge, factors)
                  for quotients, factors in (self._scaled(x, 1 - NUDGE), self._scaled(x, 1 + NUDGE))
                  for nudge in (1 - NUDGE, 1 + NUDGE)]
        others = (self._rounded(*map(torch.stack, zip(*nudged, strict=True))) - middle).abs()
        # The nudge of the scale alone moves every value by NUDGE: no code changed.
        return middle, torch.where(others > 4 * NUDGE * middle.abs(), others * (1 + 4 * NUDGE), 0.0).amax(dim=0)

    def _scaled(self, x: Tensor, nudge: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return `x` [M, K] divided by its scales, fp32 [M, K], and what its codes are multiplied by, of that shape or
        [1, 1]; `nudge` is a factor on the numbers that the scales are computed from."""
        scheme, given = scheme_named(self.scheme), x.float()
        if self.scale is not None:
            fixed = torch.full((1, 1), self.scale, dtype=torch.float64, device=x.device)
            return scaling_named("tensor").divide(given, Scales(fixed.float())), fixed
        scaling = scheme.scaling
        scales = scaling.choose(given * nudge, scheme.format)
        return scaling.divide(given, scales), scaling.spread(scaling.factors(scales), *x.shape)

    def _rounded(self, quotients: Tensor, factors: Tensor) -> Tensor:
        """Return the values of the codes that `quotients` are rounded to, times `factors`, float64."""
        fmt = scheme_named(self.scheme).format
        return (decode(encode(quotients, fmt, self.rounding), fmt) * factors).double()
