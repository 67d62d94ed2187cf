"""Diagnose stored codes and scales by comparison with those that each known fault stores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.decode_faults import scale_faults
from fpxbench.diagnosis.diagnosis import Diagnosis, nearness
from fpxbench.diagnosis.effective_weight import correlation
from fpxbench.diagnosis.encode_faults import (
    EncodeFault,
    encode_faults,
    encoded,
    largest_slack,
    nudges,
    quotient_slack,
    same_number,
)
from fpxbench.diagnosis.hypotheses import factors_in, grid_under, in_pairs, kinds_of, names_of, singly
from fpxbench.diagnosis.random_rounding import biased_rounding
from fpxbench.implementation import Implementation
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.workloads import WeightContents

SCALE_SLACK = 2.0**-21
"""amax / max, amax * (1 / max) and 1 / (max / amax) differ by at most this much in fp32, and all are right."""
NV_RATIO_SLACK = 2.0**-3
"""The resolution of ratios of E4M3 block scales, which have three mantissa bits."""
SCREENED_ROWS = 256
"""Number of rows with wrong codes on which each fault is tried before all rows."""


def diagnose_quantization(original: Tensor, operands: Operands, probe: Operands | None = None) -> Diagnosis | None:
    """Return the fault in codes or scales that differ from the scheme's for `original` [N, K]; None if they are right.

    Scales may differ by fp32's rounding. Codes are judged under the stored scales, so that a wrong scale does not make
    them wrong. A weight in a private layout is not judged. `probe` is another weight quantized in the same way, which a
    fault must explain too.
    """
    if not operands.weight.has_codes:
        return None
    weights = [(original, operands)] + ([(probe.original, probe)] if probe is not None else [])
    several = []
    for given, held in weights:
        weight = held.weight
        _, oracle_scales = weight.scheme.quantize(given)
        if weight.scales is None or weight.scales.shape != oracle_scales.stored.shape:
            stored = "no scales" if weight.scales is None else f"scales of the shape {list(weight.scales.shape)}"
            return Diagnosis(
                Kind.WRONG_SHAPE,
                f"{stored} are stored; {weight.scheme.name} has {list(oracle_scales.stored.shape)} on this weight",
            )
        several.append(_Stored(given.float(), weight, oracle_scales))
    of_zeros = next((found for stored in several if (found := _zero_block_fault(stored)) is not None), None)
    if of_zeros is not None:
        return of_zeros
    of_scales = next((found for stored in several if (found := _scale_fault(stored)) is not None), None)
    of_codes = None
    if of_scales is None or not all(stored.codes_fit(stored.oracle_scales) for stored in several):
        of_codes = _code_fault(several, of_scales is not None)
    if of_scales is None or of_codes is None:
        return of_scales or of_codes
    # Codes of the sibling format imply its maximum; otherwise the wrong scale comes first, and makes codes overflow.
    leading = of_codes if of_codes.kind in (Kind.FNUZ_AS_FN, Kind.FN_AS_FNUZ) else of_scales
    kinds = sorted({str(of_scales.kind), str(of_codes.kind)})
    return Diagnosis(leading.kind, f"two faults at once: {of_scales.message}; and {of_codes.message}",
                     of_scales.evidence | of_codes.evidence | {"kinds": kinds})


def probe_quantization(implementation: Implementation, operands: Operands) -> Operands:
    """Return the case with a probe weight, quantized by `implementation`, of values on which encoders differ: the
    format's numbers, midpoints and their neighbours, under scales of 1 or, if the implementation's scales are off by a
    common factor, under its scales."""
    scheme, fmt = operands.weight.scheme, operands.weight.scheme.format
    block = scheme.scaling.block or operands.case.k

    def quantized(original: Tensor) -> Operands:
        weight = implementation.quantize(original.clone(), scheme)
        return replace(operands, original=original, weight=weight, decoded=weight.dequantize())

    original = inputs.make_weight(operands.case, operands.seed, operands.device, WeightContents.CODES)
    probe = quantized(original)
    right = scheme.scaling.factors(scheme.quantize(original)[1])
    held = probe.weight.scale_grid()
    if held.shape != right.shape:
        return probe
    ratio = float((held / right).median())
    if abs(ratio - 1) <= SCALE_SLACK or not 2.0**-8 < ratio < 2.0**8:
        return probe
    # a power-of-two scale depends only on the block's largest number, so the values are scaled with it
    if scheme.scaling.scale_format.powers_of_two:
        return quantized((original * ratio).clamp(-fmt.max, fmt.max))
    top = float(f"{fmt.max / ratio:.6g}")      # the maximum that scales are derived from, without fp32's last bits
    original = original.clamp(-top, top)
    original[:, ::block] = top
    return quantized(original)


@dataclass
class _Stored:
    """A stored weight, with the original [N, K] and the oracle's scales."""

    original: Tensor
    weight: QuantizedWeight
    oracle_scales: Scales

    @cached_property
    def codes(self) -> Tensor:
        return self.weight.codes()

    @property
    def slack(self) -> Tensor:
        """The allowed relative deviation of each quotient under the stored scales: fp32 [N, K]."""
        return quotient_slack(self.weight.stored_scales, self.weight.scheme, *self.weight.shape)

    def codes_fit(self, scales: Scales) -> bool:
        return not bool(self.wrong_codes(scales).any())

    def wrong_codes(self, scales: Scales) -> Tensor:
        """Return where the stored codes are not nearest-even under `scales`: bool [N, K]."""
        return ~self.made_by((), scales)

    def made_by(self, faults: tuple[EncodeFault, ...], scales: Scales, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return where the stored codes match an encoder with `faults`: bool [rows, K].

        A quotient beside a midpoint may be rounded to either side.
        """
        fmt, scaling = self.weight.scheme.format, self.weight.scheme.scaling
        # Blocks of several rows cannot be split: then all rows are encoded, and only `rows` are compared.
        whole = scaling.block_rows not in (1, None)
        of_rows = not whole and scales.stored.shape[0] > 1
        here = Scales(scales.stored[rows] if of_rows else scales.stored, scales.tensor_scale)
        held, original = same_number(self.codes[rows], fmt), self.original if whole else self.original[rows]
        same = torch.zeros_like(held, dtype=torch.bool)
        for nudge in nudges(quotient_slack(here, self.weight.scheme, *original.shape)):
            codes = encoded(original, lambda w, nudge=nudge: scaling.divide(w, here) * (1 + nudge), fmt, faults)
            same |= same_number(codes[rows] if whole else codes, fmt) == held
        return same

    def made_before_scales_were_rounded(self) -> bool:
        """Return whether every code is that of the weight over its block's exact amax / max, not the stored scale."""
        scaling, fmt = self.weight.scheme.scaling, self.weight.scheme.format
        if scaling.scale_format.powers_of_two or not (scaling.scale_format.coded or scaling.scale_format.bits == 16):
            return False
        factors = scaling.spread(scaling.block_amax(self.original) / fmt.max, *self.weight.shape)
        held = same_number(self.codes, fmt)
        same = torch.zeros_like(held, dtype=torch.bool)
        slack = largest_slack(scaling)
        for nudge in (0.0, -slack, slack):
            quotient = torch.where(factors > 0, self.original / factors, 0.0) * (1 + nudge)
            same |= same_number(encode(quotient, fmt), fmt) == held
        return bool(same.all())

    def stored_by(self, faults: tuple[EncodeFault, ...], scales: Scales) -> bool:
        """Return whether `faults` explain every stored code; a few rows are tried first."""
        return all(bool(self.made_by(faults, scales, rows).all()) for rows in (*self._screens, slice(None)))

    @cached_property
    def _screens(self) -> tuple[Tensor, Tensor]:
        wrong = self.wrong_codes(self.weight.stored_scales).any(dim=1).nonzero().reshape(-1)[:SCREENED_ROWS]
        return wrong[:: max(1, len(wrong) // 4)][:4], wrong


def _code_fault(several: list[_Stored], try_right_scales: bool) -> Diagnosis | None:
    """Return the fault, or pair of faults, that explains every code under the stored scales or, if these are wrong,
    under the right ones; None if all codes are right."""
    stored = next((one for one in several if not one.codes_fit(one.weight.stored_scales)), None)
    if stored is None:
        return None
    fmt, weight = stored.weight.scheme.format, stored.weight
    wrong = stored.wrong_codes(weight.stored_scales)
    values = decode(stored.codes, fmt).abs()
    largest = int(encode(values[values.isfinite()].amax(), fmt)) if bool(values.isfinite().any()) else 0
    known = list(encode_faults(fmt, weight.layout, weight.shape[1], largest))
    if all(bool(one.slack.all()) for one in several):
        known = [one for one in known if one.kind is not Kind.TIES_NOT_EVEN]    # no quotient is exact: no ties
    evidence = _wrong_codes_evidence(stored, wrong)
    share = f"{int(wrong.sum())} of {wrong.numel()} codes are wrong"
    singly_and_in_pairs = (list(singly(known)), list(in_pairs(known)))
    scalings = (lambda one: one.weight.stored_scales, lambda one: one.oracle_scales)
    for tried, scales_of in product(singly_and_in_pairs, scalings[:1 + try_right_scales]):
        fitting = [faults for faults in tried if all(one.stored_by(faults, scales_of(one)) for one in several)]
        if len(kinds := kinds_of(fitting)) == 1:
            first, both = fitting[0], len(fitting[0]) > 1
            message = ("two faults at once: " if both else "") + "; and ".join(one.message for one in first)
            return Diagnosis(first[0].kind, f"{message}: {share}",
                             evidence | ({"kinds": sorted(map(str, next(iter(kinds))))} if both else {}))
        if kinds:
            return Diagnosis(
                nearness(_likeness(stored)),
                f"{share}; cannot tell between {', '.join(names_of(fitting))}: on this weight they store the same",
                evidence | {"fitting": names_of(fitting)})
    if all(one.made_before_scales_were_rounded() for one in several):
        return Diagnosis(
            Kind.SCALE_ROUNDED_LATE,
            f"codes are made under scales that are rounded only afterwards, when they are stored: {share} under the"
            " stored ones", evidence)
    if (biased := next((found for one in several if (found := biased_rounding(one.original, one.weight)) is not None),
                       None)) is not None:
        return Diagnosis(Kind.ROUNDING_BIASED, f"{share}: {biased}", evidence)
    likeness = _likeness(stored)
    return Diagnosis(nearness(likeness), f"{share}, and no known fault explains them; e.g. {evidence['examples'][0]}",
                     evidence | {"correlation": repr(likeness)})


def _wrong_codes_evidence(stored: _Stored, wrong: Tensor) -> dict[str, Any]:
    fmt = stored.weight.scheme.format
    values = stored.weight.scheme.scaling.divide(stored.original, stored.weight.stored_scales)
    right = encode(values, fmt)
    examples = [
        f"{float(values[row, column]):.9g} at row {row}, column {column} is stored as "
        f"{fmt.describe_code(int(stored.codes[row, column]))}, not as {fmt.describe_code(int(right[row, column]))}"
        for row, column in wrong.nonzero()[:3].tolist()
    ]
    return {"codes": wrong.numel(), "codes_wrong": int(wrong.sum()), "examples": examples}


def _likeness(stored: _Stored) -> float:
    return correlation(stored.weight.dequantize().double(), stored.original.double())


def _zero_block_fault(stored: _Stored) -> Diagnosis | None:
    """Return the fault of blocks of zeros that do not read back as zeros; None if there is none."""
    weight, scaling = stored.weight, stored.weight.scheme.scaling
    decoded = weight.dequantize()
    empty = scaling.spread((scaling.block_amax(stored.original) == 0).float(), *weight.shape).bool()
    odd = empty & (decoded != 0)
    if not bool(odd.any()):
        return None
    row, column = odd.nonzero()[0].tolist()
    scale = float(scaling.spread(weight.scale_grid(), *weight.shape)[row, column])
    code = weight.scheme.format.describe_code(int(stored.codes[row, column]))
    return Diagnosis(Kind.ZERO_BLOCK,
                     f"{int(odd.sum())} of {int(empty.sum())} weights in blocks of zeros read back as "
                     f"{float(decoded[row, column]):g}: the scale is stored as {scale:g}, "
                     f"the code at row {row}, column {column} as {code}",
                     {"row": row, "column": column, "scale": repr(scale)})


def _scale_fault(stored: _Stored) -> Diagnosis | None:
    scheme, weight = stored.weight.scheme, stored.weight
    fmt, scaling = scheme.format, scheme.scaling
    held, right = weight.scale_grid(), scaling.factors(stored.oracle_scales)
    wrong = ~_scales_agree(stored, held, right)
    if not bool(wrong.any()):
        return None
    row, block = wrong.nonzero()[0].tolist()
    evidence = {
        "scales": held.numel(),
        "scales_wrong": int(wrong.sum()),
        "scale_example": f"row {row}, block {block}: {float(held[row, block]):.9g}, not {float(right[row, block]):.9g}",
    }
    share = f"{int(wrong.sum())} of {held.numel()} scales are wrong"
    if not bool((held.isfinite() & (held >= 0)).all()):
        return Diagnosis(None, f"{share}: some are negative or not finite", evidence)
    positive = (right > 0) & (held > 0)
    ratios = (held / right)[positive].double()
    ratio = float(ratios.median()) if ratios.numel() else 0.0
    if bool((held == 1).all()):
        return Diagnosis(Kind.SCALE_MISSING, "every stored scale is 1", evidence)
    slack = NV_RATIO_SLACK if scaling.has_tensor_scale else SCALE_SLACK
    if bool(positive.all()) and abs(ratio - 1) > 2 * slack and bool(((ratios - ratio).abs() <= slack * ratio).all()):
        return _constant_ratio(stored, ratio, evidence)
    oracle = QuantizedWeight.from_codes(stored.codes, stored.oracle_scales, scheme, weight.layout)
    starts = torch.arange(held.shape[1], device=held.device) * (scaling.block or 1)
    for fault in scale_faults(scaling, fmt, *weight.shape):
        factors = factors_in(grid_under((fault,), oracle), (fault,), scaling, starts)
        if factors.shape == held.shape and bool(((factors - held).abs() <= SCALE_SLACK * held).all()):
            return Diagnosis(fault.kind, f"{share}, as though {fault.message}", evidence)
    if bool(((right.T.reshape(right.shape) - held).abs() <= SCALE_SLACK * held).all()):
        n, blocks = right.shape
        return Diagnosis(Kind.SCALE_TRANSPOSED,
                         f"{share}: the scales [{n}, {blocks}] are stored column by column, as [{blocks}, {n}]",
                         evidence)
    if scaling.scale_format.powers_of_two:
        steps = torch.log2(ratios)
        return Diagnosis(
            nearness(_likeness(stored)),
            f"{share}: their exponents lie {int(steps.min()):+d} to {int(steps.max()):+d}"
            " from floor(log2(amax)) - emax",
            evidence,
        )
    return Diagnosis(
        nearness(_likeness(stored)),
        f"{share}: they are {float(ratios.min()):.4g} to {float(ratios.max()):.4g} times amax / {fmt.max:g}",
        evidence,
    )


def _constant_ratio(stored: _Stored, ratio: float, evidence: dict[str, Any]) -> Diagnosis:
    scheme = stored.weight.scheme
    fmt, scaling = scheme.format, scheme.scaling
    evidence = evidence | {"ratio": repr(ratio)}
    if not stored.codes_fit(stored.weight.stored_scales) and stored.codes_fit(stored.oracle_scales):
        return Diagnosis(
            Kind.SCALED, f"every stored scale is {ratio:.4g} times the one that its codes were made under", evidence)
    if scaling.scale_format.powers_of_two and ratio in (0.5, 2.0):
        kind, side = (Kind.SCALE_ONE_STEP_HIGH, "high") if ratio > 1 else (Kind.SCALE_ONE_STEP_LOW, "low")
        return Diagnosis(
            kind,
            f"every block's exponent is stored one too {side}: MX asks for floor(log2(amax)) - "
            f"{scheme.element_format.emax}",
            evidence,
        )
    other = fmt.max / ratio
    return Diagnosis(
        Kind.WRONG_MAX, f"scales are taken from the maximum {other:.6g}; {fmt.name} reaches {fmt.max:g}", evidence
    )


def _scales_agree(stored: _Stored, held: Tensor, right: Tensor) -> Tensor:
    """Return where stored scales are right within fp32's rounding, bool [N or 1, G]."""
    agree = (held - right).abs() <= SCALE_SLACK * right
    agree |= stored.weight.scheme.scaling.block_amax(stored.original) == 0      # any scale will do for zeros
    weight, scaling = stored.weight, stored.weight.scheme.scaling
    if not scaling.has_tensor_scale or weight.tensor_scale is None or bool(agree.all()):
        return agree
    # The tensor scale's last bit may move a block scale across a midpoint of E4M3.
    if not bool(((weight.tensor_scale / stored.oracle_scales.tensor_scale - 1).abs() <= SCALE_SLACK).all()):
        return agree
    ideal = scaling.block_amax(stored.original) / weight.scheme.format.max / weight.tensor_scale
    for nudge in (0.0, -SCALE_SLACK, SCALE_SLACK):
        agree |= scaling.scale_format.encode(ideal * (1 + nudge)) == weight.scales
    return agree
