"""What a set of records comes to: one finding for each mistake or refusal, over all the dtypes and engines that show it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fpxbench.numerics.conversion import Operation
from fpxbench.numerics.record import NumericsRecord
from fpxbench.verdict import SEVERITY, SIGNS, Status

MISTAKE = "mistake"
"""The evidence that says what a wrong conversion does, apart from its figures."""

WHAT: dict[Operation, str] = {
    Operation.CAST: "cast", Operation.CAST_RTZ: "cast toward zero", Operation.SCALE_THEN_CAST: "scale, then cast", Operation.FINFO: "torch.finfo",
    Operation.SHIFT_LEFT: "<< tensor", Operation.SHIFT_RIGHT: ">> tensor", Operation.AND: "& tensor", Operation.OR: "| tensor",
    Operation.XOR: "^ tensor", Operation.NOT: "~", Operation.SHIFT_LEFT_SCALAR: "<< int", Operation.SHIFT_RIGHT_SCALAR: ">> int",
    Operation.AND_SCALAR: "& int",
}
"""Operations as people write them."""


@dataclass(frozen=True)
class Finding:
    """One mistake or refusal.

    mistake : what happens, in words, without figures
    records : all that show it, the one with the most differing inputs first
    """

    status: Status
    mistake: str
    records: tuple[NumericsRecord, ...]

    @property
    def headline(self) -> str:
        return f"{SIGNS[self.status]} {self.records[0].verdict.headline}"

    @property
    def runs_on(self) -> list[str]:
        """``eager/cpu``, …"""
        return list(dict.fromkeys(record.conversion.runs_on for record in self.records))

    @property
    def what(self) -> str:
        """``cast fp64 → e4m3fn, e5m2; fp32 → e8m0``."""
        by_operation: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for record in sorted(self.records, key=lambda record: record.started_at):
            conversion = record.conversion
            targets = by_operation[WHAT[conversion.operation]][conversion.source]
            if conversion.target not in targets:
                targets.append(conversion.target)
        parts = []
        for operation, sources in by_operation.items():
            if all(targets == [source] for source, targets in sources.items()):
                parts.append(f"{operation} {', '.join(sources)}")
            else:
                by_targets: dict[tuple[str, ...], list[str]] = defaultdict(list)
                for source, targets in sources.items():
                    by_targets[tuple(targets)].append(source)
                parts.append(f"{operation} " + "; ".join(f"{', '.join(sources)} → {', '.join(targets)}" for targets, sources in by_targets.items()))
        return "; ".join(parts)

    @property
    def figures(self) -> str:
        """``252 of 391,560 inputs``: of the worst."""
        worst = self.records[0]
        wrong = sum(difference.count for difference in worst.differences if not difference.permitted)
        if not wrong:
            return ""
        noun = "constants" if worst.conversion.operation is Operation.FINFO else "inputs"
        return f"{'up to ' if len(self.records) > 1 else ''}{wrong:,} of {worst.inputs:,} {noun}"

    @property
    def example(self) -> str:
        """``fp64 0x3f50000000000001 (0.0009765625000000002) gives 0x00 (0), not 0x01 (0.001953125)``."""
        worst = self.records[0]
        shown = next((difference.examples[0] for difference in worst.differences if not difference.permitted), None)
        if shown is None:
            return ""
        if worst.conversion.operation is Operation.FINFO:
            return f"{shown.input_value} is {shown.got_value}, not {shown.expected_value}"
        return (f"{worst.conversion.source} {shown.input} ({shown.input_value}) gives {worst.conversion.target} {shown.got} ({shown.got_value}), "
                f"not {shown.expected} ({shown.expected_value})")


def find(records: Iterable[NumericsRecord]) -> list[Finding]:
    """Everything that is not `ok`, worst first, one finding a cause."""
    groups: dict[tuple, list[NumericsRecord]] = defaultdict(list)
    for record in records:
        if record.verdict.status is not Status.OK:
            conversion = record.conversion
            operation = "bits" if conversion.operation.on_bits else conversion.operation
            groups[record.verdict.status, record.verdict.kind, _cause(record), operation, conversion.what].append(record)
    # Causes that the same engines show are one finding.
    together: dict[tuple, list[NumericsRecord]] = defaultdict(list)
    for (status, kind, cause, operation, _), group in groups.items():
        together[status, kind, cause, operation, tuple(record.conversion.runs_on for record in group)] += group
    found = [
        Finding(status, cause, tuple(sorted(group, key=lambda record: -_wrong_share(record))))
        for (status, _, cause, _, _), group in together.items()
    ]
    return sorted(found, key=lambda finding: (SEVERITY[finding.status], -len(finding.records)))


def overflows(records: Iterable[NumericsRecord]) -> dict[str, dict[str, list[str]]]:
    """What values past the maximum become, by target: how (``saturate, infinity nan``), and who does so."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        behaviour, conversion = record.behaviour, record.conversion
        if conversion.operation is Operation.CAST and behaviour.overflow and not behaviour.overflow.startswith("mixture"):
            how = behaviour.overflow if behaviour.infinity in (None, behaviour.overflow) else f"{behaviour.overflow}, but infinity: {behaviour.infinity}"
            if conversion.runs_on not in found[conversion.target][how]:
                found[conversion.target][how].append(conversion.runs_on)
    return found


def _cause(record: NumericsRecord) -> str:
    """What happens, without what differs from dtype to dtype."""
    verdict = record.verdict
    words = str(verdict.evidence.get(MISTAKE, verdict.summary if verdict.status is not Status.WRONG else ""))
    return re.sub(r"'UInt\d+'", "'UInt*'", re.sub(r" on [\d.]+%", "", words))


def _wrong_share(record: NumericsRecord) -> float:
    wrong = sum(difference.count for difference in record.differences if not difference.permitted)
    return wrong / record.inputs if record.inputs else 0.0
