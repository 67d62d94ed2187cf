"""Display a fleet's progress: machines × builds, current tasks, estimated time; plain lines without a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fpxbench.counted import counted
from fpxbench.fleet.state import CellState, FleetState, SeatState
from fpxbench.records.verdict import SIGNS, Status

PLAIN_LINE_EVERY_S = 10.0
MOST_COLUMNS = 8
"""More builds are counted, not listed."""
MOST_SEATS = 16
_ORDER = ("working", "starting", "idle", "not used")


class FleetProgress:
    """A live table on a terminal; elsewhere a line every `PLAIN_LINE_EVERY_S` seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a permanent line."""
        self.console.print(f"fleet: {sentence}", markup=False, style="yellow")

    def show(self, state: FleetState) -> None:
        """Show `state`; as plain lines, only if the last line is old enough."""
        if self._live is not None:
            self._live.update(rendered(state))
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_LINE_EVERY_S
            self.console.print(f"[{state.at[11:19]}] {summary(state)}", markup=False)


def rendered(state: FleetState, running: bool = True) -> RenderableType:
    """Return the state as tables and a line. running : show the devices too."""
    parts: list[RenderableType] = [_matrix(state)]
    if running and state.seats:
        parts.append(_seats(state.seats))
    return Group(*parts, escape(summary(state)))


def summary(state: FleetState) -> str:
    """Return ``214 of 3135 records, 2 wrong | 4 devices measuring, 1 installing | about 41 min left``."""
    done = sum(cell.done for cell in state.cells)
    total = sum(cell.total or 0 for cell in state.cells)
    unknown = any(cell.total is None and not cell.failure for cell in state.cells)
    counts = {status: sum(cell.statuses.get(status, 0) for cell in state.cells) for status in Status}
    found = ", ".join(f"{count} {status}" for status, count in counts.items()
                      if count and status not in (Status.OK, Status.UNSUPPORTED, Status.MISSING))
    parts = [f"{done} of {total}{'+' if unknown else ''} cases" + (f", {found}" if found else "")]
    doing: dict[str, int] = {}
    for seat in state.seats:
        doing[seat.activity] = doing.get(seat.activity, 0) + 1
    if state.seats and not state.ended:
        parts.append("devices: " + ", ".join(f"{count} {verb}" for verb, count in doing.items()))
    failed = sum(bool(cell.failure) for cell in state.cells)
    given_up = sum(len(cell.given_up) for cell in state.cells)
    parts += [f"{counted(failed, 'build')} that cannot be measured on a machine"] if failed else []
    parts += [f"{counted(given_up, 'case')} given up"] if given_up else []
    if state.ended:
        parts.append(state.ended)
    elif state.seconds_left is not None:
        parts.append(f"about {duration(state.seconds_left)} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Return ``40 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _matrix(state: FleetState) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("machine", no_wrap=True)
    if len(state.builds) > MOST_COLUMNS:
        for name in ("builds done", "in progress", "waiting", "cannot be measured", "cases"):
            table.add_column(name, justify="right")
        for machine in state.machines:
            table.add_row(escape(machine), *_counted([cell for cell in state.cells if cell.machine == machine]))
        return table
    for build in state.builds:
        table.add_column(escape(build), justify="right")
    by_place = {(cell.machine, cell.build): cell for cell in state.cells}
    for machine in state.machines:
        table.add_row(escape(machine), *(_cell(by_place.get((machine, build))) for build in state.builds))
    return table


def _counted(cells: list[CellState]) -> list[str]:
    done = [cell for cell in cells if _is_done(cell)]
    failed = [cell for cell in cells if cell.failure]
    begun = [cell for cell in cells if cell.total is not None and cell not in done and cell not in failed]
    waiting = len(cells) - len(done) - len(failed) - len(begun)
    return [f"[green]{len(done)}[/]", f"{len(begun)}", f"[dim]{waiting}[/]", f"[red]{len(failed) or ''}[/]",
            f"{sum(cell.done for cell in cells)}/{sum(cell.total or 0 for cell in cells)}"]


def _is_done(cell: CellState) -> bool:
    return cell.total is not None and cell.done + len(cell.given_up) >= cell.total


def _cell(cell: CellState | None) -> str:
    if cell is None:
        return ""
    if cell.failure:
        return "[red]cannot be measured[/]"
    if cell.total is None:
        return "[dim]waiting[/]"
    broken = f" [red]{cell.broken}{SIGNS[Status.WRONG]}[/]" if cell.broken else ""
    given_up = f" [red]{len(cell.given_up)} given up[/]" if cell.given_up else ""
    count = f"{cell.done}/{cell.total}"
    right = _is_done(cell) and not cell.given_up
    return (f"[green]{count} {SIGNS[Status.OK]}[/]" if right else count) + broken + given_up


def _seats(seats: list[SeatState]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("device", "machine", "build", "doing"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    ordered = sorted(seats, key=lambda seat: _ORDER.index(seat.activity))
    for seat in ordered[:MOST_SEATS]:
        clock = seat.clock_offset_s
        doing = seat.doing + (f"  (clock {clock:+.1f} s)" if clock is not None and abs(clock) >= 1 else "")
        table.add_row(*map(escape, (seat.device, seat.machine, seat.build, doing)))
    if len(seats) > MOST_SEATS:
        table.add_row(f"… and {len(seats) - MOST_SEATS} more", "", "", "")
    return table
