"""The speed table: every row, interleaved calls, ratios within one run. No test asserts a speed."""

import json
import math
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from commands import command
from places import CHECKOUT

from fpxbench.casts import codec_timing
from fpxbench.casts.codec_speed import COPY, OWN, CallTimes, SpeedRow, measure_rows, rows
from fpxbench.casts.codec_timing import every_row, measure_row, time_interleaved
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.packing import LAYOUTS
from fpxbench.sweep.isolation import Isolation

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 1 << 30
FEW = 64 * 4096


@pytest.fixture(scope="module")
def isolation():
    with Isolation(memory_limit=4 * GIB) as shared:
        yield shared


def timed(*seconds, elements=10):
    return CallTimes(elements=elements, nbytes=5 * elements, seconds=list(seconds))


# The rows.


def test_every_format_source_layout_and_width_has_its_row():
    known = every_row()
    assert len(set(known)) == len(known)
    assert {row for row in known if row.startswith("encode/")} == {
        f"encode/{name}/{of}" for name in FORMATS for of in ("fp32", "bf16")
    }
    assert {row for row in known if row.startswith("decode/")} == {f"decode/{name}" for name in FORMATS}
    moved = {f"{layout.name}/{bits}" for layout in LAYOUTS.values() for bits in layout.widths}
    assert {row for row in known if "pack/" in row} == {f"{way}/{name}" for name in moved for way in ("pack", "unpack")}


def test_rows_are_chosen_by_globs_and_one_that_matches_none_is_named(isolation):
    assert rows(["decode/e4m3*", "pack/fp6_llm/6"], isolation) == ["decode/e4m3fn", "decode/e4m3fnuz", "pack/fp6_llm/6"]
    with pytest.raises(ValueError, match=r"matches 'decode/e9m9': they are like encode/e4m3fn/fp32"):
        rows(["decode/*", "decode/e9m9"], isolation)


# The calls of a row.


def test_calls_are_interleaved():
    called = []
    seconds = time_interleaved({name: lambda name=name: called.append(name) for name in "abc"}, budget_s=0)
    rounds = len(called) // 3
    assert called == ["a", "b", "c"] * rounds
    assert all(len(of) == rounds - 1 >= 5 for of in seconds.values()), "the first round is not counted"


def test_a_row_is_timed_for_its_budget(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def call():
        clock.now += 0.25

    monkeypatch.setattr(codec_timing.time, "perf_counter", lambda: clock.now)
    assert time_interleaved({"call": call}, budget_s=10.0) == {"call": [0.25] * 41}     # until past 10 s
    assert time_interleaved({"call": call}, budget_s=0.0) == {"call": [0.25] * codec_timing.FEWEST_ROUNDS}


@pytest.mark.parametrize(
    "row", ["encode/e4m3fn/fp32", "encode/e2m1/bf16", "decode/e5m2", "pack/planar/6", "unpack/fp6_llm/6"]
)
def test_all_entries_of_a_row_are_called_equally_often(row):
    contest = measure_row(row, FEW, budget_s=0)
    assert contest.row == row and contest.threads == 1 and OWN in contest.timed
    assert len({len(of.seconds) for of in contest.timed.values()}) == 1
    assert contest.timed[OWN].elements == FEW


@pytest.mark.parametrize(("row", "others"), [
    ("encode/e4m3fn/fp32", {"ml_dtypes", "gfloat", "torch"}), ("encode/e3m2/fp32", {"ml_dtypes", "gfloat"}),
    ("encode/e3m2/bf16", {"ml_dtypes"}), ("encode/int4/fp32", set()), ("decode/e8m0", {"ml_dtypes", "torch", COPY}),
    ("decode/e2m1", {"ml_dtypes", "gfloat", COPY}), ("unpack/bitstream/3", {COPY})
])
def test_each_row_has_the_libraries_that_do_the_same_and_why_others_are_missing(row, others):
    contest = measure_row(row, FEW, budget_s=0)
    assert set(contest.timed) == {OWN, *others}
    assert set(contest.missing) == ({"ml_dtypes", "gfloat", "torch"} - others if "pack/" not in row else set())
    assert all(contest.missing.values())
    assert all(contest.ratio(other) is not None for other in others)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"int8", "int4"}))
def test_other_libraries_convert_the_same_numbers(name, monkeypatch):
    """What they decode to is what this codec decodes to: the formats are matched rightly, and the bytes handed over."""
    kept = {}
    monkeypatch.setattr(codec_timing, "time_interleaved", lambda calls, budget_s: {
        who: kept.update({who: call()}) or [1.0] for who, call in calls.items()})
    measure_row(f"decode/{name}", FEW, 0)
    own = kept[OWN]
    for who in kept.keys() - {OWN, COPY}:
        theirs = torch.as_tensor(kept[who], dtype=torch.float32)
        assert torch.allclose(theirs, own[:len(theirs)], rtol=0, atol=0, equal_nan=True), who


def test_a_peer_that_is_not_installed_is_missing_and_the_rest_are_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    contest = measure_row("encode/e5m2/fp32", FEW, budget_s=0)
    assert contest.missing == {"ml_dtypes": "is not installed"}
    assert contest.ratio("ml_dtypes") is None and contest.ratio("torch") is not None


def test_the_product_needs_no_peer():
    code = """
        import sys
        sys.modules["ml_dtypes"] = sys.modules["gfloat"] = None
        import fpxbench.casts.codec_timing, fpxbench.casts.codec_speed, fpxbench.cli
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True).returncode == 0


# What it came to.


def test_a_ratio_compares_the_calls_of_each_round_element_for_element():
    """The machine slows down tenfold half-way, for both: the ratio does not move."""
    contest = SpeedRow(row="x", timed={OWN: timed(1, 1, 10, 10, elements=10), "slow": timed(2, 2, 20, 20, elements=5)})
    assert contest.ratio("slow") == (4, 4, 4)
    assert contest.ratio("absent") is None


def test_a_speed_is_the_medians_with_its_spread():
    own = timed(1, 2, 3, 4, 90)
    assert own.elements_per_s == pytest.approx(10 / 3) and own.gb_per_s == pytest.approx(50 / 3 / 1e9)
    assert own.spread == pytest.approx((4 - 2) / 2 / 3)


def test_a_row_whose_child_dies_has_the_reason_and_the_next_is_timed(isolation, monkeypatch):
    monkeypatch.setattr("fpxbench.casts.codec_speed.MEASURE_ROW", "harmful:segfault_on_e5m2")
    died, held = measure_rows(["decode/e5m2", "decode/e4m3fn"], isolation, FEW, 0)
    assert "SIGSEGV" in died.died and not died.timed and died.ratio("torch") is None
    assert held.died == "" and held.timed


# The command and the benchmark.


def test_the_command_prints_one_json_object_a_row():
    done = command("codec --json --elements 1 --only decode/e4m3fn --only pack/planar/6")
    assert done.exit_code == 0, done.output
    held = [SpeedRow.model_validate_json(line) for line in done.stdout.splitlines()]
    assert [contest.row for contest in held] == ["decode/e4m3fn", "pack/planar/6"]
    assert all(contest.timed[OWN].elements == FEW for contest in held)


def test_the_command_prints_speeds_ratios_and_how_they_were_measured(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = command("codec --elements 1 --only */e4m3fn* --only */fp6_llm/6")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["e4m3fn", "fp32"] in [line[:2] for line in lines] and ["fp6_llm", "6", "unpack"] in [
        line[:3] for line in lines
    ]
    assert "262,144 numbers or codes per call" in done.stdout and "threads" in done.stdout


def test_the_benchmark_imports_no_pytorch_and_asks_for_rows_that_there_are():
    code = """
        import json, sys
        import benchmarks.codec as module
        assert not {"torch", "ml_dtypes", "gfloat"} & set(sys.modules)
        print(json.dumps([module.ENCODED, module.DECODED, module.MOVED]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    asked = [row for group in json.loads(done.stdout) for row in group]
    assert asked and set(asked) <= set(every_row())


def test_what_the_benchmark_tracks_is_worse_when_it_is_more():
    from benchmarks.codec import metrics_of

    quick = SpeedRow(row="x", timed={OWN: timed(1), "ml_dtypes": timed(2), COPY: timed(0.5)})
    slow = SpeedRow(row="x", timed={OWN: timed(3), "ml_dtypes": timed(2), COPY: timed(0.5)})
    assert metrics_of(quick) == {"time": pytest.approx(1e8), "against_ml_dtypes": 0.5, "against_copy": 2}
    assert all(metrics_of(slow)[name] > value for name, value in metrics_of(quick).items())


def test_what_a_row_lacks_is_skipped_by_asv():
    from benchmarks.codec import metrics_of

    assert all(map(math.isnan, metrics_of(SpeedRow(row="x", died="was ended")).values()))
