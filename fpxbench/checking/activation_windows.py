"""Families of faults of an activation's quantizer: a maximum over only part of the elements, a subtracted mean.

The part may be any number of first or last elements of a block or of all tokens, or every n-th one; the mean may be of
a token, a channel or a tensor, and may be added back or not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fpxbench.checking.activation_probe import ActivationFault, Seen
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.scaling import Scaling
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.records.kinds import Kind

_STRIDES = (2, 3, 4, 8, 16)
_ORDINALS = {2: "other", 3: "3rd"}
_BESIDE = 2.0**-22
"""A quotient in fp32 may be rounded twice."""
_MOST_LISTED = 3
"""How many parts with the same maximum are listed; more are not informative."""
_SCREEN = 2
"""Number of tokens on which a window is tried first."""


def _parts(rule: ActivationRule) -> tuple[NumberFormat, Scaling]:
    scheme = scheme_named(rule.scheme)
    assert scheme.format is not None and scheme.scaling is not None     # an activation's rule is quantized
    return scheme.format, scheme.scaling


def windowed_maximum(rule: ActivationRule, readings: list[Seen]) -> str | None:
    """Return the part of the elements whose maximum determines the scales of every reading, as a clause; None if there
    is none."""
    (_, scaling), x = _parts(rule), readings[0].x
    if rule.scale is not None:
        return None
    m, k = x.shape
    length = scaling.block or k
    unit = f"{length} elements of a block" if scaling.block else f"{k} columns"
    along_k = torch.arange(k, device=x.device) % length
    along_m = torch.arange(m, device=x.device)
    every_row, every_column = torch.ones_like(along_m, dtype=torch.bool), torch.ones_like(along_k, dtype=torch.bool)

    if _fits(rule, readings, every_row[:, None] & every_column[None, :]):
        return None     # all elements determine the scales: another fault

    def of_columns(kept: Tensor) -> Tensor:
        return every_row[:, None] & kept[None, :]

    def longest(families: Iterator[tuple[int, Tensor]]) -> list[int]:
        return [size for size, window in families if _fits(rule, readings, window)]

    fitting = []
    for first in (True, False):
        sizes = longest((size, of_columns(along_k < size if first else along_k >= length - size))
                        for size in range(1, length))
        if sizes:
            fitting.append(f"the {'first' if first else 'last'} {_range(sizes)} of {unit}")
    for stride in _STRIDES:
        for offset in range(stride if stride < length else 0):
            if _fits(rule, readings, of_columns(along_k % stride == offset)):
                which = f"every {_ORDINALS.get(stride, f'{stride}th')}"
                fitting.append(f"{which} element of {unit}, from element {offset} on")
    if scaling.block_rows is None or scaling.has_tensor_scale:
        for first in (True, False):
            sizes = longest((size, (along_m < size if first else along_m >= m - size)[:, None] & every_column[None, :])
                            for size in range(1, m))
            if sizes:
                fitting.append(f"the {'first' if first else 'last'} {_range(sizes)} of {m} tokens")
    if len(fitting) > _MOST_LISTED:
        return "part of the elements"
    return " or of ".join(fitting) or None


def _range(sizes: list[int]) -> str:
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _fits(rule: ActivationRule, readings: list[Seen], window: Tensor) -> bool:
    """Return whether all readings [M, K] are quantized under scales from the elements in `window`, bool [M, K]."""
    _, scaling = _parts(rule)
    several = scaling.block_rows is not None and not scaling.has_tensor_scale      # each token has its own scales
    few = [Seen(one.x[:_SCREEN], one.seen[:_SCREEN]) for one in readings[:1]] if several else []
    return all(one.fits(*_windowed(rule, one.x, window[: len(one.x)])) for one in (*few, *readings))


def _windowed(rule: ActivationRule, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return the quantized x [M, K], and the slack of quotients next to a midpoint."""
    fmt, scaling = _parts(rule)
    scales = scaling.choose(torch.where(window, x.float(), 0.0), fmt)
    quotients, factors = scaling.divide(x.float(), scales), scaling.spread(scaling.factors(scales), *x.shape)
    low, values, high = (decode(encode(quotients * (1 + nudge), fmt, rule.rounding), fmt) * factors
                         for nudge in (-_BESIDE, 0.0, _BESIDE))
    return values, torch.maximum((high - values).abs(), (values - low).abs()).double()


def shift_faults(rule: ActivationRule) -> Iterator[ActivationFault]:
    """Yield the faults of a mean that is subtracted before the activation is quantized."""
    for what, dim in (("each token", 1), ("each channel, over all tokens,", 0), ("all elements", None)):
        def mean(x: Tensor, dim: int | None = dim) -> Tensor:
            return x.float().mean() if dim is None else x.float().mean(dim=dim, keepdim=True)

        def left_out(x: Tensor, mean=mean) -> Tensor:
            return rule.values((x.float() - mean(x)).to(x.dtype).float())

        def left_out_exactly(x: Tensor, mean=mean) -> Tensor:
            return rule.values(x.float() - mean(x))

        for values in (left_out_exactly, left_out):
            yield ActivationFault(Kind.INACCURATE, f"the mean of {what} is subtracted before it is quantized, and not"
                                                   " added again", values)
            yield ActivationFault(Kind.INACCURATE, f"the mean of {what} is subtracted before it is quantized, and added"
                                                   " again afterwards: declare what is meant",
                                  lambda x, values=values, mean=mean: values(x) + mean(x))
