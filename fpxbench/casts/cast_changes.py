"""What became different from one build to the next: statuses, behaviours, and how many inputs differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fpxbench.casts.cast_findings import engines_of, operations_of
from fpxbench.casts.cast_record import CastRecord
from fpxbench.casts.conversion import Conversion

_UNTOLD = "untold"


@dataclass(frozen=True)
class CastSnapshot:
    """What is kept of a record to compare it with later ones."""

    conversion: Conversion
    inputs: str
    aspects: Mapping[str, str]
    """Status, behaviour and the number of differing inputs, in words by name."""

    @classmethod
    def of(cls, record: CastRecord) -> CastSnapshot:
        status = str(record.verdict.status)
        aspects = {"status": status, **record.behaviour.aspects()}
        if record.differing is not None:
            aspects["differing inputs"] = f"{record.differing:,}"
        return cls(record.conversion, f"{record.rules} {record.inputs_digest}", aspects)


@dataclass(frozen=True)
class CastChange:
    """One aspect that went from one value to another, in all the conversions that show it."""

    aspect: str
    before: str
    after: str
    conversions: tuple[Conversion, ...]

    @property
    def message(self) -> str:
        """``cast fp32, bf16 → e4m3fn in eager/cpu: overflow nan → saturate``."""
        return f"{operations_of(self.conversions)} in {', '.join(engines_of(self.conversions))}: {self.aspect.replace('_', ' ')} {self.before} → {self.after}"


def changes(before: Iterable[CastSnapshot], after: Iterable[CastSnapshot]) -> list[CastChange]:
    """What differs between two builds in the conversions that both have, given the same inputs; the most widespread first.

    The number of differing inputs is named only where nothing else tells that something changed. NaN codes that an earlier build did not
    give are a change too.
    """
    earlier = {snapshot.conversion.id: snapshot for snapshot in before}
    grouped: dict[tuple[str, str, str], list[Conversion]] = defaultdict(list)
    for snapshot in after:
        old = earlier.get(snapshot.conversion.id)
        if old is None or (old.inputs != snapshot.inputs and "status" in old.aspects and old.aspects["status"] == snapshot.aspects["status"]):
            continue
        different = {
            name: (old.aspects.get(name, _UNTOLD), snapshot.aspects.get(name, _UNTOLD))
            for name in dict.fromkeys((*old.aspects, *snapshot.aspects)) if old.aspects.get(name) != snapshot.aspects.get(name)
        }
        told = {name: pair for name, pair in different.items() if name == "status" or _UNTOLD not in pair}
        if len(told) > 1:
            told.pop("differing inputs", None)
        for name, (was, now) in told.items():
            grouped[name, was, now].append(snapshot.conversion)
    found = [CastChange(name, was, now, tuple(conversions)) for (name, was, now), conversions in grouped.items()]
    return sorted(found, key=lambda change: (change.aspect != "status", -len(change.conversions), change.message))
