"""Faults of an encoder with a parameter that is estimated from the readouts: the maximum that scales are derived from,
and the threshold from which values are rounded up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fpxbench.diagnosis.effective_weight import Readout
from fpxbench.diagnosis.encode_faults import EncodeFault
from fpxbench.numbers.formats import Format
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.kinds import Kind

_NEAR_ONE = _NEAR_KNOWN = 2.0**-6
_ENOUGH = 4096
"""How many numbers to estimate a factor from."""


def estimated_faults(readouts: Sequence[Readout]) -> Iterator[EncodeFault]:
    """Yield the faults in storing weights with hidden codes, their parameters estimated from `readouts`; the last
    readout holds every code under scales of 1."""
    if isinstance(readouts[0].weight.scheme.format, Format):
        yield from _other_maximum(readouts[-1])
        yield from _rounding_threshold(readouts)


def _rounding_threshold(readouts: Sequence[Readout]) -> Iterator[EncodeFault]:
    """Yield a rounding away from zero with a threshold other than the midpoint, if the readouts determine one."""
    fmt = readouts[0].weight.scheme.format
    assert fmt is not None
    numbers = decode_table(fmt, readouts[0].seen.device).double().abs()
    numbers = numbers[numbers.isfinite()].unique()

    def neighbours(size: Tensor) -> tuple[Tensor, Tensor]:
        above = torch.searchsorted(numbers, size.contiguous()).clamp(1, len(numbers) - 1)
        return numbers[above - 1], numbers[above]

    first_up, last_down = 1.0, 0.0
    for readout in readouts:
        factors = right_factors(readout)
        assert readout.original is not None
        given, read = ((of[:, : factors.shape[1]].double() / factors).abs() for of in (readout.original, readout.seen))
        low, high = neighbours(given.nan_to_num(0.0))
        part = (given - low) / (high - low)
        inside = (part > 0) & (part < 1) & (factors > 0)
        nearer_high = (read - high).abs() < (read - low).abs()
        first_up = min([first_up, *part[inside & nearer_high].tolist()])
        last_down = max([last_down, *part[inside & ~nearer_high].tolist()])
    middle = (first_up + last_down) / 2
    # Thresholds 0, 0.5 and 1 are in `encode_faults`, and a weight may have no value near the threshold.
    if not last_down <= first_up + _NEAR_KNOWN / 16 or min(abs(middle - known) for known in (0, 0.5, 1)) < _NEAR_KNOWN:
        return

    def rounded(values: Tensor) -> Tensor:
        size = values.double().abs()
        low, high = neighbours(size)
        nearest = torch.where(size - low >= middle * (high - low), high, low)
        return torch.where(size < numbers[-1], nearest, size).copysign(values).float()

    yield EncodeFault(Kind.INACCURATE, f"values are rounded away from zero from {middle:.2g} of the way between two"
                                       " numbers on, not from its half", values=rounded)


def _other_maximum(codes: Readout) -> Iterator[EncodeFault]:
    """Yield scales derived from a maximum other than the format's, estimated from the ratio of the numbers read to the
    format's."""
    fmt, scaling = codes.weight.scheme.format, codes.weight.scheme.scaling
    assert fmt is not None and scaling is not None
    read = codes.seen[codes.seen.isfinite() & (codes.seen > 0)]
    if scaling.scale_format.coded or not read.numel():
        return
    numbers = decode_table(fmt, read.device).double()
    numbers = numbers[numbers.isfinite() & (numbers > 0)].sort().values
    ratio = float(read.amin() / numbers[0])
    read = read[:: max(1, read.numel() // _ENOUGH)]
    for _ in range(2):      # all numbers give a better estimate than the smallest alone
        held = numbers[(numbers[:, None] - read / ratio).abs().argmin(dim=0)]
        ratio = float((read * held).sum() / held.square().sum())
    if abs(ratio - 1) < _NEAR_ONE:
        return
    for one in dict.fromkeys((round(ratio, 2), fmt.max / max(1, round(fmt.max / ratio)), ratio)):
        yield EncodeFault(Kind.WRONG_MAX, f"scales are taken from the maximum {fmt.max / one:.4g}; {fmt.name} reaches"
                                          f" {fmt.max:g}",
                          scales=lambda scales, one=one: replace(scales, stored=scales.stored * one))


def right_factors(readout: Readout) -> Tensor:
    """Return the right scale of each weight read, float64 [N, C]."""
    scaling, weight = readout.weight.scheme.scaling, readout.weight
    assert scaling is not None
    return scaling.spread(scaling.factors(weight.stored_scales), *weight.shape)[:, readout.columns].double()
