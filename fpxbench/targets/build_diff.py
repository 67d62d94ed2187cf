"""Compare two Triton builds: which cells the newer one gained and lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fpxbench.records.verdict import Status
from fpxbench.targets.matrix import CellOutcome, Matrix


@dataclass(frozen=True)
class CellChange:
    """Cells of one operation and format that changed in the same way."""

    verdict: str
    """``gained``: ok now, or ok without a flag (`unfused`) that it had; ``lost``: the reverse; ``other``: not ok before
    and after, for different reasons.
    """
    operation: str
    format: str
    before: CellOutcome
    after: CellOutcome
    cells: tuple[tuple[str, str], ...]
    """Probe and architecture."""

    @property
    def architectures(self) -> list[str]:
        return list(dict.fromkeys(architecture for _, architecture in self.cells))

    def __str__(self) -> str:
        count = f"{len(self.cells)} cells" if len(self.cells) > 1 else self.cells[0][0]
        return (f"{self.operation}/{self.format} on {', '.join(self.architectures)} ({count}): "
                f"{_text(self.before)} -> {_text(self.after)}")


def _text(outcome: CellOutcome) -> str:
    if outcome.status is Status.OK:
        return f"ok ({', '.join(outcome.flags)}): {outcome.cause}" if outcome.flags else "ok"
    return f"{outcome.status}{f' ({outcome.kind})' if outcome.kind else ''}: {outcome.cause}"


Wanted = Callable[[str, str], bool]
"""Whether a cell, by its probe and architecture, is to be compared."""


def compared(old: Matrix, before: int, new: Matrix, after: int, wanted: Wanted) -> int:
    """Return how many of the wanted cells both builds have."""
    return sum(wanted(*key) for key, *_ in _both(old, before, new, after))


def changes(old: Matrix, before: int, new: Matrix, after: int, wanted: Wanted = lambda probe, architecture: True,
            ) -> list[CellChange]:
    """Return the differences between two builds, of one matrix or of two, in the wanted cells that both have; lost
    first."""
    alike: dict[tuple, list[tuple[str, str]]] = {}
    for key, operation, fmt, was, now in _both(old, before, new, after):
        if not wanted(*key):
            continue
        worked, works = _goodness(was), _goodness(now)
        if worked != works or worked == 0 and (was.status, was.kind, was.cause) != (now.status, now.kind, now.cause):
            verdict = "lost" if works < worked else "gained" if works > worked else "other"
            # Cells with the same cause form one change, whatever evidence each has.
            before_, after_ = (outcome.model_copy(update={"message": ""}) for outcome in (was, now))
            alike.setdefault((verdict, operation, fmt, before_, after_), []).append(key)
    found = [CellChange(*group, cells=tuple(cells)) for group, cells in alike.items()]
    return sorted(found, key=lambda change: (("lost", "gained", "other").index(change.verdict), -len(change.cells)))


def _goodness(outcome: CellOutcome) -> int:
    """Return 0 for not ok, 1 for ok with a flag, 2 for ok without."""
    return (1 if outcome.flags else 2) if outcome.status is Status.OK else 0


def _both(old: Matrix, before: int, new: Matrix,
          after: int) -> Iterator[tuple[tuple[str, str], str, str, CellOutcome, CellOutcome]]:
    earlier = {probe.id: probe for probe in old.probes}
    for probe in new.probes:
        if probe.id not in earlier:
            continue
        for architecture in probe.cells:
            was = old.outcome_of(earlier[probe.id], architecture, before)
            now = new.outcome_of(probe, architecture, after)
            if was is not None and now is not None:
                yield (probe.id, architecture), probe.operation, probe.format, was, now
