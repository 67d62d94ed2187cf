"""One odd record ends nobody's report: whatever lines the results hold, `report` and `regressions` exit with 0.

What cannot be read is named on stderr; the pages of all other records are made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import sample_records as sample
from commands import command
from hypothesis import HealthCheck, Phase, example, given, settings, strategies as st
from nights import FUSED, GPU, nightly, nights
from odd_values import ODD, odd_ones, paths, with_value
from typer.testing import Result

from fpxbench.casts.cast_record import Behaviour, CastRecord, DifferingInputs, Example, InputKind
from fpxbench.casts.conversion import Conversion
from fpxbench.records.record import Record, StoredRecord
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict, classify_death, classify_exception
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome, Interval
from fpxbench.reports.targets.support_table import FILE as MATRIX_FILE, SHIPPED
from fpxbench.targets.matrix import Matrix

pytestmark = pytest.mark.usefixtures("few_targets")

CRASHING = FUSED.model_copy(update={"scheme": "e5m2-row"})
LINES_OF_A_FILE = 400
FUZZED = partial(settings, deadline=None, suppress_health_check=list(HealthCheck),
                 phases=(Phase.explicit, Phase.reuse, Phase.generate))      # an example takes seconds: none is shrunk

CAST = CastRecord(
    conversion=Conversion(operation="cast", source="fp32", target="e4m3fn", engine="eager", device="cpu"), machine=GPU,
    build=nightly(3), verdict=Verdict(status=Status.WRONG, summary="turns NaN into a number"), inputs=10, differing=2,
    inputs_digest="abc", behaviour=Behaviour(overflow="nan", nan_codes=["0x7f"]),
    differences=[DifferingInputs(kind=InputKind.NAN, count=2, permitted=False, examples=[
        Example(input="0x7fc0", input_value="nan", got="0x00", got_value="0", expected="0x7f", expected_value="nan")])],
)
CONFIRMATION = Confirmation(
    case=FUSED, metric="time", machine=GPU, good=nightly(1), build=nightly(3), outcome=ConfirmationOutcome.CONFIRMED,
    message="+9.7%", time=Interval(value=1.097, low=1.08, high=1.11, level=0.9999, pairs=15), good_counts={"ok": 5},
)


def results_of(folder: Path) -> Path:
    """Write the results of four nights of two cases, of which one crashes in the end; some cases of a CPU; a cast; a
    confirmation."""
    results = folder / "results"
    crash = Verdict(status=Status.CRASH, signal="SIGABRT", exit_code=-6, summary="died", log_tail="LLVM ERROR",
                    evidence={"table": {"0x38": [1.0, 0.5]}})

    def edit(night: int, one: Record) -> Record:
        crashes = one.case == CRASHING and night == 3
        return sample.record(CRASHING, crash, machine=GPU, build=nightly(night)) if crashes else one

    nights(results, 4, (FUSED, CRASHING), edit=edit)
    sample.write(results, sample.varied()[:12])
    Store(results, CastRecord).append(CAST)
    Store(results, Confirmation).append(CONFIRMATION)
    return results


def add(results: Path, of: type[StoredRecord], lines: Iterable[str]) -> list[Path]:
    """Append lines to files of such records, `LINES_OF_A_FILE` to each; the file names need not be those of a build."""
    lines, added = list(lines), []
    for start in range(0, len(lines), LINES_OF_A_FILE):
        path = results / GPU.name / of.FOLDER / f"odd{start}-cu130.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="surrogatepass") as file:
            file.write("\n".join(lines[start:start + LINES_OF_A_FILE]) + "\n")
        added.append(path)
    return added


def asked(*arguments: str) -> Result:
    done = command(*arguments)
    assert done.exit_code == 0, (arguments, done.exception, done.output[-2000:])
    return done


def assert_told(results: Path, site: Path, *kinds: type[StoredRecord]) -> None:
    """Assert that both commands exit with 0 and name every broken line they read; the report has its first page."""
    told = json.loads(asked("report", "--results", str(results), "--output", str(site), "--json").stdout)
    named = set(told["broken_lines"] + told["troubles"])
    assert {str(line) for of in kinds for line in Store(results, of).read_all()[1]} <= named
    assert not [line for line in named if "could not be made" in line], "a page cannot show it"
    index = (site / "index.html").read_text(encoding="utf-8")
    assert FUSED.implementation in index
    regressions = json.loads(asked("regressions", "--all", "--results", str(results), "--json").stdout)
    assert {str(line) for line in Store(results).read_all()[1]} <= set(regressions["troubles"])


@pytest.mark.parametrize("of", [Record, CastRecord, Confirmation])
def test_records_with_one_odd_field_are_shown_or_skipped_and_named(tmp_path: Path, of: type[StoredRecord]) -> None:
    results = results_of(tmp_path)
    [line, *_] = (Store(results, of).file(GPU.name, nightly(3)).read_text().splitlines())
    odd = list(odd_ones(line))
    assert len(odd) > 1000
    add(results, of, odd)
    skipped = Store(results, of).read_all()[1]
    assert len(odd) / 4 < len(skipped) < len(odd), "odd lines are refused, and others are left"
    assert_told(results, tmp_path / "site", of)


@FUZZED(max_examples=6)
@given(seed=st.integers(0, 2**32), log=st.text(max_size=6000), garbage=st.lists(st.binary(max_size=300), max_size=20))
@example(seed=2152, log="", garbage=[])     # a crash of a build that cannot be on the timeline
@example(seed=1528, log="", garbage=[])     # cases of one file whose builds are on timelines of different lengths
def test_records_with_several_odd_fields_logs_and_garbage_end_no_report(
        tmp_path_factory: pytest.TempPathFactory, seed: int, log: str, garbage: list[bytes]) -> None:
    results = results_of(tmp_path_factory.mktemp("fuzz"))
    rng = random.Random(seed)
    verdict = Verdict(status=Status.CRASH, log_tail=log, summary=log[:500])
    crash = sample.record(FUSED, verdict, machine=GPU, build=nightly(7))
    for of, whole in ((Record, crash), (CastRecord, CAST), (Confirmation, CONFIRMATION)):
        lines = []
        for _ in range(40):
            document = json.loads(whole.to_json())
            for path in rng.sample(list(paths(document)), rng.randint(1, 3)):
                try:
                    document = with_value(document, path, rng.choice(ODD))
                except (KeyError, IndexError, TypeError):
                    continue    # an earlier change has taken its place away
            lines.append(json.dumps(document))
        [path] = add(results, of, lines)
        with open(path, "ab") as file:
            file.write(b"\n".join(garbage) + b"\n")
    assert_told(results, results.parent / "site", Record, CastRecord, Confirmation)


@FUZZED(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_an_odd_matrix_of_targets_ends_no_report(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("targets")
    rng = random.Random(seed)
    document = small_matrix()
    document["generated"] = "2030-01-01T00:00:00Z"      # newer than the package's, so that it is chosen
    for path in rng.sample(list(paths(document)), rng.randint(1, 3)):
        document = with_value(document, path, rng.choice(ODD)) if _exists(document, path) else document
    (folder / "results").mkdir()
    (folder / "results" / MATRIX_FILE).write_text(json.dumps(document))
    report = asked("report", "--results", str(folder / "results"), "--output", str(folder / "site"), "--json")
    try:
        Matrix.model_validate(document)
    except ValueError:
        assert MATRIX_FILE in " ".join(json.loads(report.stdout)["broken_lines"])
    assert (folder / "site" / "index.html").is_file()


def small_matrix() -> dict:
    """Return the package's matrix with few of its probes."""
    document = json.loads(SHIPPED.read_text(encoding="utf-8"))
    document["probes"] = document["probes"][::60]
    return document


def _exists(document: object, path: tuple[str | int, ...]) -> bool:
    try:
        for step in path:
            document = document[step]   # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return False
    return True


@given(text=st.text(max_size=4096), exit_code=st.integers(-70, 256))
def test_whatever_a_log_holds_it_has_a_verdict(text: str, exit_code: int) -> None:
    for verdict in (classify_death(exit_code, text), classify_exception("RuntimeError", text, text)):
        assert verdict.status is not Status.OK and len(verdict.summary) < 1000
