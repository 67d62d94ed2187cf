"""The decision rule: find the builds that changed how long a case takes.

docs/decision-rule.md describes the rule; § refers to its sections. The rule reads a series build by build, as a nightly
job would, and never retracts: later measurements do not alter the changes found in the same history.

All series are processed together, as arrays `[series, builds]` of logarithms, so that a change is a ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes two seconds to import

from fpxbench.stats import outlier_fence

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

# §2 The level and the noise before
BEFORE = 30
"""Number of builds before a change that define the old level."""
LEAST_BEFORE = 5
"""Fewest builds that define a level."""
LEAST_FREEDOM = 24
"""Degrees of freedom (builds, less one for each window) below which the noise is unknown."""
CLIP = 2.5
"""Points are clipped to this many σ from their level, so that no build has unbounded weight."""
NOISE_WINDOWS = 3
"""Number of successive windows of `BEFORE` builds over which σ is pooled."""
LEAST_NOISE = 0.001
"""Lower bound of the noise: clock resolution limits even a series that repeats exactly to 0.1%."""

# §3 The change
AFTER = (2, 3, 4, 5, 10)
"""Numbers of builds over which the time after a change is averaged; a change takes at least two."""
CHANCE = 0.0025
"""One-sided level of the Student t test of one window."""
LEAST_CHANGE = 0.01
"""Smaller changes are not reported, however significant."""
SURELY = 4
"""Number of builds by which a change may be misplaced."""
PERSISTENT = 0.5
"""Share of the mean change that the median build after it must show, so that one build alone is not a change."""

# §4 The series' own history
HISTORY = 100
"""Number of earlier moves over as many builds to compare with."""
LEAST_HISTORY = 30

# §5 The control
CONTROL = 3.0
"""A change is the machine's if the baseline moved by this many standard errors and the speedup did not."""

_THRESHOLD = np.concatenate([[np.inf], -stdtrit(np.arange(1, NOISE_WINDOWS * BEFORE + 1), CHANCE)])


@dataclass(frozen=True)
class LevelChange:
    """A change of level in one series. `size` is the logarithm of a ratio: 0.05 is a time 1.051 times as long."""

    row: int
    """Index of the series."""
    first: int
    """The first build at the new level, as a column of the values."""
    last_before: int
    """The last build before it with a value."""
    surely_before: int
    """A build `SURELY` earlier still: the change may be placed a few builds late."""
    raised: int
    """The build at which the change became clear, surely at the new level."""
    size: float
    error: float
    """Standard error of `size`."""
    z: float
    """The change, clipped, in standard errors. Its sign is the direction."""
    chance: float
    """Two-sided p-value of one test."""
    noise: float
    """σ of one build."""
    builds_before: int
    builds_after: int
    control: float | None
    """The baseline's move over the same builds, as a logarithm; None if unknown."""
    machine: bool
    """Whether the baseline moved and the speedup did not (§5): then it is not a suspect."""


Belief = Callable[[LevelChange], bool]
"""Returns whether to accept a change; a refuted one leaves the level unchanged (§6)."""


def believe_all(change: LevelChange) -> bool:
    return True


def detect(values: Array, control: Array | None = None, believe: Belief = believe_all) -> list[LevelChange]:
    """Return the changes in `values` [series, builds], in the order in which a nightly job would have found them.

    `control` [series, builds] is the baseline's time in the same runs. Values are positive, or NaN for a build without
    a time.
    """
    y, column, length = _packed(np.log(values))
    c = np.full_like(y, np.nan) if control is None else np.take_along_axis(np.log(control), column, axis=1)
    reader = _Reader(y, c, column, length)
    found = []
    for now in range(LEAST_BEFORE + AFTER[0] - 1, y.shape[1]):
        found += reader.step(now, believe)
    return sorted(found, key=lambda change: (change.raised, change.row))


def _packed(y: Array) -> tuple[Array, Indices, Indices]:
    """Return each series without gaps, padded with NaN at the end; each value's column; the number of values."""
    column = np.argsort(np.isnan(y), axis=1, kind="stable")
    return np.take_along_axis(y, column, axis=1), column, np.isfinite(y).sum(axis=1)


def _middle(ordered: Array, count: Indices) -> Array:
    """Return the medians of sorted rows, of which the first `count` values are numbers."""
    rows = np.arange(len(ordered))
    last = ordered.shape[1] - 1
    low, high = np.clip((count - 1) // 2, 0, last), np.clip(count // 2, 0, last)
    return (ordered[rows, low] + ordered[rows, high]) / 2


def level_and_noise(window: Array) -> tuple[Array, Array, Indices]:
    """Return each row's mean and standard deviation with outliers clipped, and its number of values (§2).

    Outliers are found with the median and the median absolute deviation; the mean and deviation of the clipped values
    are then nearly as efficient as without outliers.
    """
    count = np.isfinite(window).sum(axis=1)
    middle = _middle(np.sort(window, axis=1), count)[:, None]
    spread = 1.4826 * _middle(np.sort(np.abs(window - middle), axis=1), count)[:, None]
    reach = CLIP * np.maximum(spread, LEAST_NOISE)
    clipped = np.clip(window, middle - reach, middle + reach)
    present = np.isfinite(clipped)
    level = np.where(present, clipped, 0).sum(axis=1) / np.maximum(count, 1)
    squares = np.where(present, clipped - level[:, None], 0) ** 2
    noise = np.sqrt(squares.sum(axis=1) / np.maximum(count - 1, 1))
    return np.where(count > 0, level, np.nan), np.where(count > 0, noise, np.nan), count


class _Reader:
    """State of all series up to now. A *split* is a possible place of a change: the number of builds before it."""

    def __init__(self, y: Array, c: Array, column: Indices, length: Indices) -> None:
        self.y, self.c, self.column, self.length = y, c, column, length
        shape = y.shape
        self.level, self.own_noise, self.noise = np.full((3, *shape), np.nan)
        self.count, self.freedom = np.zeros((2, *shape), dtype=np.intp)
        self.moves = {k: np.full(shape, np.nan) for k in AFTER}
        self.begin = np.zeros(shape[0], dtype=np.intp)
        """Where the current level began."""
        self.refuted_until = np.full((2, shape[0]), -BEFORE - 1, dtype=np.intp)
        """Splits up to here are not tested again for a faster [0] or a slower [1] level."""

    def step(self, now: int, believe: Belief) -> list[LevelChange]:
        """Read build number `now` of every series, and return the changes that become clear with it."""
        self._open(now + 1 - AFTER[0])
        excess = np.zeros(len(self.y))
        z_found = np.zeros(len(self.y))
        for k in AFTER:
            split = now + 1 - k
            if split < LEAST_BEFORE:
                break
            z = self._z(split, k)
            z[split <= self.refuted_until[(z > 0).astype(int), np.arange(len(z))]] = 0
            beyond = np.abs(z) / _THRESHOLD[self.freedom[:, split]]
            better = beyond > excess
            excess, z_found = np.where(better, beyond, excess), np.where(better, z, z_found)
        found = []
        for row in np.flatnonzero((excess > 1) & (now < self.length)):
            change = self._judge(int(row), now, float(z_found[row]))
            if change is not None:
                found.append(change)
                self._take_in(change, now, believe)
        return found

    def _window(self, split: int) -> Array:
        """Return the builds before `split` at the current level; NaN for the others."""
        start = max(0, split - BEFORE)
        inside = np.arange(start, split) >= self.begin[:, None]
        return np.where(inside, self.y[:, start:split], np.nan)

    def _open(self, split: int) -> None:
        """Compute level and noise before a new split."""
        level, own, count = level_and_noise(self._window(split))
        enough = count >= LEAST_BEFORE
        self.level[:, split] = np.where(enough, level, np.nan)
        self.count[:, split] = count
        self.own_noise[:, split] = np.where(enough, own, np.nan)
        weights, squares = np.zeros(len(self.y), dtype=np.intp), np.zeros(len(self.y))
        for at in range(split, max(LEAST_BEFORE - 1, split - NOISE_WINDOWS * BEFORE), -BEFORE):
            known = np.isfinite(self.own_noise[:, at])
            weight = np.where(known, self.count[:, at] - 1, 0)
            weights += weight
            squares += weight * np.where(known, self.own_noise[:, at], 0) ** 2
        self.freedom[:, split] = np.where(enough & (weights >= LEAST_FREEDOM), weights, 0)
        self.noise[:, split] = np.maximum(np.sqrt(squares / np.maximum(weights, 1)), LEAST_NOISE)

    def _z(self, split: int, k: int) -> Array:
        """Return the move across `split`, clipped, in standard errors (§3)."""
        reach = CLIP * self.noise[:, split, None]
        move = np.clip(self.y[:, split:split + k] - self.level[:, split, None], -reach, reach).mean(axis=1)
        self.moves[k][:, split] = move
        return np.nan_to_num(move / (self.noise[:, split] * _error(k, self.count[:, split])))

    def _judge(self, row: int, now: int, z: float) -> LevelChange | None:
        """Apply §3 to §5 to one series whose z is beyond the threshold."""
        k = self._locate(row, now, np.sign(z))
        split = now + 1 - k
        after = np.sort(np.sign(z) * (self.y[row, split:now + 1] - self.level[row, split]))
        if after[(k - 1) // 2] < max(LEAST_CHANGE, PERSISTENT * after.mean()) or self._usual(row, split, k):
            return None
        size = float(np.sign(z) * np.median(after))
        noise, count = float(self.noise[row, split]), int(self.count[row, split])
        chance = float(2 * stdtr(int(self.freedom[row, split]), -abs(z)))
        control, machine = self._control(row, split, now, np.sign(z))
        return LevelChange(
            row=row, first=int(self.column[row, split]), last_before=int(self.column[row, split - 1]),
            surely_before=int(self.column[row, max(split - 1 - SURELY, self.begin[row])]),
            raised=int(self.column[row, now]), size=size, error=noise * float(_error(k, count)), z=z, chance=chance,
            noise=noise, builds_before=count, builds_after=k, control=control, machine=machine)

    def _locate(self, row: int, now: int, sign: float) -> int:
        """Return the number of builds since the clearest split; unclipped, because clipping would blur it."""
        clear = {}
        for k in AFTER:
            split = now + 1 - k
            if self.freedom[row, split] and split > self.refuted_until[int(sign > 0), row]:
                mean = self.y[row, split:now + 1].sum() / k - self.level[row, split]
                clear[k] = sign * mean / _error(k, int(self.count[row, split]))
        return max(clear, key=clear.__getitem__)

    def _usual(self, row: int, split: int, k: int) -> bool:
        """Return whether this series has moved as far before without a change (§4)."""
        past = self.moves[k][row, max(0, split - HISTORY - k):split - k]
        past = past[np.isfinite(past)]
        return len(past) >= LEAST_HISTORY and abs(self.moves[k][row, split]) <= outlier_fence(past)

    def _control(self, row: int, split: int, now: int, sign: float) -> tuple[float | None, bool]:
        """Return the baseline's move, and whether it explains the change (§5)."""
        k = now + 1 - split
        sizes, significant = [], []
        start = max(0, split - BEFORE)
        inside = np.arange(start, split) >= self.begin[row]
        control = self.c[row, start:now + 1]
        for series in (control, self.y[row, start:now + 1] - control):
            window = np.where(inside, series[:split - start], np.nan)[None]
            level, noise, count = (one.item() for one in level_and_noise(window))
            sizes.append(float(np.median(series[split - start:]) - level))
            significant.append(sign * sizes[-1] >= CONTROL * max(noise, LEAST_NOISE) * _error(k, count))
        if not np.isfinite(sizes).all():
            return None, False
        return sizes[0], bool(significant[0] and not significant[1])

    def _take_in(self, change: LevelChange, now: int, believe: Belief) -> None:
        """Begin a new level after a change that is accepted, or refuted twice within `BEFORE` builds (§6)."""
        row, slower = change.row, int(change.z > 0)
        believed = change.machine or believe(change)
        if believed or 0 <= now - self.refuted_until[slower, row] <= BEFORE:
            self.begin[row] = now + 1 - change.builds_after
            self.freedom[row, :now + 1] = 0
        if not believed:
            self.refuted_until[slower, row] = now


def _error(after: int, before: Array | Indices | float) -> Array | float:
    """Return the standard error of the difference between the means of `after` and `before` builds, in σ of one."""
    return (1 / after + 1 / np.maximum(before, 1)) ** 0.5
