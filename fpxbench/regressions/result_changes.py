"""Find all changes under a results folder, worst first: events, suspects and moves of the machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from fpxbench.builds.timeline import Entry, Timeline
from fpxbench.records.record import Build
from fpxbench.records.store import Store
from fpxbench.regressions.change_report import ChangeReport, Direction, Event, MachineMove, Series, Suspect, share
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome
from fpxbench.regressions.decision_rule import LevelChange, detect
from fpxbench.regressions.events import build_fields, events, series_of
from fpxbench.regressions.kept_changes import FoundChanges, KeptChanges
from fpxbench.regressions.machine_processes import in_processes
from fpxbench.regressions.series import Panel, machine_names, panels_of

METRIC = "median_us"
"""The metric that the rule is applied to; the baseline's time in the same run is its control."""
Z95 = 1.96


@dataclass
class ResultChanges:
    """All changes, each list worst first."""

    suspects: list[Suspect] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    machine: list[MachineMove] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    newest: list[tuple[str, ...]] = field(default_factory=list)
    """Machine, device, variant, channel and key of the newest build of each series of builds."""
    newest_of: list[tuple[str, Build]] = field(default_factory=list)
    """The same builds, each with the folder of its machine."""
    builds: int = 0
    """Number of builds in the longest series."""

    def add(self, other: ResultChanges) -> None:
        """Add the changes of another machine."""
        for name in ("suspects", "events", "machine", "troubles", "newest", "newest_of"):
            getattr(self, name).extend(getattr(other, name))
        self.builds = max(self.builds, other.builds)

    def of_newest_builds(self) -> ResultChanges:
        """Return open findings: suspects that stand, and changes of the newest build of their own series."""
        newest = set(self.newest)
        return replace(
            self, suspects=[suspect for suspect in self.suspects if suspect.stands],
            events=[event for event in self.events if _place(event.series, event.first_bad) in newest],
            machine=[move for move in self.machine if _place(move, move.first) in newest],
        )


def _place(series: Panel | Series | MachineMove, build: Build) -> tuple[str, ...]:
    return series.machine, series.device, series.variant, series.channel, build.key


def find_changes(results: Path, timeline: Timeline | None = None, machine: str | None = None,
                 jobs: int = 1) -> ResultChanges:
    """Apply the rule to all records under `results`, with `jobs` machines in parallel.

    A change that was rerun has its outcome. A refuted suspect does not affect the rest of its series. Raise ValueError
    for a machine that has no records.
    """
    found = ResultChanges()
    confirmations, broken = Store(results, Confirmation).read_all()
    found.troubles += [str(line) for line in broken]
    of_one = partial(_without_series, results, by_suspect(confirmations), timeline.entries() if timeline else [])
    for of_machine in in_processes(of_one, machine_names(results, machine), jobs):
        found.add(of_machine)
    found.suspects.sort(key=lambda one: (not one.stands, one.direction is not Direction.WORSE, -abs(one.change)))
    found.events.sort(key=lambda one: (one.direction is not Direction.WORSE, one.severity, one.changes_before,
                                          one.series.case))
    found.machine.sort(key=lambda move: -abs(move.change))
    return found


def _without_series(results: Path, confirmations: dict[str, Confirmation], entries: list[Entry],
                    machine: str) -> ResultChanges:
    """Return the changes of one machine."""
    of_machine, troubles = changes_of_machine(results, machine, confirmations, entries)
    newest = [(one.panel, one.panel.builds[-1]) for one in of_machine]
    return ResultChanges(
        suspects=[suspect for one in of_machine for suspect in one.suspects],
        events=[event for one in of_machine for event in one.events],
        machine=[move for one in of_machine for move in one.moves],
        troubles=troubles, newest=[_place(panel, build) for panel, build in newest],
        newest_of=[(machine, build) for _, build in newest],
        builds=max((len(one.panel.builds) for one in of_machine), default=0))


@dataclass(frozen=True)
class PanelChanges:
    """The series of one panel, and what changed in them, each list in the order of the builds."""

    panel: Panel
    suspects: list[Suspect]
    events: list[Event]
    moves: list[MachineMove]


def changes_of_machine(
    results: Path, machine: str, confirmations: dict[str, Confirmation], entries: Iterable[Entry] = (),
) -> tuple[list[PanelChanges], list[str]]:
    """Return the changes of one machine with its series, and messages about its records. `entries` are the
    timeline's."""
    from fpxbench.regressions.series_index import NAME  # imports polars, which `performance` does not need

    found, troubles = panels_of(results, machine, entries)
    kept = KeptChanges(results / machine / NAME)
    changes = [_changes_of(panel, confirmations, kept) for panel in found]
    kept.write()
    return changes, troubles


def _changes_of(panel: Panel, confirmations: dict[str, Confirmation], kept: KeptChanges) -> PanelChanges:
    suspects, moves = performance(panel, confirmations, kept)
    return PanelChanges(panel, suspects, [_with_outcome(event, confirmations) for event in events(panel)], moves)


def by_suspect(confirmations: Iterable[Confirmation]) -> dict[str, Confirmation]:
    """Return change id -> its last confirmation."""
    return {confirmation.suspect: confirmation for confirmation in confirmations if confirmation.suspect}


F = TypeVar("F", bound=ChangeReport)


def _with_outcome(finding: F, confirmations: dict[str, Confirmation]) -> F:
    confirmation = confirmations.get(finding.id)
    if confirmation is None:
        return finding
    return finding.model_copy(update={"outcome": confirmation.outcome, "message": confirmation.headline})


def performance(
    panel: Panel, confirmations: dict[str, Confirmation] | None = None, kept: KeptChanges | None = None,
) -> tuple[list[Suspect], list[MachineMove]]:
    """Return the suspects of one panel in the order in which they were raised, and the moves of the machine."""
    confirmations = confirmations or {}

    def suspect(change: LevelChange) -> Suspect:
        return _with_outcome(suspect_of(panel, change), confirmations)

    def find() -> FoundChanges:
        raised: list[LevelChange] = []

        def believe(change: LevelChange) -> bool:
            raised.append(change)
            return suspect(change).outcome is not ConfirmationOutcome.REFUTED

        changes = detect(panel.metrics[METRIC], panel.metrics["baseline_us"], believe)
        return FoundChanges(raised, [change for change in changes if change.machine])

    refuted = [of for of, one in confirmations.items() if one.outcome is ConfirmationOutcome.REFUTED]
    found = kept.of(panel, METRIC, refuted, find) if kept else find()
    return _with_ends([suspect(change) for change in found.suspects]), _machine_moves(panel, found.moves)


def _with_ends(suspects: list[Suspect]) -> list[Suspect]:
    """Return the suspects with `ended_at`: the build of the next one in the other direction."""
    ended: list[Suspect] = []
    later: dict[str, Suspect] = {}
    for suspect in reversed(suspects):
        case = suspect.series.case
        following = later.get(case)
        if following is not None and following.direction is not suspect.direction:
            suspect = suspect.model_copy(update={"ended_at": following.first_bad})
        if suspect.outcome is not ConfirmationOutcome.REFUTED:
            later[case] = suspect
        ended.append(suspect)
    return ended[::-1]


def suspect_of(panel: Panel, change: LevelChange) -> Suspect:
    return Suspect(
        series=series_of(panel, change.row, METRIC), direction=Direction.WORSE if change.z > 0 else Direction.BETTER,
        **build_fields(panel, change.row, change.last_before, change.first),
        surely_good=panel.builds[change.surely_before], raised_at=panel.builds[change.raised],
        change=share(change.size),
        interval=(share(change.size - Z95 * change.error), share(change.size + Z95 * change.error)),
        z=change.z, chance=change.chance, noise=share(change.noise), builds_before=change.builds_before,
        builds_after=change.builds_after, control=None if change.control is None else share(change.control),
    )


def _machine_moves(panel: Panel, changes: list[LevelChange]) -> list[MachineMove]:
    """Return one move per build and direction."""
    by_build: dict[tuple[int, bool], list[LevelChange]] = defaultdict(list)
    for change in changes:
        by_build[change.first, change.z > 0].append(change)
    return [
        MachineMove(machine=panel.machine, device=panel.device, variant=panel.variant, channel=panel.channel,
                    first=panel.builds[first], first_tag=panel.tags[first], cases=len(moved),
                    change=share(float(np.median([change.size for change in moved]))),
                    control=share(float(np.median([change.control for change in moved if change.control is not None]))))
        for (first, _), moved in sorted(by_build.items())
    ]
