"""What a layer's codes and scales hold: histograms, and numbers that no quantizer writes."""

from __future__ import annotations

import torch

from fpxbench.checkpoint.checkpoint_report import ScaleStatistics
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight

_FEWEST = 256
"""Number of nonzero codes from which it is not chance that all have one sign."""
_FEWEST_BYTES, _FEWEST_ROWS = 8, 16
_FAR_FROM_ZERO = 0.75
"""Share of codes larger than half of the format's largest, from which they are not centred on zero. It is a fifth for
normal weights, half for uniform ones and two thirds for ternary ones."""


def histogram(weight: QuantizedWeight) -> list[int]:
    """Return how often each code of the format occurs."""
    return torch.bincount(weight.codes().reshape(-1).int(), minlength=1 << weight.scheme.format.bits).tolist()


def code_problems(name: str, weight: QuantizedWeight, counts: list[int]) -> list[str]:
    """Return a sentence for each property of the codes that no correct checkpoint has."""
    fmt, problems = weight.scheme.format, []
    values = decode_table(fmt)
    nan = [code for code in range(len(counts)) if counts[code] and not values[code].isfinite()]
    if nan:
        codes = ", ".join(f"{code:#04x} ({counts[code]})" for code in nan[:4])
        problems.append(f"{name}: {sum(counts[code] for code in nan)} codes are NaN or infinity in {fmt.name}: {codes}")
    total, zero = sum(counts), sum(counts[code] for code in range(len(counts)) if values[code] == 0)
    if zero == total:
        problems.append(f"{name}: every code is zero")
    signs = [sum(count for count, value in zip(counts, values.tolist(), strict=True) if value * sign > 0)
             for sign in (1, -1)]
    if min(signs) == 0 and max(signs) >= _FEWEST:
        missing = "negative" if signs[0] else "positive"
        problems.append(f"{name}: none of {sum(signs)} codes is {missing}: the sign is lost")
    far = far_from_zero(weight, counts)
    if far > _FAR_FROM_ZERO:
        problems.append(f"{name}: {far:.0%} of the codes are larger than half of {fmt.name}'s largest: weights are"
                        " centred on zero, but these are not, as with an offset")
    largest = max((value for value in values.abs().tolist() if value < float("inf")), default=0.0)
    at_most = sum(counts[code] for code in range(len(counts)) if abs(values[code].item()) == largest)
    usual = 0.02 * total + 2 * weight.scales.numel()        # one per block is normal
    if fmt.bits == 8 and far <= _FAR_FROM_ZERO and at_most > usual:
        problems.append(
            f"{name}: {at_most / total:.1%} of the codes are {fmt.name}'s largest, {largest:g}: weights saturated"
        )
    return problems


def far_from_zero(weight: QuantizedWeight, counts: list[int]) -> float:
    """Return the share of codes larger than half of the format's largest; `counts` is the histogram."""
    values = decode_table(weight.scheme.format).abs()
    values = torch.where(values.isfinite(), values, 0.0)
    return float(torch.tensor(counts)[values > values.max() / 2].sum()) / max(1, sum(counts))


def blank_rows(name: str, weight: QuantizedWeight) -> list[str]:
    """Return a message if many rows of `weight`, one after another, hold the same byte throughout: a part of the file
    that was never written."""
    packed = weight.packed
    if packed.dim() != 2 or packed.shape[1] < _FEWEST_BYTES:
        return []
    alike = (packed == packed[:, :1]).all(dim=1).tolist()
    first, length, begun = 0, 0, 0
    for row, blank in enumerate(alike):
        begun = begun if blank else row + 1
        if row + 1 - begun > length:
            first, length = begun, row + 1 - begun
    if length < max(_FEWEST_ROWS, len(alike) // 8) or length == len(alike):
        return []
    byte = int(packed[first, 0])
    return [f"{name}: rows {first} to {first + length - 1} of {len(alike)} hold only the byte {byte:#04x}"]


def scale_statistics(name: str, weight: QuantizedWeight) -> tuple[ScaleStatistics, list[str]]:
    """Return counts over the block scales, and a sentence for each kind that makes weights wrong."""
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
