"""Findings from a set of records: one for each fault or refusal, over all the dtypes and engines that show it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from fpxbench.casts.cast_record import EXACT_PRODUCT, CastRecord, DifferingInputs, Example, InputKind
from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion, Engine
from fpxbench.records.verdict import SEVERITY, SIGNS, Status

MISTAKE = "mistake"
"""The key of the evidence that says what a wrong conversion does, without counts."""

WHAT: dict[CastOperation, str] = {
    CastOperation.CAST: "cast",
    CastOperation.CAST_RTZ: "cast toward zero",
    CastOperation.SCALE_THEN_CAST: "scale, then cast",
    CastOperation.FINFO: "torch.finfo",
    CastOperation.SHIFT_LEFT: "<< tensor",
    CastOperation.SHIFT_RIGHT: ">> tensor",
    CastOperation.AND: "& tensor",
    CastOperation.OR: "| tensor",
    CastOperation.XOR: "^ tensor",
    CastOperation.NOT: "~",
    CastOperation.SHIFT_LEFT_SCALAR: "<< int",
    CastOperation.SHIFT_RIGHT_SCALAR: ">> int",
    CastOperation.AND_SCALAR: "& int",
}
"""Operations as messages name them."""

LOSES_INFINITY_AND_NAN = "turns infinity and NaN into finite numbers"
_NOT_FINITE = ("nan", "inf", "-inf")
_ORDER = {name: place for place, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class CastFinding:
    """One fault or refusal.

    cause : what happens, without the counts
    records : all that show it, the one with the most differing inputs first
    """

    status: Status
    cause: str
    records: tuple[CastRecord, ...]

    @property
    def headline(self) -> str:
        return f"{SIGNS[self.status]} {self.records[0].verdict.headline}"

    @property
    def runs_on(self) -> list[str]:
        """``eager/cpu``, …"""
        return engines_of(record.conversion for record in self.records)

    @property
    def what(self) -> str:
        """``cast fp64 → e4m3fn, e5m2; fp32 → e8m0``."""
        return operations_of(record.conversion for record in self.records)

    @property
    def only_interpreted(self) -> bool:
        """Whether only Triton's interpreter shows it, which is for tests."""
        return all(record.conversion.engine is Engine.TRITON_INTERPRETER for record in self.records)

    @property
    def counts(self) -> str:
        """``252 of 391,560 inputs``: of the record with the most."""
        worst = self.records[0]
        wrong = sum(difference.count for difference in worst.wrong)
        if not wrong:
            return ""
        noun = "constants" if worst.conversion.operation is CastOperation.FINFO else "inputs"
        return f"{'up to ' if len(self.records) > 1 else ''}{wrong:,} of {worst.inputs:,} {noun}"

    @property
    def example(self) -> str:
        """``fp64 0x3f50000000000001 (0.0009765625000000002) gives 0x00 (0), not 0x01 (0.001953125)``."""
        worst = self.records[0]
        if not worst.wrong:
            return ""
        shown = clearest_example(worst.wrong, worst.conversion.target)
        if worst.conversion.operation is CastOperation.FINFO:
            return f"{shown.input_value} is {shown.got_value}, not {shown.expected_value}"
        return (
            f"{worst.conversion.source} {shown.input} ({shown.input_value}) gives {worst.conversion.target} "
            f"{shown.got} ({shown.got_value}), not {shown.expected} ({shown.expected_value})"
        )


def loses_infinity_and_nan(wrong: Iterable[DifferingInputs]) -> bool:
    """Return whether the whole fault is that infinity becomes a finite number, and NaN a number."""
    by_kind = {one.kind: one for one in wrong}
    return by_kind.keys() == {InputKind.INFINITY, InputKind.NAN} and all(
        example.got_value not in _NOT_FINITE for example in by_kind[InputKind.INFINITY].examples)


def clearest_example(wrong: Iterable[DifferingInputs], target: str) -> Example:
    """Return an example of wrong inputs that no rule permits, infinities first.

    A NaN past the maximum may be permitted by itself, and wrong only beside others that saturate.
    """
    past = (InputKind.OVERFLOW, InputKind.INFINITY)
    candidates = [(one.kind, example) for one in wrong for example in one.examples]
    open_to: tuple[str, ...] = ()
    fmt = DTYPES[target].format
    if fmt is not None and any(kind in past for kind, _ in candidates):     # an integer has neither
        open_to = ("inf", "-inf") if fmt.has_infinity else ("nan",)
    never = [(kind, example) for kind, example in candidates if kind not in past or example.got_value not in open_to]
    return next((example for kind, example in never if kind is InputKind.INFINITY), (never or candidates)[0][1])


def engines_of(conversions: Iterable[Conversion]) -> list[str]:
    """Return engines and devices, each once: ``eager/cpu``, …"""
    return list(dict.fromkeys(conversion.runs_on for conversion in conversions))


def operations_of(conversions: Iterable[Conversion]) -> str:
    """Return operations and dtypes, each once: ``cast fp64 → e4m3fn, e5m2; fp32 → e8m0``, ``~ uint16, uint32``."""
    by_operation: dict[CastOperation, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for conversion in conversions:
        by_operation[conversion.operation][conversion.source].add(conversion.target)
    parts = []
    for operation, sources in by_operation.items():
        by_targets: dict[str, list[str]] = defaultdict(list)
        for source in sorted(sources, key=_ORDER.__getitem__):
            targets = sources[source]
            by_targets["" if targets == {source} else ", ".join(sorted(targets, key=_ORDER.__getitem__))].append(source)
        parts.append(f"{WHAT[operation]} " + "; ".join(
            ", ".join(sources) + (f" → {targets}" if targets else "") for targets, sources in by_targets.items()))
    return "; ".join(parts)


def find(records: Iterable[CastRecord]) -> list[CastFinding]:
    """Return a finding for each cause of a status other than `ok`, worst first."""
    groups: dict[tuple, list[CastRecord]] = defaultdict(list)
    for record in records:
        if record.verdict.status is not Status.OK:
            conversion = record.conversion
            operation = "bits" if conversion.operation.on_bits else conversion.operation
            groups[record.verdict.status, record.verdict.kind, _cause(record), operation, conversion.what].append(
                record
            )
    # Causes that the same engines show are one finding.
    together: dict[tuple, list[CastRecord]] = defaultdict(list)
    for (status, kind, cause, operation, _), group in groups.items():
        together[status, kind, cause, operation, tuple(record.conversion.runs_on for record in group)] += group
    found = [
        CastFinding(status, cause, tuple(sorted(group, key=lambda record: -_wrong_share(record))))
        for (status, _, cause, _, _), group in together.items()
    ]
    return sorted(
        found, key=lambda finding: (SEVERITY[finding.status], finding.only_interpreted, -len(finding.records))
    )


@dataclass(frozen=True)
class Disagreement:
    """Engines that differ in what the target's format leaves open, so that each of them conforms.

    ways : engines by what values past the maximum become (``nan``, ``saturate, but infinity: nan``), or by how a
        product is rounded
    about : the aspect
    note : what else a user should know
    """

    ways: dict[str, tuple[str, ...]]
    conversions: tuple[Conversion, ...]
    about: str = "past the maximum"
    note: str = "all round alike"

    @property
    def message(self) -> str:
        """``cast fp32, bf16 → e4m3fn: past the maximum nan in eager/cpu, eager/cuda; saturate in compiled/cuda (all
        round alike)``."""
        ways = "; ".join(f"{how} in {', '.join(where)}" for how, where in self.ways.items())
        return f"{operations_of(self.conversions)}: {self.about} {ways} ({self.note})"


def overflows(records: Iterable[CastRecord]) -> dict[str, dict[str, list[str]]]:
    """Return what values past the maximum become: engines by outcome (``saturate, but infinity: nan``) by target."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        how, conversion = _overflow(record), record.conversion
        if how and conversion.runs_on not in found[conversion.target][how]:
            found[conversion.target][how].append(conversion.runs_on)
    return found


def disagreements(records: Iterable[CastRecord]) -> list[Disagreement]:
    """Return casts whose results differ between engines, the most widespread first. Triton's interpreter, for tests, is
    left out."""
    records = list(records)
    of_products = partial(
        Disagreement,
        about="the product is",
        note="nearer to the exact value where it is not rounded; torch._inductor.config.emulate_precision_casts = True"
        " rounds it",
    )
    return _by_ways(records, _overflow, Disagreement) + _by_ways(records, _product_kept, of_products)


def _by_ways(records: list[CastRecord], way_of: Callable[[CastRecord], str | None],
             disagreement: Callable[..., Disagreement]) -> list[Disagreement]:
    ways: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    first: dict[str, Conversion] = {}
    for record in records:
        how, conversion = way_of(record), record.conversion
        if how and conversion.engine is not Engine.TRITON_INTERPRETER:
            first.setdefault(conversion.what, conversion)
            ways[conversion.what][how].append(conversion.runs_on)
    together: dict[tuple, list[Conversion]] = defaultdict(list)
    for name, by_way in ways.items():
        if len(by_way) > 1:
            together[tuple((how, tuple(where)) for how, where in by_way.items())].append(first[name])
    found = [disagreement(dict(by_way), tuple(conversions)) for by_way, conversions in together.items()]
    return sorted(found, key=lambda disagreement: -len(disagreement.conversions))


def _overflow(record: CastRecord) -> str | None:
    """Return what a plain cast makes of values past the maximum; None for other operations, and where it is not always
    the same."""
    overflow, infinity = record.behaviour.overflow, record.behaviour.infinity
    if record.conversion.operation is not CastOperation.CAST or not overflow or overflow.startswith("mixture"):
        return None
    return overflow if infinity in (None, overflow) else f"{overflow}, but infinity: {infinity}"


def _product_kept(record: CastRecord) -> str | None:
    """Return how the product of a scale and a number is rounded before it is cast; None without a product, and where
    its cast is wrong."""
    if record.conversion.operation is not CastOperation.SCALE_THEN_CAST or record.verdict.status is not Status.OK:
        return None
    return "not rounded before the cast" if record.behaviour.taken_as == EXACT_PRODUCT else "rounded to its dtype first"


def _cause(record: CastRecord) -> str:
    """Return what happens, without the parts that differ between dtypes."""
    verdict = record.verdict
    if loses_infinity_and_nan(record.wrong):
        return LOSES_INFINITY_AND_NAN
    message = str(verdict.evidence.get(MISTAKE, verdict.summary if verdict.status is not Status.WRONG else ""))
    return re.sub(r"'UInt\d+'", "'UInt*'", re.sub(r" on [\d.]+%", "", message))


def _wrong_share(record: CastRecord) -> float:
    return sum(difference.count for difference in record.wrong) / record.inputs if record.inputs else 0.0
