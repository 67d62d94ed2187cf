"""ActivationRule: how an implementation quantizes its activation before it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling import Scales, scaling_named
from fpxbench.numbers.scheme import Scheme, scheme_named
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
        return self._values(x, scheme_named(self.scheme), 1.0, (1.0,))[0] if x.numel() else x.double()

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantized values of `x` [M, K] and the permitted deviation of each, both float64 [M, K].

        The deviation is 0 except where fp32 rounding can move a value across a boundary between two codes.
        """
        if x.numel() == 0:
            return x.double(), x.double()
        scheme, middle = scheme_named(self.scheme), self.values(x)
        slack = torch.zeros_like(middle)
        for scale_nudge in (1 - NUDGE, 1 + NUDGE):
            for values in self._values(x, scheme, scale_nudge, (1 - NUDGE, 1 + NUDGE)):
                other = (values - middle).abs()
                # The nudge of the scale alone moves every value by NUDGE: no code changed.
                other = torch.where(other > 4 * NUDGE * middle.abs(), other * (1 + 4 * NUDGE), 0.0)
                slack = torch.maximum(slack, other)
        return middle, slack

    def _values(self, x: Tensor, scheme: Scheme, scale_nudge: float, nudges: tuple[float, ...]) -> list[Tensor]:
        """Return the quantized values [M, K] for each of `nudges`, a factor on the quotient x / scale; `scale_nudge` is
        a factor on the numbers that the scales are computed from."""
        given = x.float()
        if self.scale is not None:
            scales = Scales(torch.full((1, 1), self.scale, device=x.device))
        else:
            scales = scheme.scaling.choose(given * scale_nudge, scheme.format)
        scaling = scheme.scaling if self.scale is None else scaling_named("tensor")
        quotients = scaling.divide(given, scales)
        codes = encode(torch.stack([quotients * nudge for nudge in nudges]), scheme.format, self.rounding)
        if self.scale is not None:
            return [decode(each, scheme.format).double() * self.scale for each in codes]
        return [scheme.dequantize(each, scales).double() for each in codes]
