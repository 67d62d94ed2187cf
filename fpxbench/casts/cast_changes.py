"""What changed from one build to the next: statuses, behaviours, and how many inputs differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fpxbench.casts.cast_findings import engines_of, operations_of
from fpxbench.casts.cast_record import CastRecord
from fpxbench.casts.conversion import Conversion

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class CastSnapshot:
    """The part of a record that later builds are compared with."""

    conversion: Conversion
    inputs: str
    aspects: Mapping[str, str]
    """Status, behaviour and the number of differing inputs, as text by name."""

    @classmethod
    def of(cls, record: CastRecord) -> CastSnapshot:
        status = str(record.verdict.status)
        aspects = {"status": status, **record.behaviour.aspects()}
        if record.differing is not None:
            aspects["differing inputs"] = f"{record.differing:,}"
        return cls(record.conversion, f"{record.rules} {record.inputs_digest}", aspects)


@dataclass(frozen=True)
class CastChange:
    """An aspect that went from one value to another, and all conversions that show it."""

    aspect: str
    before: str
    after: str
    conversions: tuple[Conversion, ...]

    @property
    def message(self) -> str:
        """``cast fp32, bf16 → e4m3fn in eager/cpu: overflow nan → saturate``."""
        where = f"{operations_of(self.conversions)} in {', '.join(engines_of(self.conversions))}"
        return f"{where}: {self.aspect.replace('_', ' ')} {self.before} → {self.after}"


def changes(before: Iterable[CastSnapshot], after: Iterable[CastSnapshot]) -> list[CastChange]:
    """Return what differs between two builds in the conversions of both that had the same inputs, the most widespread
    first.

    The number of differing inputs is reported only where no other aspect changed.
    """
    earlier = {snapshot.conversion.id: snapshot for snapshot in before}
    grouped: dict[tuple[str, str, str], list[Conversion]] = defaultdict(list)
    for snapshot in after:
        old = earlier.get(snapshot.conversion.id)
        if old is None or (old.inputs != snapshot.inputs and old.aspects["status"] == snapshot.aspects["status"]):
            continue
        pairs = {name: (old.aspects.get(name, _UNKNOWN), snapshot.aspects.get(name, _UNKNOWN))
                 for name in dict.fromkeys((*old.aspects, *snapshot.aspects))}
        different = {
            name: pair
            for name, pair in pairs.items()
            if pair[0] != pair[1] and (name == "status" or _UNKNOWN not in pair)
        }
        if len(different) > 1:
            different.pop("differing inputs", None)
        for name, (was, now) in different.items():
            grouped[name, was, now].append(snapshot.conversion)
    found = [CastChange(name, was, now, tuple(conversions)) for (name, was, now), conversions in grouped.items()]
    return sorted(found, key=lambda change: (change.aspect != "status", -len(change.conversions), change.message))
