"""Name the fault of a wrong product from what the implementation computes, without reading its source.

Products with one-hot activations are columns of the effective weight. Each known fault (`fpxbench.diagnosis.decode_faults`)
predicts that weight. A fault is named if its prediction matches every weight read where the definition does not; if several
match, or none, the diagnosis says so. `fpxbench.diagnosis.stored` does the same for stored codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fpxbench.checking import contract, inputs, reference
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.code_order import nibbles_exchanged
from fpxbench.diagnosis.decode_faults import block_of, decode_faults, is_subnormal, scaled_by, table_faults
from fpxbench.diagnosis.effective_weight import Prediction, Readout, correlation, read_out
from fpxbench.diagnosis.hypotheses import Faults, explanations, kinds_of, names_of
from fpxbench.implementation import Implementation
from fpxbench.numbers import packing
from fpxbench.numbers.codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.workloads import WeightContents

CORRELATED = 0.9
"""Above this correlation with the right answer a fault is an inaccuracy, below it is gibberish."""
FEW_WEIGHTS = 16
"""Up to this many wrong weights are listed one by one."""


@dataclass(frozen=True)
class Diagnosis:
    """A fault: its kind, one sentence, and the evidence.

    `kind` is None where the status already says all that is certain (a NaN that no known fault explains).
    """

    kind: Kind | None
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)


def diagnose_product(implementation: Implementation, operands: Operands, columns: Iterable[int] = ()) -> Diagnosis:
    """Name the fault of an implementation whose product is wrong or not finite, on the case's own weight and shape.

    `columns` are known to hold a wrong weight, and are read among others.
    """
    try:
        x = operands.activation("diagnosis")
        expected = operands.reference(x, implementation)
        y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
        readout = read_out(implementation, operands, columns)
        if readout is None:
            return _diagnose_sums(implementation, operands, x, y, expected)
        if readout.fits(readout.definition):
            return _diagnose_sums(implementation, operands, x, y, expected, readout)
        return (_known_decode_fault(readout, implementation, operands) or off_by_one_factor([readout]) or another_table(readout)
                or single_weights(readout) or _part_of_the_output(implementation, operands, y, expected, readout))
    except ContractViolation as violation:
        return Diagnosis(violation.verdict.kind, violation.verdict.summary)


# Known faults.


def _known_decode_fault(readout: Readout, implementation: Implementation, operands: Operands) -> Diagnosis | None:
    """Return the known fault, or pair of faults, that explains the readouts of this weight and of a probe weight; where several
    do, a diagnosis that lists them; None where none does."""
    if not readout.weight.has_codes:
        return None
    known = decode_faults(readout.weight)
    probe = read_out(implementation, probe_operands(implementation, operands))
    numbers_read = bool(readout.seen.isfinite().any() or probe.seen.isfinite().any())
    fitting = explanations([readout, probe], known)
    if not numbers_read and fitting:
        return Diagnosis(None, "not one output is finite, which several faults would explain", {"fitting": names_of(fitting)})
    if fitting:
        return named(fitting, readout)
    fitting = explanations([readout], known, most=1)
    if not fitting:
        return None
    return Diagnosis(nearness(readout.correlation()),
                     f"cannot tell: {' or '.join(names_of(fitting))} would explain this weight, but not what becomes of another one put"
                     " in its place", {"fitting": names_of(fitting), "example": readout.example()})


def probe_operands(implementation: Implementation, operands: Operands) -> Operands:
    """Return the same case with a probe weight, on which faults differ: any finite code anywhere, under scales that all differ from their
    neighbours'. An implementation that keeps tensors of its own beside the codes is given a weight to quantize instead, of
    all the numbers of the format. Codes that a known fault reads as NaN or infinity stay in every eighth row, and those that are
    NaN or infinity in every sixteenth, or no output would be finite (0 * NaN is NaN)."""
    weight, case = operands.weight, operands.case
    if weight.extra:
        original = inputs.make_weight(case, operands.seed, operands.device, WeightContents.CODES)
        probe = implementation.quantize(original, weight.scheme)
        return replace(operands, original=original, weight=probe, decoded=probe.dequantize())
    fmt = weight.scheme.format
    table = decode_table(fmt)
    risky = torch.zeros(len(table), dtype=torch.bool)
    for fault in table_faults(fmt):
        risky |= ~fault.apply(table).isfinite()
    if fmt.bits == 8:
        risky |= ~table[nibbles_exchanged(torch.arange(256))].isfinite()
    any_code = table.isfinite().nonzero().reshape(-1)
    safe_code = (table.isfinite() & ~risky).nonzero().reshape(-1)
    rng = inputs.generator(operands.seed, "probe codes")
    codes = safe_code[torch.randint(len(safe_code), weight.shape, generator=rng)]
    codes[7::8] = any_code[torch.randint(len(any_code), codes[7::8].shape, generator=rng)]
    safe_or_not_finite = torch.cat([safe_code, (~table.isfinite()).nonzero().reshape(-1)])
    codes[15::16] = safe_or_not_finite[torch.randint(len(safe_or_not_finite), codes[15::16].shape, generator=rng)]
    packed = packing.pack(codes.to(torch.uint8), fmt.bits, weight.layout).to(weight.device)
    probe = replace(weight, packed=packed, scales=_probe_scales(weight, rng))
    return replace(operands, weight=probe, decoded=probe.dequantize())


def _probe_scales(weight: QuantizedWeight, rng: torch.Generator) -> Tensor:
    """Other scales in place of `weight`'s, near 1/16 and random: each is unlike those beside it."""
    shape = weight.scales.shape
    exponent = torch.randint(-7, 0, shape, generator=rng)
    scales = torch.ldexp(torch.randint(8, 16, shape, generator=rng) / 8, exponent)
    if weight.scheme.scaling.has_tensor_scale:      # it is small, and stays
        scales *= 256
    return weight.scheme.scaling.scale_format.encode(scales).to(weight.device)


def named(fitting: list[Faults], readout: Readout) -> Diagnosis:
    """Return the diagnosis where each of `fitting` explains all readouts: one or two kinds by name, or that they cannot be distinguished."""
    evidence = {"weights_read": readout.seen.numel(), "columns_read": len(readout.columns)}
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
    return Diagnosis(kind, f"cannot tell between {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}: this weight looks the"
                           f" same under each; {names[0] if len(first) > 1 else first[0].kind} would be: {message}", evidence | {"fitting": names})


def off_by_one_factor(readouts: Sequence[Readout]) -> Diagnosis | None:
    """All weights, of every readout, off by the same factor."""
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
    """Each code read as one number wherever it stands, but not as its own: a decode table that no known fault gives."""
    weight = readout.weight
    if not weight.has_codes:
        return None
    fmt, columns = weight.scheme.format, readout.columns
    codes = weight.codes()[:, columns].long()
    factors = weight.scale_grid()[:, block_of(columns, weight.scheme.scaling)].double().expand(codes.shape)
    usable = readout.seen.isfinite() & (factors > 0)
    if not bool(usable.all()):
        return None
    read = readout.seen / factors
    size = 1 << fmt.bits
    flat = codes.reshape(-1)
    high = torch.full((size,), -torch.inf, dtype=torch.float64, device=read.device).scatter_reduce(0, flat, read.reshape(-1), "amax")
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
    if not bool(wrong.any()) or int(counts.cpu()[wrong].max()) < 2:    # seen once, it may be the place that is misread
        return None
    numbers = wrong.nonzero().reshape(-1).tolist()
    listed = [f"{fmt.describe_code(code)} as {float(middle[code]):.6g} instead of {float(right[code]):.6g}" for code in numbers[:8]]
    evidence = {"codes_misread": len(numbers), "codes_seen": int(present.sum()), "misread": listed, "example": readout.example()}
    if not bool((wrong & ~is_subnormal(fmt)).any()):
        return Diagnosis(Kind.SUBNORMAL_WRONG, f"{len(numbers)} subnormal codes are misread: {listed[0]}", evidence)
    return Diagnosis(nearness(readout.correlation()),
                     f"{len(numbers)} of {int(present.sum())} codes decode to another number, the same one everywhere: {listed[0]}", evidence)


# No known fault: locate what is wrong.


def single_weights(readout: Readout) -> Diagnosis | None:
    """A few weights among many, wherever they stand."""
    wrong = readout.wrong()
    found = wrong.nonzero()
    if not 0 < len(found) <= FEW_WEIGHTS or len(found) * 1000 > wrong.numel():
        return None
    listed = [readout.described(row, i) for row, i in found.tolist()]
    first = listed[0]
    code = f", the code {first['code']}," if "code" in first else ""
    message = (f"{len(found)} of {wrong.numel():,} weights read out {'is' if len(found) == 1 else 'are'} misread: row {first['row']}, column"
                f" {first['column']}{code} reads as {float(first['read_as']):.6g}; stored is {float(first['stored']):.6g}")
    kind = Kind.INACCURATE if bool(readout.seen[wrong].isfinite().all()) else None
    return Diagnosis(kind, message, {"weights_read": wrong.numel(), "weights_wrong": len(found), "misread": listed, "example": first})


def _part_of_the_output(implementation: Implementation, operands: Operands, y: Tensor, expected: reference.Reference,
                        readout: Readout) -> Diagnosis:
    """Locate weights that are wrong in a way that no known fault explains."""
    wrong = readout.wrong()
    evidence: dict[str, Any] = {"weights_read": wrong.numel(), "weights_wrong": int(wrong.sum()), "example": readout.example()}
    bad = ~readout.seen.isfinite()
    if bool(bad.any()):
        rows = bad.any(dim=1).nonzero().reshape(-1).tolist()
        elsewhere = bool((wrong & ~bad).any())
        if len(rows) == operands.case.n:
            return Diagnosis(None, f"{int(bad.sum())} of {bad.numel()} weights, in every output column, read as NaN or infinity", evidence)
        return Diagnosis(None, f"{_counted('output column', rows, operands.case.n)} {'is' if len(rows) == 1 else 'are'} not finite;"
                               f" {'others are wrong too' if elsewhere else 'all others are right'}", evidence | {"output_columns": rows[:32]})
    run = _wrong_run_of_columns(implementation, operands)
    if run is not None:
        message, found = run
        return Diagnosis(nearness(correlation(y.double(), expected.product)), message, evidence | found)
    part = _wrong_part(y, expected)
    likeness = readout.correlation()
    evidence["correlation"] = repr(likeness)
    kind = nearness(likeness)
    if part:
        return Diagnosis(kind, f"wrong only in {part}", evidence)
    seen = "near the right weights, but not them" if kind is Kind.INACCURATE else "unlike the right weights"
    return Diagnosis(kind, f"the effective weights are {seen} (correlation {likeness:.2g}), and no known fault fits", evidence)


def _diagnose_sums(implementation: Implementation, operands: Operands, x: Tensor, y: Tensor, expected: reference.Reference,
                   readout: Readout | None = None) -> Diagnosis:
    """Each weight that was read out is right: what goes wrong in their sums?"""
    comparison = reference.compare(y, expected)
    weights = "" if readout is None else f"each of {readout.seen.numel()} weights read out alone is right, "
    evidence = {"relative_error": repr(comparison.relative_error), "bound": repr(comparison.bound), "outside": comparison.outside}
    if comparison.within:
        return Diagnosis(Kind.NOT_REPEATABLE, f"{weights}and the product is right when it is computed again: it was not before", evidence)
    out = y.double()
    if not comparison.finite:
        small = x * 2.0**-8
        again = contract.checked_matmul(implementation, small, operands.weight, operands.device)
        if bool(again.isfinite().all()) and bool(expected.product.isfinite().all()):
            nan = bool(y.isnan().any())
            return Diagnosis(Kind.OVERFLOW_NAN if nan else Kind.OVERFLOW_INF,
                             f"{weights}sums overflow to {'NaN' if nan else 'infinity'}: they are finite for an activation 256 times"
                             " smaller, so something narrower than fp32 holds them before they are scaled", evidence)
        return Diagnosis(None, f"{weights}but {int((~y.isfinite()).sum())} of {y.numel()} sums are not finite", evidence)
    wrong = (out - expected.product).abs() > expected.tolerance
    top = out.abs().max()
    stopped = out.abs() == top
    if int(wrong.sum()) > 1 and bool((stopped | ~wrong).all()) and bool((expected.product.abs() >= top)[wrong].all()):
        return Diagnosis(Kind.SATURATED, f"{weights}but outputs stop at ±{float(top):g}, where right ones reach"
                                         f" {float(expected.product.abs().max()):g}", evidence)
    run = _wrong_run_of_columns(implementation, operands)
    likeness = correlation(out, expected.product)
    kind = nearness(likeness)
    evidence["correlation"] = repr(likeness)
    if run is not None:
        message, found = run
        return Diagnosis(kind, message, evidence | found)
    part = _wrong_part(y, expected)
    if part:
        return Diagnosis(kind, f"{weights}but sums are wrong in {part}", evidence)
    return Diagnosis(kind, f"{weights}but their sums are off by {comparison.relative_error:.2g} where at most {comparison.bound:.2g} is right,"
                           " as when they are accumulated in less than fp32", evidence)


def _wrong_run_of_columns(implementation: Implementation, operands: Operands) -> tuple[str, dict[str, Any]] | None:
    """The one run of weight columns outside which all is right, found by activations that are zero beside a range.

    None where there is no such run, or where it is more than half of K.
    """
    k = operands.case.k
    fresh = operands.activation("run of columns").sign()   # no column may hide behind a small activation

    def answer(first: int, last: int) -> tuple[Tensor, reference.Reference]:
        x = torch.zeros_like(fresh)
        x[:, first:last] = fresh[:, first:last]
        return contract.checked_matmul(implementation, x, operands.weight, operands.device), operands.reference(x, implementation)

    def right(first: int, last: int) -> bool:
        return first >= last or reference.compare(*answer(first, last)).within

    if right(0, k) or not (right(0, k // 2) or right(k // 2, k)):
        return None
    first = _last_true(0, k, lambda end: right(0, end))
    last = k - _last_true(0, k - first, lambda length: right(k - length, k))
    if not first < last or last - first > k // 2 or not (right(0, first) and right(last, k)):
        return None
    y, expected = answer(first, last)
    out = y.double()
    if not bool(out.any()):
        what = "are ignored"
    elif bool(((out - 2 * expected.product).abs() <= 2 * expected.tolerance).all()):
        what = "are counted twice"
    else:
        what = "are misread"
    tail = last == k
    where = f", the tail of K = {k}" if tail else f" of K = {k}"
    return (f"weight columns {first} to {last - 1}{where}, {what}; all others are right",
            {"first_column": first, "last_column": last - 1, "columns": what})


def _last_true(low: int, high: int, holds: Any) -> int:
    """The largest number in [low, high] for which `holds`, which is true up to some number and false after it."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _wrong_part(y: Tensor, expected: reference.Reference) -> str | None:
    """The output rows or columns that everything wrong lies in, if they are fewer than half."""
    wrong = ~((y.double() - expected.product).abs() <= expected.tolerance)
    for axis, name in ((1, "output row"), (0, "output column")):
        touched = wrong.any(dim=axis).nonzero().reshape(-1).tolist()
        size = wrong.shape[1 - axis]
        if touched and 2 * len(touched) <= size:
            return _counted(name, touched, size) + (", all of it zero" if not bool(y[wrong].any()) else "")
    return None


def _counted(name: str, numbers: list[int], size: int) -> str:
    return f"{name}{'' if len(numbers) == 1 else 's'} {_ranges(numbers)} of {size}"


def _ranges(numbers: list[int]) -> str:
    """``3, 7 to 12``; the first four runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs[:4])
    return text + (f" and {len(runs) - 4} more runs" if len(runs) > 4 else "")


def nearness(likeness: float) -> Kind:
    return Kind.INACCURATE if likeness > CORRELATED else Kind.GIBBERISH
