"""Name the fault that readouts of the effective weight and recovered maps show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fpxbench.checking import reference
from fpxbench.diagnosis.decode_fault import DecodeFault
from fpxbench.diagnosis.decode_faults import block_of, block_row_of, is_subnormal, scaled_by
from fpxbench.diagnosis.diagnosis import Diagnosis, nearness
from fpxbench.diagnosis.effective_weight import Prediction, Readout
from fpxbench.diagnosis.encode_faults import EncodeFault
from fpxbench.diagnosis.hypotheses import Faults, Predictor, explanations, kinds_of, names_of
from fpxbench.diagnosis.recovery.maps import RecoveredMaps
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.kinds import Kind

FEW_WEIGHTS = 16
"""Up to this many wrong weights are listed individually."""


def name_reading(
    readouts: Sequence[Readout], known: Sequence[DecodeFault | EncodeFault], maps: RecoveredMaps | None
) -> Diagnosis | None:
    """Return the fault in reading: one or two known faults that explain every readout and contradict no recovered map;
    else the fault that the maps show. None if neither names one."""
    first = readouts[0]
    if all(bool((one.seen == 0).all()) for one in readouts):
        return Diagnosis(nearness(first.correlation()), "every weight reads as zero",
                         {"gain": "0.0", "weights_read": first.seen.numel()})
    by_maps = maps.diagnosis() if maps is not None else None
    if by_maps is not None and all(Predictor(readout).explains(()) for readout in readouts):
        return by_maps      # these weights are right, so any fault without effect on them would fit
    numbers_read = any(bool(one.seen.isfinite().any()) for one in readouts)
    fitting = explanations(readouts, known)
    if fitting and not numbers_read:
        return Diagnosis(
            None, "not one output is finite, which several faults would explain", {"fitting": names_of(fitting)}
        )
    agreeing = [faults for faults in fitting if maps is None or not maps.contradict(faults, first.weight.shape)]
    if agreeing:
        return named(agreeing, first)
    if not fitting and (factor := off_by_one_factor(readouts)) is not None:
        more = by_maps is not None and {Kind.SCALED} < set(by_maps.evidence.get("kinds", ()))
        return by_maps if more else factor      # codes that these weights lack are misread too
    if by_maps is not None and by_maps.kind is Kind.SCALED and not _few_factors(first):
        # The table is read at one place, and the factor there is not the factor of every weight.
        return Diagnosis(
            nearness(first.correlation()),
            "no one factor explains every weight: the place at which experiments read shows one, and other weights show"
            " others",
            {"example": first.example(), "weights_read": first.seen.numel()},
        )
    if by_maps is not None:
        return by_maps
    if fitting:
        return Diagnosis(
            nearness(first.correlation()),
            "cannot tell: what explains every weight read out contradicts the experiments"
            f" ({maps.messages() if maps is not None else ''})",
            {"fitting": names_of(fitting)},
        )
    return None


def named(fitting: list[Faults], readout: Readout) -> Diagnosis:
    """Return the diagnosis if each of `fitting` explains all readouts: the fault or faults if all agree on the kinds,
    or that they cannot be distinguished."""
    evidence: dict[str, Any] = {"weights_read": readout.seen.numel(), "columns_read": len(readout.columns)}
    if bool(readout.wrong().any()):
        evidence["example"] = readout.example()
    first = fitting[0]
    message = "; and ".join(fault.message for fault in first)
    kinds, names = kinds_of(fitting), names_of(fitting)
    if len(kinds) == 1:
        if len(first) > 1:
            evidence["kinds"], message = sorted({str(fault.kind) for fault in first}), f"two faults at once: {message}"
        return Diagnosis(first[0].kind, message, evidence)
    certain = frozenset.intersection(*kinds)
    kind = next(iter(certain)) if len(certain) == 1 else nearness(readout.correlation())
    return Diagnosis(
        kind,
        f"cannot tell between {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}: this weight looks the"
        f" same under each; {names[0] if len(first) > 1 else first[0].kind} would be: {message}",
        evidence | {"fitting": names, "fitting_messages": [one[0].message for one in fitting if len(one) == 1]},
    )


def _few_factors(readout: Readout) -> bool:
    """Return whether weights are off by a handful of distinct factors."""
    right, seen = readout.definition.weight, readout.seen
    countable = right.isfinite() & seen.isfinite() & (right != 0) & (seen != 0)
    octaves = (seen[countable] / right[countable]).abs().log2()
    return (octaves * 16).round().unique().numel() <= 8


def off_by_one_factor(readouts: Sequence[Readout]) -> Diagnosis | None:
    """Return the diagnosis if all weights of every readout are off by the same factor."""
    gains = []
    for readout in readouts:
        right, seen = readout.definition.weight, readout.seen
        countable = right.isfinite() & seen.isfinite()
        gains.append(float((seen * right)[countable].sum() / right[countable].square().sum().clamp(min=1e-300)))
    gain, first = gains[0], readouts[0]
    if abs(gain - 1) < reference.unit_roundoff(first.dtype) \
            or not all(one.fits(Prediction(one.definition.weight * gain, one.definition.tainted)) for one in readouts):
        return None
    evidence = {"gain": repr(gain), "weights_read": first.seen.numel(), "example": first.example()}
    if not gain:
        return Diagnosis(nearness(first.correlation()), "every weight reads as zero", evidence)
    return Diagnosis(Kind.SCALED, scaled_by(gain, first.weight.scheme.scaling, first.weight.scheme.format), evidence)


def another_table(readout: Readout) -> Diagnosis | None:
    """Return the diagnosis of a decode table that no known fault gives: each code is always read as the same number,
    but some as a wrong one. None if codes are not read consistently."""
    weight = readout.weight
    if not weight.has_codes:
        return None
    fmt, columns = weight.scheme.format, readout.columns
    codes = weight.codes()[:, columns].long()
    rows = block_row_of(torch.arange(len(codes), device=codes.device), weight.scheme.scaling)
    factors = weight.scale_grid()[rows][:, block_of(columns, weight.scheme.scaling)].double()
    usable = readout.seen.isfinite() & (factors > 0)
    if not bool(usable.all()):
        return None
    read = readout.seen / factors
    size = 1 << fmt.bits
    flat = codes.reshape(-1)
    high = torch.full((size,), -torch.inf, dtype=torch.float64, device=read.device).scatter_reduce(
        0, flat, read.reshape(-1), "amax"
    )
    low = torch.full_like(high, torch.inf).scatter_reduce(0, flat, read.reshape(-1), "amin")
    counts = torch.bincount(flat, minlength=size)
    slack = 4 * reference.unit_roundoff(readout.dtype) * torch.maximum(high.abs(), low.abs())
    slack += torch.finfo(readout.dtype).smallest_normal / factors.min()
    present = counts > 0
    if not bool((((high - low) <= 2 * slack) | ~present).all()):
        return None
    right = decode_table(fmt, read.device).double()
    middle = (high + low) / 2
    wrong = (present & ~((middle - right).abs() <= slack)).cpu()
    if not bool(wrong.any()) or int(counts.cpu()[wrong].max()) < 2:    # seen once, its position may be at fault
        return None
    numbers = wrong.nonzero().reshape(-1).tolist()
    listed = [f"{fmt.describe_code(code)} as {float(middle[code]):.6g} instead of {float(right[code]):.6g}"
              for code in numbers[:8]]
    evidence = {"codes_misread": len(numbers), "codes_seen": int(present.sum()), "misread": listed,
                "example": readout.example()}
    if not bool((wrong & ~is_subnormal(fmt)).any()):
        return Diagnosis(Kind.SUBNORMAL_WRONG, f"{len(numbers)} subnormal codes are misread: {listed[0]}", evidence)
    return Diagnosis(
        nearness(readout.correlation()),
        f"{len(numbers)} of {int(present.sum())} codes decode to another number, the same one everywhere: {listed[0]}",
        evidence,
    )


def single_weights(readout: Readout) -> Diagnosis | None:
    """Return the diagnosis of a few scattered wrong weights among many; None if they are more."""
    wrong = readout.wrong()
    found = wrong.nonzero()
    if not 0 < len(found) <= FEW_WEIGHTS or len(found) * 1000 > wrong.numel():
        return None
    listed = [readout.described(row, i) for row, i in found.tolist()]
    first = listed[0]
    code = f", the code {first['code']}," if "code" in first else ""
    message = (
        f"{len(found)} of {wrong.numel():,} weights read out {'is' if len(found) == 1 else 'are'} misread: row "
        f"{first['row']}, column"
        f" {first['column']}{code} reads as {float(first['read_as']):.6g}; stored is {float(first['stored']):.6g}"
    )
    kind = Kind.INACCURATE if bool(readout.seen[wrong].isfinite().all()) else None
    return Diagnosis(
        kind, message, {"weights_read": wrong.numel(), "weights_wrong": len(found), "misread": listed, "example": first}
    )
