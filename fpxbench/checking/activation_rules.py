"""Find the rule by which an implementation quantizes its activation, if it declares only the format."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpxbench.checking import contract
from fpxbench.checking.activation_probe import (
    MANY_TOKENS,
    SHAPE,
    TOKENS,
    WIDE_SHAPE,
    ActivationProbe,
    Seen,
    activation_faults,
    description,
    find_fixed_scale,
    largest_magnitude,
    nan_threshold,
)
from fpxbench.checking.activation_windows import shift_faults, windowed_maximum
from fpxbench.checking.examination import Examination, is_refusal
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import compare
from fpxbench.implementation import Implementation
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.formats import FORMATS, Format, format_named
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling.nv import NVScaling
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.tensor_codec import encode
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

_GRANULARITIES = ("row", "tensor", "mx", "nv", "g128", "g64", "g32", "g16")
_UNDECLARED_FORMATS = ("e4m3fn", "e4m3fnuz", "e5m2", "int8", "e2m1")
_SAME_FACTOR, _QUIET = 2.0**-6, 2.0**-7
_MOST_EXPLAINED = 8
"""How many of the rules that a declared format may stand for are tried with the faults of weights."""


class Explanation(NamedTuple):
    """The fault of a quantizer, as a clause; `kind` is None if it has no name."""

    kind: Kind | None
    message: str
    evidence: dict[str, Any]


Explain = Callable[[ActivationRule, list[Seen], ActivationProbe, bool], Explanation | None]
"""(rule, readings of activations, probe, whether the rule is the declared one) -> the fault of a quantizer that should
follow the rule; None if none was found. The last reading is of codes."""
_OTHER_ROUNDINGS = (Rounding.TOWARD_ZERO, Rounding.DOWN, Rounding.NEAREST_AWAY)


def usual_rules(declared: str, scheme: Scheme) -> list[ActivationRule]:
    """Return the rules that the declared format of activations may stand for: with the granularity of the weight's
    `scheme` first, then with others, then with scale modifiers."""
    own = [scheme.scaling.name] if scheme.quantized else []
    fmt = format_named(declared)
    sibling = fmt.sibling      # FN usually, FNUZ on gfx942
    formats = [fmt.name] + ([sibling.name] if sibling is not None and sibling.name in FORMATS else [])
    names = [f"{each}-{name}" for each in formats for name in dict.fromkeys([*own, *_GRANULARITIES])]
    modified = [f"{name}.{modifier}" for name in names for modifier in scheme_named(name).scaling.modifiers()
                if "." not in name]
    return [ActivationRule(scheme_named(name).name) for name in names + modified]


def find_rule(implementation: Implementation, operands: Operands, explain: Explain | None = None) -> Verdict | None:
    """Set `operands.rule` to the rule of the scheme or of the implementation, or to the usual rule that is found.

    The rule must predict every element of a probe activation, read through a weight of ones. Return a verdict if none
    does, with the fault if it is known; `explain` knows more faults.
    """
    scheme = scheme_named(operands.case.scheme)
    declared = ActivationRule(scheme.activation.name) if scheme.activation is not None \
        else implementation.activation_rule
    operands.rule = declared
    if operands.case.m == 0 or (declared is None and implementation.activation_format is None):
        return None
    rules = [declared] if declared is not None else usual_rules(implementation.activation_format, scheme)
    probed = _probe(implementation, operands)
    if probed is None:
        operands.rule = rules[0]
        operands.rule_not_probed = "any of it apart from the product: the shape of its probe is refused"
        return None
    probe, first = probed
    if not probe.weight_is_read:
        operands.rule = rules[0]
        operands.rule_not_probed = "any of it apart from the product: a weight of ones is not read as ones"
        return _without_the_weight(probe, rules, first, explain) if explain is not None else None
    # The largest element is first in one activation and last in the other.
    seen = probe.see((0.3 * probe.activation("second activation").float()).flip(1).to(first.x.dtype))
    fitting = [rule for rule in rules if _follows(rule, first) and _follows(rule, seen)]
    # In both, a large token determines the scale of all tokens.
    quiet = probe.see((_QUIET * seen.x.float()).to(seen.x.dtype))
    if not fitting and (rule := _off_by_a_factor(rules, first, seen, quiet)) is not None:
        operands.rule = rule
        return None
    coded = _codes_seen(probe, (fitting or rules)[0])
    if fitting and scheme_named(fitting[0].scheme).scaling.block_rows is None and not _follows(fitting[0], quiet):
        return _deviation(probe, fitting[:1], first, quiet, coded, explain)
    if fitting and _follows(fitting[0], coded):
        operands.rule = fitting[0]
        return None
    return _deviation(probe, fitting[:1] or rules, first, seen, coded, explain)


def not_asked(operands: Operands) -> str | None:
    """Return what the probe of an activation's quantizer did not show; None without such a quantizer."""
    if operands.rule is None or operands.rule_not_probed is not None:
        return operands.rule_not_probed
    fmt = scheme_named(operands.rule.scheme).format
    ties = "" if isinstance(fmt, Format) and not fmt.is_integer else "halfway values of integers; "
    return f"{ties}floors under its scales, and scales below those of its probe (tokens of magnitude 2^-5)"


def note_not_asked(examination: Examination, operands: Operands) -> None:
    """Note in `examination` what `not_asked` returns."""
    if (left_out := not_asked(operands)) is not None:
        examination.not_asked["activation's quantizer"] = left_out


def _off_by_a_factor(rules: list[ActivationRule], first: Seen, seen: Seen, quiet: Seen) -> ActivationRule | None:
    """Return the rule whose values are off by the same factor for every activation; else None. The factor may be the
    weight's as well, and is diagnosed from the product. A wrong tensor scale would differ between activations."""
    for rule in rules:
        of_all = scheme_named(rule.scheme).scaling.block_rows is None
        readings = (first, seen, quiet) if of_all else (first, seen)
        factors = [seen.factor(rule.values(seen.x)) for seen in readings]
        if factors[0] and all(abs(factor / factors[0] - 1) < _SAME_FACTOR for factor in factors) \
                and all(_follows(rule, seen, factors[0]) for seen in readings):
            return rule
    return None


def _codes_seen(probe: ActivationProbe, rule: ActivationRule) -> Seen:
    """Return the reading of an activation of all codes and all midpoints, under scales of 1.

    Midpoints are ties there, unless the format's maximum times its reciprocal is not 1 in fp32. Integers may also be
    rounded away from zero.
    """
    scheme = scheme_named(rule.scheme)
    fmt = scheme.format
    exact = scheme.scaling.scale_format.coded or float(torch.tensor(fmt.max) * torch.tensor(1 / fmt.max)) == 1.0
    decided = exact and isinstance(fmt, Format) and not fmt.is_integer and rule.scale is None
    return replace(probe.see(probe.codes(rule)), ties_of=rule.scheme if decided else None)


def _probe(implementation: Implementation, operands: Operands) -> tuple[ActivationProbe, Seen] | None:
    """Return the probe and the reading of its first activation, which may fix a scale; None if its shape is refused."""
    try:
        for tokens, shape in ((TOKENS, SHAPE), (MANY_TOKENS, WIDE_SHAPE)):
            probe = ActivationProbe(implementation, operands, tokens=tokens, shape=shape)
            first = probe.see(probe.activation("first activation"))
            if probe.read_weight(first.loudness):
                break
        return probe, first
    except Exception as error:
        if not is_refusal(error):
            raise
        traceback.print_exc()
        return None


def _without_the_weight(probe: ActivationProbe, rules: list[ActivationRule], first: Seen,
                        explain: Explain) -> Verdict | None:
    """Return the verdict on an activation if the weight of ones is not known to be read: on faults that a weight cannot
    cause."""
    if first.only_zeros_are_numbers:
        rule = rules[0]
        readings = [first, _codes_seen(probe, rule)]
        if (tiny := probe.tiny(rule)) is not None:
            readings.insert(0, probe.see(tiny))
        found = explain(rule, readings, probe, len(rules) == 1)
        kind, what, evidence = found or Explanation(None, "no known fault explains it", {})
        return Verdict(status=Status.NONFINITE, kind=kind, evidence={"activation_rule": str(rule)} | evidence,
                       summary="every token that holds a number becomes NaN, and one of zeros does not, so that the"
                               f" weight is finite: the activation is quantized to {rule.scheme}, but {what}")
    if not probe.columns_are_read(first.loudness):
        return None
    for rule in rules[:_MOST_EXPLAINED]:
        if (found := explain(rule, [], probe, len(rules) == 1)) is not None:
            return _explained(rule, found)
    return None


def _explained(rule: ActivationRule, found: Explanation) -> Verdict:
    verdict = _verdict(found.kind or Kind.INACCURATE, rule,
                       f"the activation is quantized to {rule.scheme}, but, its tokens taken for rows of a weight,"
                       f" {found.message}")
    return verdict.model_copy(update={"evidence": verdict.evidence | found.evidence})


def _follows(rule: ActivationRule, seen: Seen, factor: float = 1.0) -> bool:
    def predicted(x: Tensor) -> tuple[Tensor, Tensor | None]:
        values, slack = rule.quantized(x)
        return values * factor, None if seen.ties_of == rule.scheme else slack * abs(factor)

    several_tokens_a_scale = scheme_named(rule.scheme).scaling.block_rows not in (1, None)
    if not several_tokens_a_scale and seen.rules_out(*predicted(seen.few.x)):
        return False
    return seen.fits(*predicted(seen.x))


def _deviation(probe: ActivationProbe, rules: list[ActivationRule], first: Seen, seen: Seen, coded: Seen,
               explain: Explain | None) -> Verdict:
    """Return the verdict on an activation that none of `rules` predicts: a known fault, or a description."""
    declared = rules[0] if len(rules) == 1 else scheme_named(rules[0].scheme).format.name
    if (kept := seen.without_zeros()) is not None:      # NaN in a token of zeros does not affect other tokens
        for rule in rules:
            if _follows(rule, kept):
                return _verdict(Kind.ZERO_BLOCK, rule, f"the activation is quantized to {rule.scheme}, but a token of"
                                                       " zeros becomes NaN")
        verdict = _deviation(probe, rules, first.without_zeros() or first, kept, coded, explain)
        return verdict.model_copy(update={"summary": f"{verdict.summary}; besides, a token of zeros becomes NaN"})
    if (fixed := _fixed(probe, rules, first, seen)) is not None:
        return fixed
    for rounding in _OTHER_ROUNDINGS:
        for rule in (replace(usual, rounding=rounding) for usual in rules):
            if all(_follows(rule, one) for one in (seen, first, coded)):
                return _verdict(
                    Kind.TIES_AWAY if rounding is Rounding.NEAREST_AWAY else Kind.TRUNCATED, rule,
                    f"the activation is quantized to {rule.scheme} with rounding {rounding.value}, not to the nearest."
                    " If that is meant, declare it (`activation_rule`)")
    for rule in rules:
        for fault in (*activation_faults(rule), *shift_faults(rule)):
            if seen.fits(fault.values(seen.x)) and first.fits(fault.values(first.x)) and (
                    coded.ties_of != rule.scheme or coded.fits(fault.values(coded.x))):
                return _verdict(fault.kind, rule, f"the activation is quantized to {rule.scheme}, but {fault.message}")
    others = [ActivationRule(scheme_named(f"{fmt}-{name}").name) for fmt in _UNDECLARED_FORMATS
              for name in _GRANULARITIES]
    for rule in others:
        if all(_follows(rule, one) for one in (seen, first, coded)):
            return _verdict(Kind.ACTIVATION_QUANTIZED, rule,
                            f"the activation is quantized to {rule}, declared is {declared}: declare what is meant"
                            " (`activation_rule`)")
    for rule in rules[:_MOST_EXPLAINED] if not seen.unchanged else ():
        if (window := windowed_maximum(rule, [seen, first])) is not None:
            return _verdict(Kind.SATURATED, rule, f"the activation is quantized to {rule.scheme}, but its scales are"
                                                  f" those of {window} only: what is larger saturates")
    unnamed = ""
    for rule in rules[:_MOST_EXPLAINED] if explain is not None and not seen.unchanged else ():
        if (found := explain(rule, [seen, coded], probe, len(rules) == 1)) is None:
            continue
        if found.kind is not None:
            return _explained(rule, found)
        unnamed = unnamed or f" ({found.message})"
    what = "is not quantized" if seen.unchanged else f"is quantized by no known rule: {description(seen)}{unnamed}"
    return _verdict(Kind.INACCURATE, None, f"the activation {what}; declared is {declared}. If another rule is meant,"
                                           " declare it (`activation_rule`)")


def _verdict(kind: Kind, rule: ActivationRule | None, summary: str) -> Verdict:
    evidence = {} if rule is None else {"activation_rule": str(rule)}
    return Verdict(status=Status.WRONG, kind=kind, evidence=evidence, summary=summary)


def _fixed(probe: ActivationProbe, rules: list[ActivationRule], first: Seen, seen: Seen) -> Verdict | None:
    """Return the verdict if an undeclared fixed scale is used for every activation; else None."""
    loud, louder = (probe.see((by * seen.x.float()).to(seen.x.dtype)) for by in (32, 128))
    if any(rule.scale is not None for rule in rules):
        return None
    for rule in rules:
        if (tensor := _tensor_scale_of(rule, first, seen)) is not None:
            return _stale(*tensor)
    top = largest_magnitude(loud, louder)
    lost = top is None and bool(louder.seen.isnan().any())
    top = nan_threshold(probe) if lost else top
    if top is None:
        return None
    for name in dict.fromkeys(scheme_named(rule.scheme).format.name for rule in rules):
        fmt = format_named(name)
        fixed = find_fixed_scale(seen if lost else louder, fmt, top, lost)
        if fixed is None:
            continue
        scale, reach = fixed
        if abs(scale * fmt.max / float(first.x.float().abs().amax()) - 1) < 2.0**-6:
            return _stale(scale, float(louder.x.float().abs().amax()) / fmt.max)
        return _verdict(
            Kind.OVERFLOW_NAN if lost else Kind.SATURATED, ActivationRule(f"{name}-tensor", scale=scale),
            f"the activation is quantized to {name} under the fixed scale {scale:.3g}, whatever it holds: what lies"
            f" past {reach:.3g} {'becomes NaN' if lost else 'saturates'}. If a fixed scale is meant, declare it"
            " (`activation_rule`)")
    return None


def _tensor_scale_of(rule: ActivationRule, first: Seen, seen: Seen) -> tuple[float, float] | None:
    """Return the tensor scales of the first call and of this activation, if the former was used; else None."""
    scheme = scheme_named(rule.scheme)
    if not isinstance(scheme.scaling, NVScaling):
        return None
    x = seen.x.float()
    stale = scheme.scaling.choose(x, scheme.format, shared_amax=first.x.float().abs().amax())
    own = scheme.scaling.choose(x, scheme.format)
    values = scheme.dequantize(encode(scheme.scaling.divide(x, stale), scheme.format), stale)
    assert stale.tensor_scale is not None and own.tensor_scale is not None
    return (float(stale.tensor_scale), float(own.tensor_scale)) if seen.fits(values) else None


def _stale(scale: float, own: float) -> Verdict:
    return Verdict(
        status=Status.WRONG, kind=Kind.STALE_ACTIVATION_SCALE,
        evidence={"scale": repr(scale), "scale_of_this_activation": repr(own)},
        summary=f"the activation is scaled by {scale:.6g}, the scale of the first call's: each call's own activation"
                " decides its scale, unless a fixed one is declared (`activation_rule`)")


def undeclared_rule(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Return the verdict if the activation is quantized by a known rule without a declaration; else None."""
    if operands.rule is not None or operands.case.m == 0:
        return None
    probed = _probe(implementation, operands)
    if probed is None or not probed[0].weight_is_read or probed[1].only_multiplied:
        return None
    seen = probed[1]
    scheme = scheme_named(operands.case.scheme)
    for fmt in _UNDECLARED_FORMATS:
        for rule in usual_rules(fmt, scheme):
            if _follows(rule, seen):
                return _verdict(
                    Kind.ACTIVATION_QUANTIZED, rule,
                    f"the activation is quantized to {rule}, where {operands.case.scheme} multiplies 16-bit"
                    f" activations: declare it (`activation_rule`), or take the scheme"
                    f" {operands.case.scheme}+{rule.scheme}")
    return None


def stale_scale(implementation: Implementation, operands: Operands, purpose: object) -> Verdict | None:
    """Return the verdict if a wrong product used the scale of an earlier activation; else None.

    `purpose` names the activation whose product was wrong.
    """
    if operands.rule is None or operands.rule.scale is not None:
        return None
    scheme, found = scheme_named(operands.rule.scheme), operands.rule
    x = operands.activation(purpose)
    y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
    fresh = compare(y, operands.reference(x, implementation))
    own = float(x.float().abs().amax()) / scheme.format.max
    for earlier in range(purpose if isinstance(purpose, int) else 1):
        scale = float(operands.activation(earlier).float().abs().amax()) / scheme.format.max
        operands.rule = ActivationRule(f"{scheme.format.name}-tensor", found.rounding, scale)
        stale = compare(y, operands.reference(x, implementation))
        operands.rule = found
        if stale.within and stale.relative_error <= fresh.relative_error / 2:
            return _stale(scale, own)
    return None
