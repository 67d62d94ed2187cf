"""Series over builds: put together from records of many builds, machines and ages, without reading history every
night."""

import json
import shutil
import threading

import numpy as np
import polars
import pytest
from nights import EAGER, FUSED, nightly, nights
from sample_records import CPU, GPU, record

from fpxbench.builds.timeline import Timeline, commit_hash
from fpxbench.records.record import Build
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions import series_index
from fpxbench.regressions.series import panels
from fpxbench.regressions.series_index import NAME, normalized

CRASH = Verdict(status=Status.CRASH, summary="died by SIGSEGV")


def read(results, **more):
    """Return all panels, and the messages about them."""
    found, said = [], []
    for of_machine, troubles in panels(results, **more):
        found += of_machine
        said += map(str, troubles)
    return found, said


def release(version, variant="cpu", date=None, **more):
    return Build(torch=f"{version}+{variant}", channel="release", variant=variant, date=date, **more)


# ---- what is in a series


def test_every_case_has_a_point_for_every_build_that_it_was_measured_on(tmp_path):
    nights(tmp_path, 3, edit=lambda night, one: None if night == 1 and one.case.id == EAGER.id else one)
    panel, = read(tmp_path)[0]
    assert (panel.machine, panel.channel, panel.variant) == ("nvidia-h100", "nightly", "cu130")
    assert panel.tags == ["nightly-20260601", "nightly-20260602", "nightly-20260603"]
    missing = panel.cases.index(EAGER.id), 1
    assert panel.verdict[missing] == -1 and np.isnan(panel.metrics["median_us"][missing])
    assert (np.delete(panel.verdict.ravel(), np.ravel_multi_index(missing, panel.verdict.shape)) >= 0).all()


def test_a_failure_is_a_point_and_not_missing_data(tmp_path):
    nights(
        tmp_path,
        3,
        (FUSED,),
        edit=lambda night, one: record(FUSED, CRASH, machine=GPU, build=one.build) if night == 1 else one,
    )
    panel, = read(tmp_path)[0]
    assert [panel.verdicts[number].status for number in panel.verdict[0]] == ["ok", "crash", "ok"]
    assert np.isnan(panel.metrics["median_us"][0, 1])


def test_the_metrics_are_those_of_the_records(tmp_path):
    nights(tmp_path, 1, (FUSED,))
    stored, = Store(tmp_path).read_all()[0]
    panel, = read(tmp_path)[0]
    expected = {
        "median_us": stored.timing.median_us,
        "baseline_us": stored.timing.baseline_us,
        "relative_error": stored.accuracy.relative_error,
        "sqnr_db": stored.accuracy.sqnr_db,
        "packed_bytes": stored.traffic.packed_bytes,
        "kernels_launched": stored.traffic.kernels_launched,
        "peak_bytes": stored.traffic.peak_bytes,
    }
    assert {name: values.item() for name, values in panel.metrics.items()} == expected
    assert (panel.outputs.item(), panel.weights.item()) == (4096, 4096 * 4096)


def test_of_a_case_that_was_measured_twice_the_last_counts(tmp_path):
    nights(tmp_path, 1, (FUSED,), seed=1)
    nights(tmp_path, 1, (FUSED,), seed=2)
    last = Store(tmp_path).read_all()[0][-1]
    assert read(tmp_path)[0][0].metrics["median_us"].item() == last.timing.median_us


# ---- the order


def test_builds_are_in_the_order_in_which_they_came_out_not_in_that_of_their_measurement(tmp_path):
    """The machine's clock is wrong, and the newest build was measured first."""
    clocks = iter(["2099-01-01T00:00:00+00:00", "1970-01-01T00:00:00+00:00", "2031-05-05T00:00:00+00:00"])
    for build in (nightly(9), nightly(2), nightly(5)):
        Store(tmp_path).append(record(FUSED, CRASH, build=build).model_copy(update={"started_at": next(clocks)}))
    assert read(tmp_path)[0][0].tags == ["nightly-20260603", "nightly-20260606", "nightly-20260610"]


def test_a_release_without_a_date_stands_before_every_later_version(tmp_path):
    for build in (release("2.14.1", date="2026-11-01"), release("2.9.1"), release("2.13.0")):
        Store(tmp_path).append(record(FUSED, CRASH, build=build))
    assert read(tmp_path)[0][0].tags == ["2.9.1", "2.13.0", "2.14.1"]


def test_the_timeline_knows_dates_that_records_do_not(tmp_path):
    late_patch = release("2.9.2")
    for build in (release("2.13.0", date="2026-07-08"), late_patch):
        Store(tmp_path / "results").append(record(FUSED, CRASH, build=build))
    timeline = Timeline(tmp_path / "timeline")
    timeline.add([late_patch.model_copy(update={"date": "2026-08-01"})])
    panel, = read(tmp_path / "results", timeline=timeline)[0]
    assert panel.tags == ["2.13.0", "2.9.2"]
    assert [build.date for build in panel.builds] == ["2026-07-08", "2026-08-01"]


def test_releases_nightlies_and_variants_are_histories_of_their_own(tmp_path):
    for build in (release("2.14.1", "cu130"), nightly(1), nightly(2), nightly(1, "rocm7.2")):
        Store(tmp_path).append(record(FUSED, CRASH, build=build, machine=GPU))
    assert [(panel.channel, panel.variant, len(panel.builds)) for panel in read(tmp_path)[0]] == [
        ("nightly", "cu130", 2), ("release", "cu130", 1), ("nightly", "rocm7.2", 1)]


def test_source_builds_of_one_version_are_told_apart_by_commit(tmp_path):
    for git in ("a" * 40, "b" * 40):
        Store(tmp_path).append(
            record(FUSED, CRASH, build=Build(torch="2.15.0a0", git=git, channel="source", variant="cpu"))
        )
    panel, = read(tmp_path)[0]
    assert [build.git for build in panel.builds] in (["a" * 40, "b" * 40], ["b" * 40, "a" * 40])
    assert all(build.key == commit_hash(build) for build in panel.builds)


# ---- bad input


def test_two_machines_of_one_name_are_two_series_and_it_is_said(tmp_path):
    nights(tmp_path, 2, (FUSED,))
    nights(tmp_path, 2, (FUSED,), machine=GPU.model_copy(update={"device": "NVIDIA H200"}), first=2)
    found, said = read(tmp_path)
    assert [(panel.device, len(panel.builds)) for panel in found] == [
        ("NVIDIA H100 80GB HBM3 (sm_90)", 2),
        ("NVIDIA H200 (sm_90)", 2),
    ]
    assert said == [
        "nvidia-h100 is the name of 2 machines: NVIDIA H100 80GB HBM3 (sm_90), NVIDIA H200 (sm_90); each has its own "
        "series. Rename one with FPX_MACHINE or --machine"
    ]


def test_lines_that_are_no_records_are_named_and_cost_only_themselves(tmp_path):
    nights(tmp_path, 2, (FUSED,))
    path, _ = Store(tmp_path).files()
    stored = json.loads(path.read_text())
    path.write_text(
        "{half\n" + json.dumps(stored | {"schema": 99}) + "\n" + json.dumps(stored) + "\n" + json.dumps(stored)[:200]
    )
    panel, = read(tmp_path)[0]
    said = read(tmp_path)[1]
    assert len(panel.builds) == 2
    assert [line.split(": ")[0] for line in said] == [f"{path}:1", f"{path}:2", f"{path}:4"]
    assert "written by a newer fpxbench" in said[1]


def test_a_record_of_an_older_fpxbench_has_the_fields_that_it_has(tmp_path):
    nights(tmp_path, 1, (FUSED,))
    path, = Store(tmp_path).files()
    stored = json.loads(path.read_text())
    for field in ("overhead_s", "about", "source", "seed", "elapsed_s"):
        del stored[field]
    del stored["build"]["key"], stored["traffic"]["peak_bytes"], stored["machine"]["cache_bytes"]
    path.write_text(json.dumps(stored))
    panel, = read(tmp_path)[0]
    assert panel.builds[0].key == commit_hash(nightly(0))
    assert np.isnan(panel.metrics["peak_bytes"].item()) and panel.metrics["median_us"].item() > 0


def test_a_build_whose_version_is_none_is_left_out_and_named(tmp_path):
    nights(tmp_path, 1, (FUSED,))
    Store(tmp_path).append(
        record(FUSED, CRASH, machine=GPU, build=Build(torch="somebodys", channel="source", variant="cu130"))
    )
    found, said = read(tmp_path)
    assert [panel.channel for panel in found] == ["nightly"]
    assert said == ["'somebodys' is not a version, so its records have no place in time: left out"]


def test_a_machine_without_records_is_a_mistake_that_names_those_that_have_some(tmp_path):
    nights(tmp_path, 1, (FUSED,))
    with pytest.raises(ValueError, match="no records of machine 'h100' in .*: there are nvidia-h100"):
        read(tmp_path, machine="h100")


# ---- history is not read every night


@pytest.fixture
def files_read(monkeypatch):
    names = []
    really = Store.read
    monkeypatch.setattr(Store, "read", lambda self, path: names.append(path.stem) or really(self, path))
    return names


def test_a_nights_run_reads_the_new_build_and_nothing_else(tmp_path, files_read):
    nights(tmp_path, 5)
    assert len(read(tmp_path)[0][0].builds) == 5
    assert len(files_read) == 5
    files_read.clear()
    nights(tmp_path, 1, first=5)
    assert len(read(tmp_path)[0][0].builds) == 6
    assert files_read == ["2.15.0.dev20260606-cu130"]


def test_a_build_that_was_measured_again_is_read_again_and_one_that_is_gone_is_forgotten(tmp_path, files_read):
    nights(tmp_path, 3, (FUSED,))
    read(tmp_path)
    files_read.clear()
    first, second, _ = Store(tmp_path).files()
    Store(tmp_path).append(record(FUSED, CRASH, machine=GPU, build=nightly(0)))
    second.unlink()
    panel, = read(tmp_path)[0]
    assert files_read == [first.stem]
    assert panel.tags == ["nightly-20260601", "nightly-20260603"]
    assert panel.verdicts[panel.verdict[0, 0]].status == "crash"


def part(results):
    """Return the only part of the index."""
    path, = (results / "nvidia-h100" / NAME).glob("*.parquet")
    return path


def of_version(path, version):
    footer = json.loads(polars.read_parquet_metadata(path)["fpxbench"]) | {"version": version}
    polars.read_parquet(path).write_parquet(path, metadata={"fpxbench": json.dumps(footer)})


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"no Parquet at all" * 100),
    lambda path: path.write_bytes(path.read_bytes()[:-50]),
    lambda path: of_version(path, 1),
    lambda path: polars.DataFrame({"a": [1]}).write_parquet(path),
], ids=["empty", "garbage", "cut off", "of another version", "without a footer"])
def test_a_part_that_cannot_be_used_is_made_anew_and_it_is_said(tmp_path, damage):
    nights(tmp_path, 2)
    expected = read(tmp_path)[0][0].metrics["median_us"]
    damage(part(tmp_path))
    found, said = read(tmp_path)
    assert np.array_equal(found[0].metrics["median_us"], expected)
    assert len(said) == 1 and said[0].startswith(f"{part(tmp_path)} cannot be used and is rebuilt from the records")
    assert read(tmp_path)[1] == []


def test_rows_that_cannot_be_read_are_made_anew_and_it_is_said(tmp_path):
    nights(tmp_path, 2)
    expected = read(tmp_path)[0][0].metrics["median_us"]
    whole = part(tmp_path).read_bytes()
    footer = 8 + int.from_bytes(whole[-8:-4], "little")
    part(tmp_path).write_bytes(whole[:4] + b"\xff" * (len(whole) - 4 - footer) + whole[-footer:])
    found, said = read(tmp_path)
    assert np.array_equal(found[0].metrics["median_us"], expected)
    assert len(said) == 1 and "is damaged and was rebuilt" in said[0]


def test_where_nothing_can_be_written_every_record_is_read_and_it_is_said(tmp_path, files_read):
    nights(tmp_path, 2)
    (tmp_path / "nvidia-h100" / NAME).write_text("a file in the folder's place")
    for _ in range(2):
        found, said = read(tmp_path)
        assert len(found[0].builds) == 2
        assert len(said) == 1 and said[0].endswith("missing rows are read from the records each time")
    assert len(files_read) == 4


def test_a_reading_that_is_cut_off_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    nights(tmp_path, 2)
    read(tmp_path)
    nights(tmp_path, 1, first=2)

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(series_index, "frame_of", cut_off)
        with pytest.raises(KeyboardInterrupt):
            read(tmp_path)
    assert len(read(tmp_path)[0][0].builds) == 3


def test_several_may_read_at_once(tmp_path):
    nights(tmp_path, 6)
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(read(tmp_path)[0][0].builds))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [6] * 6


def test_a_copy_of_the_results_without_the_index_says_the_same(tmp_path):
    nights(tmp_path / "here", 4)
    here = read(tmp_path / "here")[0][0]
    shutil.copytree(tmp_path / "here", tmp_path / "there", ignore=shutil.ignore_patterns(NAME))
    there = read(tmp_path / "there")[0][0]
    assert here.cases == there.cases and np.array_equal(here.metrics["median_us"], there.metrics["median_us"])


def test_a_machine_is_read_at_a_time(tmp_path, files_read):
    nights(tmp_path, 2)
    nights(tmp_path, 3, machine=CPU)
    assert len(read(tmp_path, machine=CPU.name)[0][0].builds) == 3
    assert len(files_read) == 3


# ---- what varies in a failure's words


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("segfault at 0x7ffd1200 in kernel", "segfault at 0x55aa in kernel"),
        ("raised RuntimeError: /tmp/a1/x.py:12: bad", "raised RuntimeError: /home/me/x.py:99: bad"),
        ("raised E: cannot read /tmp/tmpab12cd34/cache", "raised E: cannot read /tmp/tmpzz99yy88/cache"),
        ("took 12.5 s of 10 s", "took 13.1 s of 10 s"),
        (
            "12 of 4096 outputs are not finite, the first at [0, 77]: nan",
            "3 of 4096 outputs are not finite, the first at [0, 9]: inf",
        ),
        ("died in pid 1234", "died in pid 99"),
        ("relative error 0.0213", "relative error 3.1e-05"),
        ("tried to allocate 2.00 GiB", "tried to allocate 3.50 GiB"),
    ],
)
def test_what_varies_from_run_to_run_does_not_make_another_failure(one, another):
    assert normalized(one) == normalized(another)


@pytest.mark.parametrize(("one", "another"), [
    ("died by SIGSEGV", "died by SIGABRT"),
    ("expected 4 but got 8", "expected 4 but got 16"),
    ("Unsupported conversion from f16 to f8E5M2FNUZ", "Unsupported conversion from f32 to f8E5M2FNUZ"),
    ("not supported on sm_80", "not supported on sm_90"),
])
def test_other_words_make_another_failure(one, another):
    assert normalized(one) != normalized(another)
