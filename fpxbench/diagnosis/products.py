"""Diagnose a wrong product from the implementation's outputs alone, without its source.

Products with one-hot activations are columns of the effective weight, which each known fault
(`fpxbench.diagnosis.decode_faults`) predicts. A fault is named if its prediction matches every weight read and the
definition's does not; if several match, or none, the diagnosis says so. `fpxbench.diagnosis.stored` does the same for
stored codes and scales.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fpxbench.checking import contract, reference
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.operands import Operands
from fpxbench.checking.output_rounding import coarser_outputs
from fpxbench.diagnosis.decode_faults import decode_faults
from fpxbench.diagnosis.diagnosis import Diagnosis, nearness
from fpxbench.diagnosis.effective_weight import Prediction, Readout, correlation, read_out
from fpxbench.diagnosis.hypotheses import explanations, names_of
from fpxbench.diagnosis.naming import another_table, name_reading, off_by_one_factor, single_weights
from fpxbench.diagnosis.probe_weight import probe_operands
from fpxbench.diagnosis.recovery.bench import Bench, small_case
from fpxbench.diagnosis.recovery.maps import RecoveredMaps
from fpxbench.diagnosis.sums import counted, diagnose_sums, wrong_part, wrong_run_of_columns
from fpxbench.implementation import Implementation
from fpxbench.numbers import packing
from fpxbench.records.kinds import Kind

RECOVERY_SECONDS = 10.0
"""Time limit for experiments on a wrong product of a sweep; `fpxbench inspect` has none."""
LARGER = 96, 416
"""Least rows and columns of the weight for faults that look the same on a smaller one."""
_BF16_ROUNDOFF = 2.0**-8
RECOVERY_M = 64
"""Activation rows in experiments: the number of columns read per call."""


def diagnose_product(implementation: Implementation, operands: Operands, columns: Iterable[int] = ()) -> Diagnosis:
    """Diagnose an implementation whose product is wrong or not finite, on the case's own weight and shape.

    `columns` are known to hold wrong weights, and are read first.
    """
    try:
        x = operands.activation("diagnosis")
        expected = operands.reference(x, implementation)
        y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
        readout = read_out(implementation, operands, columns)
        if readout is None:
            return diagnose_sums(implementation, operands, x, y, expected)
        if readout.fits(readout.definition) and len(readout.columns) < operands.case.k \
                and not implementation.slow(operands.device):
            every = read_out(implementation, operands, every=True)      # the fault may be in an unread column
            readout = every if every is not None else readout
        if readout.fits(readout.definition):
            return diagnose_sums(implementation, operands, x, y, expected, readout)
        maps = _recovered(implementation, operands)
        found = (_named(readout, implementation, operands, maps) or off_by_one_factor([readout])
                 or another_table(readout) or single_weights(readout)
                 or _part_of_the_output(implementation, operands, y, expected, readout))
        return _with_maps(found, maps, operands)
    except ContractViolation as violation:
        return Diagnosis(violation.verdict.kind, violation.verdict.summary)


# Known faults.


def _recovered(implementation: Implementation, operands: Operands) -> RecoveredMaps | None:
    """Return the maps of an implementation whose product is wrong, on the case's shape or a smaller one; None if calls
    are slow, or if it raises for a weight with other codes or scales."""
    if implementation.slow(operands.device):
        return None
    case = small_case(operands.case)
    if case.m < RECOVERY_M:
        case = case.model_copy(update={"m": RECOVERY_M})
    try:
        return RecoveredMaps(Bench(implementation, case, operands.device, operands.seed), RECOVERY_SECONDS)
    except ContractViolation:
        return None
    except Exception:   # another M or shape than the case's is unsupported; the case's own readout is still judged
        traceback.print_exc()
        return None


def _named(
    readout: Readout, implementation: Implementation, operands: Operands, maps: RecoveredMaps | None
) -> Diagnosis | None:
    """Return the fault that explains the readouts of this weight and of a probe weight, and agrees with the recovered
    maps; if several do, a diagnosis that lists them; None if none does."""
    if not readout.weight.has_codes:
        return maps.diagnosis() if maps is not None else None
    known = decode_faults(readout.weight)
    probe = read_out(implementation, probe_operands(implementation, operands))
    found = name_reading([readout, probe], known, maps)
    if found is not None and "fitting" in found.evidence:
        return on_a_larger_weight(found, implementation, operands) or found
    if found is not None:
        return found
    if (transposed := _transposed([readout, probe])) is not None:
        return transposed
    fitting = explanations([readout], known, most=1)
    if not fitting:
        return None
    return Diagnosis(
        nearness(readout.correlation()),
        f"cannot tell: {' or '.join(names_of(fitting))} would explain this weight, but not what becomes of another one "
        "put in its place",
        {"fitting": names_of(fitting), "example": readout.example()},
    )


def _transposed(readouts: list[Readout | None]) -> Diagnosis | None:
    """Return the diagnosis of square weights that are read transposed, with or without their scales; else None."""
    given = [one for one in readouts if one is not None]
    if any(one.weight.shape[0] != one.weight.shape[1] for one in given):
        return None

    def fits(readout: Readout, with_scales: bool) -> bool:
        weight = readout.weight
        of_codes = replace(weight, packed=packing.pack(weight.codes().T.contiguous(), weight.scheme.format.bits,
                                                       weight.layout))
        decoded = (weight.dequantize().T if with_scales else of_codes.dequantize()).double()
        return readout.fits(Prediction(decoded[:, readout.columns], ~decoded.isfinite().all(dim=1)))

    for with_scales, what in ((False, "codes of the square weight are"), (True, "square weight is")):
        if all(fits(one, with_scales) for one in given):
            return Diagnosis(
                Kind.WEIGHT_TRANSPOSED, f"the {what} transposed: row n, weight k reads that of row k, weight n",
                {"example": given[0].example()})
    return None


def on_a_larger_weight(found: Diagnosis, implementation: Implementation, operands: Operands) -> Diagnosis | None:
    """Return which of `found`'s indistinguishable faults a larger weight shows; None if it shows none of them."""
    case = operands.case
    n, k = max(case.n, LARGER[0]), max(case.k, LARGER[1])
    if (n, k) == (case.n, case.k):
        return None
    maps = _recovered(implementation, replace(operands, case=case.model_copy(update={"n": n, "k": k})))
    named = maps.diagnosis() if maps is not None else None
    if named is None or not any(message in named.message for message in found.evidence.get("fitting_messages", [])):
        return None
    return replace(named, message=f"{named.message} (on a weight [{n}, {k}]: on this one, [{case.n}, {case.k}],"
                                  f" {len(found.evidence['fitting'])} faults look the same)")


def _with_maps(found: Diagnosis, maps: RecoveredMaps | None, operands: Operands) -> Diagnosis:
    """Add the recovered maps to a diagnosis without a known fault."""
    if maps is None or "gain" in found.evidence or found.kind not in (Kind.INACCURATE, Kind.GIBBERISH, None):
        return found
    tried = maps.bench.case
    evidence = found.evidence | {"experiments": maps.evidence()}
    if maps.wrong:
        return replace(found, message=f"{found.message}; {maps.messages()}", evidence=evidence)
    if maps.all_right and tried.m != operands.case.m and (tried.n, tried.k) == (operands.case.n, operands.case.k):
        return replace(found, message=f"{found.message}; with M = {tried.m} every map is right, so it depends on M",
                       evidence=evidence)
    more = "" if maps.complete else "; `fpxbench inspect` makes experiments that a sweep has no time for"
    return replace(found, message=found.message + more, evidence=evidence)


# No known fault: locate the wrong part.


def _part_of_the_output(implementation: Implementation, operands: Operands, y: Tensor, expected: reference.Reference,
                        readout: Readout) -> Diagnosis:
    """Locate wrong weights that no known fault explains."""
    wrong = readout.wrong()
    evidence: dict[str, Any] = {"weights_read": wrong.numel(), "weights_wrong": int(wrong.sum()),
                                "example": readout.example()}
    right = readout.definition.weight
    coarser = coarser_outputs(y)
    rounding = 2 * _BF16_ROUNDOFF * right.abs() + torch.finfo(readout.dtype).smallest_normal
    if coarser is not None and bool(((readout.seen - right).abs() <= rounding).all()):
        return Diagnosis(Kind.INACCURATE, f"weights are right to bf16's rounding, not to fp16's: {coarser}", evidence)
    bad = ~readout.seen.isfinite()
    if bool(bad.any()):
        rows = bad.any(dim=1).nonzero().reshape(-1).tolist()
        elsewhere = bool((wrong & ~bad).any())
        if len(rows) == operands.case.n:
            return Diagnosis(
                None, f"{int(bad.sum())} of {bad.numel()} weights, in every output column, read as NaN or infinity",
                evidence)
        return Diagnosis(
            None,
            f"{counted('output column', rows, operands.case.n)} {'is' if len(rows) == 1 else 'are'} not finite;"
            f" {'others are wrong too' if elsewhere else 'all others are right'}",
            evidence | {"output_columns": rows[:32]},
        )
    run = wrong_run_of_columns(implementation, operands)
    if run is not None:
        message, found = run
        return Diagnosis(nearness(correlation(y.double(), expected.product)), message, evidence | found)
    part = wrong_part(y, expected)
    likeness = readout.correlation()
    evidence["correlation"] = repr(likeness)
    kind = nearness(likeness)
    if part:
        return Diagnosis(kind, f"wrong only in {part}", evidence)
    seen = "near the right weights, but not them" if kind is Kind.INACCURATE else "unlike the right weights"
    return Diagnosis(
        kind, f"the effective weights are {seen} (correlation {likeness:.2g}), and no known fault fits", evidence
    )
