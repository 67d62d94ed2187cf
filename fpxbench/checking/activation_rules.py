"""Find the rule by which an implementation quantizes its activation, where it declares the format alone."""

from __future__ import annotations

from torch import Tensor

from fpxbench.checking import contract
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import Comparison, compare
from fpxbench.implementation import Implementation
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.formats import FORMATS, format_named
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

_GRANULARITIES = ("row", "tensor", "mx", "nv", "g128", "g64", "g32", "g16")
_UNDECLARED_FORMATS = ("e4m3fn", "e4m3fnuz", "e5m2", "int8", "e2m1")
_FIRST = "activation rule"      # the purpose of the first activation that a case multiplies
_OTHER_ROUNDINGS = (Rounding.TOWARD_ZERO, Rounding.DOWN, Rounding.NEAREST_AWAY)


def usual_rules(implementation: Implementation, operands: Operands) -> list[ActivationRule]:
    """Return the rules that the declared `activation_format` may stand for, the weight's own granularity first."""
    scheme = scheme_named(operands.case.scheme)
    own = [scheme.scaling.name] if scheme.quantized else []
    declared = format_named(implementation.activation_format)
    sibling = declared.sibling      # FN here, FNUZ on gfx942
    formats = [declared.name] + ([sibling.name] if sibling is not None and sibling.name in FORMATS else [])
    return [ActivationRule(scheme_named(f"{fmt}-{name}").name) for fmt in formats
            for name in dict.fromkeys([*own, *_GRANULARITIES])]


def find_rule(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Set `operands.rule` to the rule of the scheme or of the implementation, or find it.

    Found is the usual rule that explains a product of a random activation. Return a verdict where none does, which
    names a rule with another rounding if that one does.
    """
    activation = scheme_named(operands.case.scheme).activation
    declared = ActivationRule(activation.name) if activation is not None else implementation.activation_rule
    if declared is not None or implementation.activation_format is None or operands.case.m == 0:
        operands.rule = declared
        return None
    x = operands.activation(_FIRST)
    y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
    tried: list[tuple[Comparison, ActivationRule]] = []
    for rule in usual_rules(implementation, operands):
        operands.rule = rule
        tried.append((compare(y, operands.reference(x, implementation)), rule))
    # Several may lie inside the worst-case bound: the right one has by far the smallest error.
    best, operands.rule = min(tried, key=lambda pair: pair[0].relative_error)
    if best.within:
        return None
    verdict = _by_another_rounding(implementation, operands, x, y)
    return verdict or Verdict(
        status=Status.WRONG if best.finite else Status.NONFINITE,
        evidence={
            "activation_rules_tried": [str(rule) for _, rule in tried],
            "relative_error": repr(best.relative_error),
        },
        summary=f"quantizes the activation to {implementation.activation_format} by none of the usual rules; nearest"
        f" is {operands.rule}: {best.message()}. If another one is meant, declare it (`activation_rule`)",
    )


def _by_another_rounding(implementation: Implementation, operands: Operands, x: Tensor, y: Tensor) -> Verdict | None:
    """Return the verdict that names the usual rule with another rounding that explains y [M, N] best, if one does."""
    nearest = operands.rule
    tried = []
    for rounding in _OTHER_ROUNDINGS:
        for usual in usual_rules(implementation, operands):
            operands.rule = ActivationRule(usual.scheme, rounding)
            tried.append((compare(y, operands.reference(x, implementation)), operands.rule))
    operands.rule = nearest
    best, rule = min(tried, key=lambda pair: pair[0].relative_error)
    if not best.within:
        return None
    return Verdict(
        status=Status.WRONG,
        kind=Kind.TIES_AWAY if rule.rounding is Rounding.NEAREST_AWAY else Kind.TRUNCATED,
        evidence={"activation_rule": str(rule)},
        summary=f"the activation is quantized to {rule.scheme} with rounding {rule.rounding.value}, not to the "
                f"nearest. If"
        " that is meant, declare it (`activation_rule`)",
    )


def undeclared_rule(implementation: Implementation, operands: Operands, purpose: object) -> Verdict | None:
    """Return the verdict if a wrong product is right for an activation that was quantized, which nothing declares.

    `purpose` names the activation whose product was wrong.
    """
    if operands.rule is not None:
        return None
    x = operands.activation(purpose)
    y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
    tried: list[tuple[Comparison, ActivationRule]] = []
    for fmt in _UNDECLARED_FORMATS:
        for granularity in _GRANULARITIES:
            operands.rule = ActivationRule(scheme_named(f"{fmt}-{granularity}").name)
            tried.append((compare(y, operands.reference(x, implementation)), operands.rule))
    operands.rule = None
    unrounded = compare(y, operands.reference(x, implementation))
    best, rule = min(tried, key=lambda pair: pair[0].relative_error)
    if not best.within or best.relative_error > unrounded.relative_error / 2:
        return None
    return Verdict(
        status=Status.WRONG,
        kind=Kind.ACTIVATION_QUANTIZED,
        evidence={"activation_rule": str(rule), "relative_error": repr(unrounded.relative_error)},
        summary=f"the activation is quantized to {rule}, where {operands.case.scheme} multiplies 16-bit activations: "
                f"declare it (`activation_rule`), or take the scheme {operands.case.scheme}+{rule.scheme}",
    )


def stale_scale(implementation: Implementation, operands: Operands, purpose: object) -> Verdict | None:
    """Return the verdict if a wrong product is that of an activation under the scale of an earlier one; else None.

    `purpose` names the activation whose product was wrong.
    """
    if operands.rule is None or operands.rule.scale is not None:
        return None
    scheme = scheme_named(operands.rule.scheme)
    x, first = operands.activation(purpose), operands.activation(_FIRST)
    y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
    found, scale = operands.rule, float(first.float().abs().amax()) / scheme.format.max
    operands.rule = ActivationRule(f"{scheme.format.name}-tensor", found.rounding, scale)
    stale = compare(y, operands.reference(x, implementation))
    operands.rule = found
    fresh = compare(y, operands.reference(x, implementation))
    if not stale.within or stale.relative_error > fresh.relative_error / 2:
        return None
    return Verdict(
        status=Status.WRONG,
        kind=Kind.STALE_ACTIVATION_SCALE,
        evidence={
            "scale": repr(scale),
            "scale_of_this_activation": repr(float(x.float().abs().amax()) / scheme.format.max),
        },
        summary=f"the activation is scaled by {scale:.6g}, the scale of the first call's: each call's own activation "
                f"decides"
        " its scale, unless a fixed one is declared (`activation_rule`)",
    )
