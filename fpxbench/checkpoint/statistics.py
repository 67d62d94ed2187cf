"""What a layer's codes and scales hold: histograms, and numbers that no quantizer writes."""

from __future__ import annotations

import torch

from fpxbench.checkpoint.checkpoint_report import ScaleStatistics
from fpxbench.numbers.codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight


def histogram(weight: QuantizedWeight) -> list[int]:
    """Return how often each code of the format occurs."""
    return torch.bincount(weight.codes().reshape(-1).int(), minlength=1 << weight.scheme.format.bits).tolist()


def code_problems(name: str, weight: QuantizedWeight, counts: list[int]) -> list[str]:
    """Return a sentence for each thing about the codes that a right checkpoint does not have."""
    fmt, problems = weight.scheme.format, []
    values = decode_table(fmt)
    nan = [code for code in range(len(counts)) if counts[code] and not values[code].isfinite()]
    if nan:
        codes = ", ".join(f"{code:#04x} ({counts[code]})" for code in nan[:4])
        problems.append(f"{name}: {sum(counts[code] for code in nan)} codes are NaN or infinity in {fmt.name}: {codes}")
    total, zero = sum(counts), sum(counts[code] for code in range(len(counts)) if values[code] == 0)
    if zero == total:
        problems.append(f"{name}: every code is zero")
    largest = max((value for value in values.abs().tolist() if value < float("inf")), default=0.0)
    at_most = sum(counts[code] for code in range(len(counts)) if abs(values[code].item()) == largest)
    if fmt.bits == 8 and at_most > 0.02 * total + 2 * weight.scales.numel():    # one a block is the rule
        problems.append(
            f"{name}: {at_most / total:.1%} of the codes are {fmt.name}'s largest, {largest:g}: weights saturated"
        )
    return problems


def scale_statistics(name: str, weight: QuantizedWeight) -> tuple[ScaleStatistics, list[str]]:
    """Return counts over the block scales, and a sentence for each kind that spoils weights."""
    scaling = weight.scheme.scaling
    numbers = scaling.scale_format.decode(weight.scales).reshape(-1)
    finite = numbers[numbers.isfinite()]
    fmt = scaling.scale_format.format
    found = ScaleStatistics(count=numbers.numel(), nan=int((~numbers.isfinite()).sum()), zero=int((numbers == 0).sum()),
                            negative=int((numbers < 0).sum()),
                            subnormal=int(((numbers > 0) & (numbers < fmt.min_normal)).sum()),
                            largest=int((numbers == fmt.max).sum()), min=float(finite.min()) if finite.numel() else 0.0,
                            max=float(finite.max()) if finite.numel() else 0.0)
    problems = []
    for count, what in ((found.nan, "NaN or infinite"), (found.negative, "negative")):
        if count:
            problems.append(f"{name}: {count} of {found.count} scales are {what}")
    codes_of_zero_blocks = weight.codes()[_weights_under(weight, numbers == 0)] if found.zero else torch.empty(0)
    if codes_of_zero_blocks.numel() and bool(
        (decode_table(weight.scheme.format)[codes_of_zero_blocks.int()] != 0).any()
    ):
        problems.append(f"{name}: {found.zero} of {found.count} scales are zero over weights that are not")
    if fmt.bits == 8 and found.count >= 64 and found.largest > 0.25 * found.count:
        problems.append(
            f"{name}: {found.largest / found.count:.0%} of the scales are {fmt.name}'s largest, {fmt.max:g}"
        )
    return found, problems


def _weights_under(weight: QuantizedWeight, chosen: torch.Tensor) -> torch.Tensor:
    return chosen[weight.scheme.scaling.block_index(*weight.shape)]
