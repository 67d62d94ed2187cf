"""The benchmarks that ``pytest --benchmark`` collects: what is compared stands in a group, each implementation a test.

Right before fast: a case is first checked in a watched child (`fpxbench.sweep.isolation`), so that one that crashes or
hangs fails like any other; only what is right is timed, here, by pytest-benchmark.
"""

from __future__ import annotations

import math
import re
import secrets
import shlex
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fpxbench.integrations.pytest.plugin import CASES, ROOT
from fpxbench.records.case import Case
from fpxbench.records.record import Machine
from fpxbench.records.verdict import BROKEN, Status, with_log
from fpxbench.reports.formatting import clipped, pretty
from fpxbench.sweep.isolation import CannotStart, Isolation
from fpxbench.sweep.messages import TrialRequest, TrialResult
from fpxbench.sweep.plan import Plan, Planned
from fpxbench.sweep.settings import Settings
from fpxbench.workloads import is_canary

T = TypeVar("T")

BASELINE = "dense"
"""The first implementation of every group; its weight has the activation's 16-bit dtype."""
PREPARATION_TIMEOUT_S = 300.0
LOG_LINES, EVIDENCE_WIDTH = 16, 300


class Benchmarks:
    """The session's benchmarks: the plan, the child process that checks it, and the results."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        seed = secrets.randbelow(1 << 31) if option.fpx_seed is None else option.fpx_seed
        try:
            self.settings = Settings(profile=option.fpx_profile, device=option.fpx_device,
                                     impls=tuple(Path(path).resolve() for path in option.fpx_impls),
                                     scheme=tuple(option.fpx_scheme), workload=tuple(option.fpx_workload),
                                     weights=option.fpx_weights, activations=option.fpx_activations, seed=seed)
            self.settings.check_names()
        except ValueError as error:     # pydantic's too
            raise pytest.UsageError(f"--benchmark: {error}") from None
        self.plan = Plan(device="", cases=[])
        self._keyword: str = config.getoption("keyword") or ""
        self.ended: dict[BenchmarkGroup, list[tuple[str, TrialResult]]] = defaultdict(list)
        """By group, what was timed and what is broken: the implementation and its result."""
        self.untimed: dict[tuple[str, str], int] = defaultdict(int)
        """Right cases without a time, by implementation and reason."""
        self.deselected: set[str] = set()
        """Implementations of which -k left nothing to run."""
        self.selected: set[str] = set()
        """Implementations of which it left something."""
        self._isolation = Isolation(self.settings.memory_limit)
        self._checked: dict[str, TrialResult] = {}
        self._of_files: dict[str, Planned] = {}
        self._machine: Machine | None = None

    def check(self, case: Case) -> TrialResult:
        """Check a case without timing it, once a session. An ended child is a verdict like any other."""
        if case.id not in self._checked:
            request = self.request(case, timing_budget_s=0)
            outcome = self._isolation.call("fpxbench.sweep.trial:run_trial", request, timeout_s=self.settings.timeout_s)
            result = TrialResult(verdict=outcome.failure) if outcome.value is None else outcome.read(TrialResult)
            result.verdict = with_log(result.verdict, outcome.log_tail)
            if result.verdict.status in BROKEN and self.plan.device != "cpu":
                self._isolation.recycle()   # its GPU context may be past use
            self._checked[case.id] = result
        return self._checked[case.id]

    def request(self, case: Case, **more: Any) -> TrialRequest:
        impls = [str(path) for path in self.settings.impls]
        planned = self._of_files.get(case.id)
        files = {} if planned is None else {"weight": planned.weight, "activations": planned.activations}
        return TrialRequest(case=case, device=self.plan.device, seed=self.settings.seed, impls=impls, **files, **more)

    @property
    def machine(self) -> Machine:
        """The device, its read bandwidth measured when the first case is about to be timed."""
        if self._machine is None:
            self._machine = self._prepared(Machine, "the device could not be measured",
                                           "fpxbench.checking.machine:measured", self.plan.device, None)
        return self._machine

    def _prepared(self, kind: type[T], failed: str, target: str, *arguments: object) -> T:
        outcome = self._isolation.call(target, *arguments, timeout_s=PREPARATION_TIMEOUT_S)
        try:
            return outcome.required(kind, failed)
        except (ValueError, CannotStart) as error:
            raise pytest.UsageError(f"--benchmark: {error}") from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        self.plan = self._prepared(
            Plan, "the cases could not be planned", "fpxbench.sweep.selection:make_plan", self.settings
        )
        self._of_files = {each.case.id: each for each in self.plan.cases if each.weight or each.activations}

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if file_path != CASES:
            return None
        # Not the path of an installed file, which differs between machines: --benchmark-compare goes by ids.
        return CaseFile.from_parent(parent, path=file_path, nodeid=ROOT, benchmarks=self)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, object, object]:
        """Deselect everything but benchmarks; where -k or an id picked some of a group, its baseline runs with them."""
        others = [
            item
            for item in items
            if not isinstance(item, Unloaded) and "benchmark" not in getattr(item, "fixturenames", ())
        ]
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item not in others]
        collected = _implementations(items)
        result = yield
        self.selected = _implementations(items)
        self.deselected = collected - self.selected
        restored: list[pytest.Item] = []
        wanted: list[pytest.Item] = []
        for item in items:
            baseline = item.parent.baseline if isinstance(item, CaseItem) else None
            if baseline is not None and baseline not in items and baseline not in restored:
                restored.append(baseline)
                wanted.append(baseline)
            wanted.append(item)
        items[:] = wanted
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if restored and reporter is not None:
            reporter.stats["deselected"] = [
                item for item in reporter.stats.get("deselected", []) if item not in restored
            ]
        return result

    def pytest_report_header(self) -> str:
        return f"fpxbench: profile {self.settings.profile}, seed {self.settings.seed} (--fpx-seed repeats it)"

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [*self._group_lines(), *self._untimed_lines(), *self._refused_lines()]
        if lines:
            terminalreporter.section("fpxbench")
            for line in lines:
                terminalreporter.write_line(line)

    def pytest_unconfigure(self) -> None:
        self._isolation.close()

    def _group_lines(self) -> Iterator[str]:
        for group, results in self.ended.items():
            bandwidth = f", on a machine that reads {self._machine.read_gb_per_s:.0f} GB/s" if self._machine else ""
            yield group.title + bandwidth
            for name, result in results:
                yield f"  {name:<20} {_line(name, result)}"

    def _untimed_lines(self) -> Iterator[str]:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for (name, reason), count in self.untimed.items():
            by_reason[reason].append(f"{name} ({count})")
        for reason, names in by_reason.items():
            yield f"right, not timed: {', '.join(names)}: {reason}"

    def _asked_for(self, implementation: str) -> bool:
        """Return whether -k left it. One that refuses every case has no item that -k could leave or take away: it goes
        by its name."""
        if implementation in self.deselected:
            return False
        words = re.findall(r"[\w-]+", self._keyword)
        return not self._keyword or implementation in self.selected or any(word in implementation for word in words)

    def _refused_lines(self) -> Iterator[str]:
        """Yield one line for each implementation that takes not all of the schemes, unless it was not asked for."""
        refused: dict[tuple[bool, str], list[Planned]] = defaultdict(list)
        for planned in self.plan.cases:
            if planned.refused and self._asked_for(planned.case.implementation):
                refused[planned.missing, planned.case.implementation].append(planned)
        for (missing, name), cases in refused.items():
            schemes = ", ".join(dict.fromkeys(planned.case.scheme for planned in cases))
            yield f"{'missing' if missing else 'refused'}, not run: {name}: {schemes}: {cases[0].refused}"


class CaseFile(pytest.File):
    """The root of pytest's tree of groups."""

    def __init__(self, *, benchmarks: Benchmarks, **node: Any) -> None:
        super().__init__(**node)
        self.benchmarks = benchmarks

    def collect(self) -> Iterator[pytest.Collector | pytest.Item]:
        for line in self.benchmarks.plan.not_loaded:
            path, _, error = line.partition(": ")
            yield Unloaded.from_parent(self, name=Path(path).stem, error=f"{path} could not be loaded: {error}")
        groups: dict[str, list[Case]] = defaultdict(list)
        for planned in self.benchmarks.plan.cases:
            if not planned.refused:
                groups[f"{planned.case.scheme}/{planned.case.layer}"].append(planned.case)
        for name, cases in groups.items():
            if [case.implementation for case in cases] == [BASELINE]:
                continue    # alone it is compared with nothing, and it stands in every other group
            yield BenchmarkGroup.from_parent(self, name=name, benchmarks=self.benchmarks, cases=cases)


class BenchmarkGroup(pytest.Collector):
    """The implementations of one scheme on one layer, after the dense baseline."""

    def __init__(self, *, benchmarks: Benchmarks, cases: list[Case], **node: Any) -> None:
        super().__init__(**node)
        self.benchmarks = benchmarks
        first = cases[0]
        dense = first.model_copy(update={"implementation": BASELINE, "scheme": first.activation})
        self.cases = [dense, *(case for case in cases if case.implementation != BASELINE)]
        self.scheme = first.scheme      # the baseline's own is its 16 bits
        self.title = f"{first.scheme} | {first.workload} m{first.m} {first.activation}"
        self.baseline: CaseItem | None = None
        self.baseline_samples: list[float] = []
        """Seconds a call of the baseline, once it has been timed in this group."""

    def collect(self) -> Iterable[pytest.Item]:
        items = []
        for case in self.cases:
            item = CaseItem.from_parent(self, name=case.implementation, callobj=_check_then_time, case=case)
            # No time is asked of a canary, and pytest-benchmark would warn that none was taken.
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"))
            # PyTorch's own, of itself
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"))
            clock = {} if self.benchmarks.plan.device == "cpu" else {"timer": device_clock}
            item.add_marker(pytest.mark.benchmark(group=self.title, **clock))
            items.append(item)
        self.baseline = items[0]
        return items


class CaseItem(pytest.Function):
    """One implementation in a group."""

    parent: BenchmarkGroup

    def __init__(self, *, case: Case, **node: Any) -> None:
        super().__init__(**node)
        self.case = case

    def reportinfo(self) -> tuple[Path, int, str]:
        return CASES, 0, f"{self.parent.name}::{self.name}"


class Unloaded(pytest.Item):
    """A file of implementations that cannot be imported: it fails under its name, and the others run."""

    def __init__(self, *, error: str, **node: Any) -> None:
        super().__init__(**node)
        self.error = error

    def runtest(self) -> None:
        pytest.fail(self.error, pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return CASES, 0, self.name


def _implementations(items: list[pytest.Item]) -> set[str]:
    return {item.case.implementation for item in items if isinstance(item, CaseItem)}


def device_clock() -> float:
    """Return the time in seconds, once the GPU has finished its work."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _check_then_time(request: pytest.FixtureRequest, benchmark) -> None:
    item: CaseItem = request.node
    group: BenchmarkGroup = item.parent
    case, benchmarks = item.case, group.benchmarks
    result = benchmarks.check(case)
    _require_ok(item, result)
    benchmark.extra_info.update(_metrics(case, result), seed=benchmarks.settings.seed)
    why_not = _reason_not_to_time(case, benchmark)
    if why_not is None:
        from fpxbench.integrations.pytest.pedantic_timing import time_case

        machine = benchmarks.machine
        trial = benchmarks.request(case, read_gb_per_s=machine.read_gb_per_s, cache_bytes=machine.cache_bytes)
        timed = time_case(benchmark, trial, group.baseline_samples)
        _require_ok(item, timed)
        why_not = timed.no_timing
    if why_not is not None:
        benchmarks.untimed[case.implementation, why_not] += 1
        return
    timed.accuracy = result.accuracy
    if item is group.baseline:
        group.baseline_samples = list(benchmark.stats.stats.data)
    benchmark.extra_info.update(_metrics(case, timed))
    benchmarks.ended[group].append((case.implementation, timed))


def _reason_not_to_time(case: Case, benchmark) -> str | None:
    if is_canary(case.workload) or case.m == 0:
        return "too small for a meaningful time"
    return "pytest-benchmark is disabled" if benchmark.disabled else None


def _require_ok(item: CaseItem, result: TrialResult) -> None:
    """Skip what was refused, and fail what is broken with its verdict: the traceback would be of the harness."""
    verdict = result.verdict
    if verdict.status is Status.OK:
        return
    message = f"{verdict.headline}: {verdict.summary}"
    if verdict.status not in BROKEN:
        pytest.skip(message)
    benchmarks = item.parent.benchmarks
    benchmarks.ended[item.parent].append((item.name, result))
    lines = [message, *(f"  {name}: {clipped(pretty(value), EVIDENCE_WIDTH)}"
                        for name, value in verdict.evidence.items())]
    log = _informative_lines(verdict.log_tail)
    if log:
        lines += ["  it wrote:", *("    " + line for line in log)]
    lines.append("  again: " + shlex.join(_again(item)))
    pytest.fail("\n".join(map(_printable, lines)), pytrace=False)


def _again(item: CaseItem) -> list[str]:
    """Return the command that runs just this case, on the same numbers."""
    group, case = item.parent, item.case
    settings = group.benchmarks.settings
    impls = [f"--impls={path}" for path in settings.impls]
    device = [f"--fpx-device={settings.device}"] if settings.device else []
    files = [f"--{name}={given}" for name, given in (("weights", settings.weights),
                                                     ("activations", settings.activations)) if given]
    layer = [f"--fpx-profile={settings.profile}", f"--fpx-scheme={group.scheme}",
             f"--fpx-workload={case.workload}/m{case.m}"]
    return ["pytest", "--benchmark", *impls, *device, *files, *layer, f"--fpx-seed={settings.seed}", item.nodeid]


def _line(name: str, result: TrialResult) -> str:
    """Return one line on a case: its verdict, or its speed and what limits it."""
    if result.verdict.status is not Status.OK:
        return f"{result.verdict.headline}: {result.verdict.summary}"
    timing, traffic = result.timing, result.traffic
    beside = f"{timing.speedup:.2f}x dense" if timing and timing.speedup else "baseline" if name == BASELINE else ""
    roofline = f"{traffic.roofline_fraction:.1%} of roofline" if traffic.roofline_fraction else ""
    sqnr = f"{result.accuracy.sqnr_db:.1f} dB" if result.accuracy.sqnr_db is not None else "exact"
    remarks = "; ".join(filter(None, [" ".join(result.flags), traffic.bottleneck]))
    return f"{beside:>12}  {roofline:>18}  {sqnr:>7}  {remarks}"


def _informative_lines(log: str) -> list[str]:
    """Return the end of a log; of a fatal signal what stood before it and the innermost frames, not the modules that
    were loaded."""
    lines = log.partition("\nExtension modules:")[0].strip().splitlines()
    fatal = next((number for number, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    return lines[-LOG_LINES:] if fatal is None else lines[max(0, fatal - LOG_LINES // 2):fatal + LOG_LINES // 2]


def _printable(line: str) -> str:
    """Replace what cannot be printed: a log may hold anything, a terminal's own commands too."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line.expandtabs()
    )


def _metrics(case: Case, result: TrialResult) -> dict[str, object]:
    """Return the metrics that are added to pytest-benchmark's JSON."""
    metrics: dict[str, object] = {**case.model_dump(), **result.accuracy.model_dump(), **result.traffic.model_dump()}
    if result.timing is not None:
        metrics |= {
            "speedup": result.timing.speedup,
            "speedup_ci95": result.timing.speedup_ci95,
            "flags": [str(flag) for flag in result.flags],
        }
    return {
        name: value
        for name, value in metrics.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
