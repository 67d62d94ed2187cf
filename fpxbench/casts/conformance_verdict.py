"""The verdict on a conversion: a kind from the closed list, and a message."""

from __future__ import annotations

import re

from fpxbench.casts.cast_findings import LOSES_INFINITY_AND_NAN, MISTAKE, clearest_example, loses_infinity_and_nan
from fpxbench.casts.cast_record import EXACT_PRODUCT, Behaviour, DifferingInputs, InputKind, unrounded_summary
from fpxbench.casts.conformance import Conformance
from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion
from fpxbench.casts.expected import FLUSHED, MISREAD
from fpxbench.records.kinds import Kind, sibling_kind
from fpxbench.records.verdict import Status, Verdict

INPUTS: dict[InputKind, tuple[str, str]] = {
    InputKind.NAN: ("NaN", "NaNs"),
    InputKind.NAN_PAYLOAD: ("NaN payload", "NaN payloads"),
    InputKind.INFINITY: ("infinity", "infinities"),
    InputKind.OVERFLOW: ("overflow", "overflows"),
    InputKind.NEGATIVE_ZERO: ("zero of the wrong sign", "zeros of the wrong sign"),
    InputKind.UNROUNDED_PRODUCT: ("unrounded product", "unrounded products"),
    InputKind.DOUBLE_ROUNDING: ("double rounding", "double roundings"),
    InputKind.TIE: ("tie", "ties"),
    InputKind.SUBNORMAL: ("subnormal", "subnormals"),
    InputKind.ROUNDING: ("rounding to the wrong side", "roundings to the wrong side"),
    InputKind.NO_SUCH_NUMBER: ("number that the target lacks", "numbers that the target lacks"),
    InputKind.CONSTANT: ("constant", "constants"),
    InputKind.OTHER: ("other input", "other inputs"),
}
"""Singular and plural, as messages use them."""

_OF_INPUTS = {
    InputKind.NAN: Kind.NAN_CODE_LOST,
    InputKind.NEGATIVE_ZERO: Kind.NEGATIVE_ZERO,
    InputKind.DOUBLE_ROUNDING: Kind.DOUBLE_ROUNDING,
    InputKind.SUBNORMAL: Kind.SUBNORMAL_WRONG,
    InputKind.ROUNDING: Kind.INACCURATE,
    InputKind.TIE: Kind.INACCURATE,
    InputKind.OTHER: Kind.INACCURATE,
}
_OF_OVERFLOW = {"nan": Kind.OVERFLOW_NAN, "infinity": Kind.OVERFLOW_INF, "saturate": Kind.SATURATED}
_OUTCOMES = {"nan": "NaN", "saturate": "the maximum"}
_LEADS_OF_INPUTS = {
    InputKind.NAN: "turns NaN into a number",
    InputKind.NEGATIVE_ZERO: "gives zeros of the wrong sign",
    InputKind.SUBNORMAL: "gets subnormals wrong",
}
_LEADS = {
    "nearest_away": (Kind.TIES_AWAY, "rounds ties away from zero"),
    "toward_zero": (Kind.TRUNCATED, "truncates"),
}
GIBBERISH_BELOW_PERCENT = 50.0
"""If the closest rounding mode explains fewer results than this, they have little to do with the inputs."""


def verdict_on(conversion: Conversion, conformance: Conformance) -> Verdict:
    """Return ``wrong`` if any difference is not permitted by the target's standard, else ``ok``."""
    wrong = [difference for difference in conformance.differences if not difference.permitted]
    if not wrong:
        return Verdict(status=Status.OK, summary=_conforms(conformance))
    kind, lead = _fault(conversion, conformance.behaviour, wrong)
    count = sum(difference.count for difference in wrong)
    what = "constants" if conversion.operation is CastOperation.FINFO else "inputs"
    seen = INPUTS[wrong[0].kind][wrong[0].count > 1] if len(wrong) == 1 else ", ".join(map(_counted, wrong))
    example = clearest_example(wrong, conversion.target)
    if conversion.operation is CastOperation.FINFO:
        shown = f"{example.input} is {example.got_value}, not {example.expected_value}"
    else:
        shown = (f"{example.input} ({example.input_value}) gives {example.got} ({example.got_value}), "
                 f"not {example.expected} ({example.expected_value})")
    return Verdict(
        status=Status.WRONG,
        kind=kind,
        evidence={MISTAKE: lead} if lead else {},
        summary=(f"{lead}: " if lead else "") + f"{count:,} of {conformance.inputs:,} {what} ({seen}); {shown}",
    )


def _conforms(conformance: Conformance) -> str:
    permitted = [_counted(difference) for difference in conformance.differences
                 if difference.kind not in (InputKind.NAN_PAYLOAD, InputKind.UNROUNDED_PRODUCT)]
    allowed = f"; as the format allows: {', '.join(permitted)}" if permitted else ""
    return unrounded_summary(conformance.inputs, conformance.differences) + allowed


def _counted(difference: DifferingInputs) -> str:
    return f"{difference.count:,} {INPUTS[difference.kind][difference.count > 1]}"


def _fault(conversion: Conversion, behaviour: Behaviour, wrong: list[DifferingInputs]) -> tuple[Kind | None, str]:
    """Return the kind, and how its message begins."""
    main = wrong[0].kind
    rounding = behaviour.rounding or ""
    if loses_infinity_and_nan(wrong):
        return Kind.NAN_CODE_LOST, LOSES_INFINITY_AND_NAN
    if behaviour.taken_as not in (None, EXACT_PRODUCT) or rounding.startswith(MISREAD):
        of_target = rounding.startswith(MISREAD)
        misread = conversion.target if of_target else conversion.source
        other = rounding.removeprefix(MISREAD) if of_target else behaviour.taken_as
        return sibling_kind(DTYPES[misread].format.specials), f"reads {misread} as {other}"
    if main in (InputKind.OVERFLOW, InputKind.INFINITY):
        outcomes = {"overflow": behaviour.overflow, "infinity": behaviour.infinity}
        kind = _OF_OVERFLOW.get(outcomes["overflow" if main is InputKind.OVERFLOW else "infinity"] or "")
        return kind, ", and ".join(
            f"{what} becomes {_outcome_text(outcome)}" for what, outcome in outcomes.items() if outcome
        )
    if main in (InputKind.TIE, InputKind.ROUNDING, InputKind.DOUBLE_ROUNDING, InputKind.SUBNORMAL, InputKind.OTHER):
        return _rounding_fault(main, rounding)
    return _OF_INPUTS.get(main), _LEADS_OF_INPUTS.get(main, "")


def _rounding_fault(main: InputKind, rounding: str) -> tuple[Kind | None, str]:
    if rounding.startswith("mixture"):
        share = float(rounding.rpartition(" on ")[2].rstrip("%"))
        gibberish = main is InputKind.OTHER and share < GIBBERISH_BELOW_PERCENT
        return Kind.GIBBERISH if gibberish else _OF_INPUTS[main], (
            f"no single rounding mode matches; the closest is {rounding.removeprefix('mixture: ').replace('_', ' ')}")
    if rounding.endswith(FLUSHED):
        return Kind.SUBNORMAL_FLUSHED, "flushes subnormals to zero"
    if " via " in rounding:
        first, _, between = rounding.partition(" via ")
        return (
            Kind.DOUBLE_ROUNDING,
            f"rounds twice, through {between.replace('_', ' ')}, then {first.replace('_', ' ')}",
        )
    if rounding in _LEADS:
        return _LEADS[rounding]
    return _OF_INPUTS[main], f"rounds {rounding.replace('_', ' ')}" if rounding else _LEADS_OF_INPUTS.get(main, "")


def _outcome_text(outcome: str) -> str:
    """Return ``NaN``, or of a mixture ``NaN or the maximum``."""
    parts = [re.sub(r" \d+$", "", part) for part in outcome.removeprefix("mixture: ").split(", ")]
    return " or ".join(_OUTCOMES.get(part, part) for part in parts)
