"""Evaluate the rule on synthetic and recorded series, next to a plain z-score and asv's and Apache Otava's detectors.

docs/decision-rule.md §9 has the method and the table. The rule was tuned on seeds that the table does not use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
from asv import step_detect
from numpy.typing import NDArray

from fpxbench.records.case import Case
from fpxbench.regressions import confirm, recorded_series as recorded, synthetic
from fpxbench.regressions.confirmation import ConfirmationOutcome
from fpxbench.regressions.decision_rule import LevelChange, detect
from fpxbench.stats import fewest_pairs, ratio_of_pairs

SEED = 20261124
"""Seed of the table."""
FLAT_NOISE = 0.02
NEAR = 4
"""Builds from the true change within which a detector must place it."""

# Settings of the other detectors.
Z_WINDOW, Z_LIMIT = 30, 3.0
"""The z-score compares a build with the builds before it, as dashboard alarms do."""
ASV_THRESHOLD = 0.05
"""asv's default: smaller rises are not regressions, except as part of a larger one."""
OTAVA_CHANCE, OTAVA_LEAST = 0.001, 0.03
OTAVA_WINDOW = 50
"""Otava's defaults, with a least magnitude of 3%."""

# A confirmation needs a case; any will do.
_CASE = Case(implementation="made_up", scheme="e4m3fn-row", workload="made_up", m=1, n=1, k=1)


@dataclass(frozen=True)
class Detection:
    """How often a detector finds a step."""

    detector: str
    kind: str
    step: float
    noise: float
    within: tuple[float, ...]
    """Share of series in which it is found within 1, 2, … 5 builds."""
    placed: float
    """Share of the found steps that are placed at the right build."""
    series: int


@dataclass(frozen=True)
class FalseAlarms:
    """Alarms of a detector on series in which no case changed."""

    detector: str
    kind: str
    builds: int
    per_1000: float
    """Alarms per 1,000 series."""
    series: int


@dataclass(frozen=True)
class Alarm:
    """A regression or an improvement that a detector claims."""

    row: int
    first: int
    raised: int
    slower: bool


Detector = Callable[[synthetic.Times, np.random.Generator, float, float], list[Alarm]]
"""(times, random generator, noise of a rerun, true step of a rerun) -> alarms."""


def _rule(times: synthetic.Times, rng: np.random.Generator, noise: float, step: float) -> list[Alarm]:
    return [_alarm(change) for change in detect(*times) if not change.machine]


def _confirmed(times: synthetic.Times, rng: np.random.Generator, noise: float, step: float) -> list[Alarm]:
    """Apply the rule with confirmation: only confirmed suspects are alarms."""
    confirmed: list[LevelChange] = []

    def believe(change: LevelChange) -> bool:
        if rerun(_true_change(change, step), change.size, noise, rng):
            confirmed.append(change)
            return True
        return False

    detect(*times, believe)
    return [_alarm(change) for change in confirmed]


def _true_change(change: LevelChange, step: float) -> float:
    """Return the true change between the two builds that are rerun, as a logarithm: the step, or 0."""
    return np.log1p(step) if change.surely_before < synthetic.BEFORE <= change.raised else 0.0


def rerun(true_change: float, suspected: float, noise: float, rng: np.random.Generator) -> bool:
    """Return whether `fpxbench confirm` confirms on synthetic runs, each as noisy as a nightly one."""
    question = confirm.Question(case=_CASE, metric="time", size=suspected)
    good, bad = np.exp(rng.normal(0, noise, (2, confirm.MOST_PAIRS)))
    bad *= np.exp(true_change)
    for pairs in range(fewest_pairs(confirm.LEVEL), confirm.MOST_PAIRS + 1, confirm.PAIRS_BETWEEN_LOOKS):
        outcome = confirm.decided(ratio_of_pairs(bad[:pairs], good[:pairs], confirm.LEVEL), question)
        if outcome is not None:
            return outcome is ConfirmationOutcome.CONFIRMED
    return False


def _alarm(change: LevelChange) -> Alarm:
    return Alarm(change.row, change.first, change.raised, change.z > 0)


def _z_score(times: synthetic.Times, rng: np.random.Generator, noise: float, step: float) -> list[Alarm]:
    """Alarm if a build's log time is more than `Z_LIMIT` deviations from the mean of the `Z_WINDOW` before it."""
    logs = np.log(times[0])
    windows = np.lib.stride_tricks.sliding_window_view(logs, Z_WINDOW, axis=1)[:, :-1]
    z = (logs[:, Z_WINDOW:] - np.nanmean(windows, axis=-1)) / np.nanstd(windows, axis=-1, ddof=1)
    rows, builds = np.nonzero(np.abs(z) > Z_LIMIT)
    return [Alarm(row, build + Z_WINDOW, build + Z_WINDOW, bool(z[row, build] > 0))
            for row, build in zip(rows.tolist(), builds.tolist(), strict=True)]


def _each_night(look: Callable[[list[float]], Iterator[tuple[int, bool]]]) -> Detector:
    """Run a detector of whole series after each build that follows the step; once if there is no step."""

    def detector(times: synthetic.Times, rng: np.random.Generator, noise: float, step: float) -> list[Alarm]:
        case, _ = times
        last = case.shape[1] - 1
        nights = range(synthetic.BEFORE, last + 1) if step else [last]
        return [Alarm(row, first, night, slower) for row, values in enumerate(case.tolist()) for night in nights
                for first, slower in look(values[:night + 1])]

    return detector


def _asv(values: list[float]) -> Iterator[tuple[int, bool]]:
    """Yield asv's regressions; asv finds no improvements."""
    _, _, jumps = step_detect.detect_regressions(step_detect.detect_steps(values), threshold=ASV_THRESHOLD)
    for before, after, *_ in jumps or ():
        yield before + 1 if after is None else after, True


def _otava(values: list[float]) -> Iterator[tuple[int, bool]]:
    from otava.analysis import compute_change_points

    points, _ = compute_change_points(values, window_len=OTAVA_WINDOW, max_pvalue=OTAVA_CHANCE,
                                      min_magnitude=OTAVA_LEAST)
    for point in points:
        yield point.index, point.stats.mean_2 > point.stats.mean_1


DETECTORS: dict[str, Detector] = {
    "rule": _rule, "rule + confirmation": _confirmed, "z-score": _z_score, "asv": _each_night(_asv),
    "Otava": _each_night(_otava),
}


def available() -> list[str]:
    """Return the detectors that can run here; Otava is not installed with fpxbench (docs/decision-rule.md §10)."""
    return [name for name in DETECTORS if name != "Otava" or importlib.util.find_spec("otava")]


@dataclass(frozen=True)
class EvaluationRun:
    """One detector on one kind of series. Recorded series have their own number and noise."""

    detector: str
    series: int
    seed: int
    step: float = 0.0
    noise: float = FLAT_NOISE
    kind: str = "noise only"
    builds: int = 0

    def detection(self) -> Detection:
        """Return how often the step is found."""
        times, noise, alarms = self._alarms()
        return self._found(alarms, noise, times[0].shape[0])

    def false_alarms(self) -> FalseAlarms:
        """Return how many alarms there are on series without a step."""
        times, _, alarms = self._alarms()
        series, builds = times[0].shape
        return FalseAlarms(self.detector, self.kind, builds, 1000 * len(alarms) / series, series)

    def run(self) -> Detection | FalseAlarms:
        """Return the detection of a step, or the false alarms without one."""
        return self.detection() if self.step else self.false_alarms()

    def _alarms(self) -> tuple[synthetic.Times, float, list[Alarm]]:
        # The seed does not depend on the detector, so that all see the same series.
        rng = np.random.default_rng([self.seed, round(self.step * 100), round(self.noise * 100), self.builds,
                                     [*synthetic.FLAT, *recorded.places()].index(self.kind)])
        times, noise = self._times(rng)
        return times, noise, DETECTORS[self.detector](times, rng, noise, self.step)

    def _times(self, rng: np.random.Generator) -> tuple[synthetic.Times, float]:
        if self.kind in recorded.places():
            return recorded.windows(self.kind, self.step), recorded.noise(self.kind)
        if self.step:
            return synthetic.step(self.series, self.step, self.noise, rng), self.noise
        return synthetic.FLAT[self.kind](self.series, self.builds, self.noise, rng), self.noise

    def _found(self, alarms: list[Alarm], noise: float, series: int) -> Detection:
        right = [alarm for alarm in alarms
                 if alarm.slower and alarm.raised >= synthetic.BEFORE and abs(alarm.first - synthetic.BEFORE) <= NEAR]
        first: dict[int, Alarm] = {}
        for alarm in sorted(right, key=lambda alarm: alarm.raised):
            first.setdefault(alarm.row, alarm)
        raised = [alarm.raised - synthetic.BEFORE + 1 for alarm in first.values()]
        nights: NDArray[np.intp] = np.array(raised, dtype=np.intp)
        within = tuple(float((nights <= k).sum() / series) for k in range(1, synthetic.AFTER + 1))
        placed = sum(alarm.first == synthetic.BEFORE for alarm in first.values()) / len(first) if first else 0.0
        return Detection(self.detector, self.kind, self.step, noise, within, placed, series)


def evaluation_runs(series: int, detectors: list[str], seed: int = SEED) -> list[EvaluationRun]:
    """Return the runs of the whole table."""
    steps = [EvaluationRun(name, series, seed, step=step, noise=noise)
             for step, noise, name in product(synthetic.STEPS, synthetic.NOISES, detectors)]
    flats = [EvaluationRun(name, series, seed, kind=kind, builds=builds)
             for kind, builds, name in product(synthetic.FLAT, synthetic.LENGTHS, detectors)]
    real = [EvaluationRun(name, 0, seed, step=step, kind=where)
            for where, step, name in product(recorded.places(), (0.0, *synthetic.STEPS), detectors)]
    return steps + flats + real


def result_as_json(result: Detection | FalseAlarms) -> dict[str, object]:
    """Return the result as `fpxbench detector --json` prints it."""
    return {"measure": "found" if isinstance(result, Detection) else "alarmed", **asdict(result)}
