"""The series index: whatever happens to the records, it says what a rebuilt index says, and reads little."""

import os
import random
import shutil
import threading

import numpy as np
import pytest
from nights import EAGER, FUSED, nightly, nights, slower
from sample_records import CPU, GPU, case, record

from fpxbench.records.record import Build
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions import series_index
from fpxbench.regressions.decision_rule import detect
from fpxbench.regressions.result_changes import find_changes
from fpxbench.regressions.series import panels
from fpxbench.regressions.series_index import NAME, part_of

CASES = (FUSED, EAGER, case("dense", "bf16"))
CRASH = Verdict(status=Status.CRASH, summary="died by SIGSEGV after 12.5 s")


def content(results):
    """Return everything that series say, as plain values."""
    found = []
    for of_machine, troubles in panels(results):
        for panel in of_machine:
            arrays = [*panel.metrics.values(), panel.verdict, panel.source, panel.seed, panel.outputs, panel.weights]
            found.append([panel.machine, panel.device, panel.variant, panel.channel, panel.cases, panel.builds,
                          panel.tags, panel.verdicts, [array.tobytes() for array in arrays]])
        found.append([trouble.removeprefix(str(results)) for trouble in troubles])
    return found


def made_anew(results):
    """Return what a copy of the records says that has no index."""
    copy = results.parent / "copy"
    shutil.copytree(results, copy, ignore=shutil.ignore_patterns(NAME))
    try:
        return content(copy)
    finally:
        shutil.rmtree(copy)


def any_file(rng, results):
    return rng.choice(Store(results).files())


def add_night(rng, results):
    nights(results, 1, CASES[:rng.randint(1, 3)], first=rng.randint(0, 70), seed=rng.random())


def measure_again(rng, results):
    Store(results).append(record(rng.choice(CASES), CRASH, machine=rng.choice([GPU, CPU]), build=nightly(3)))


def another_device(rng, results):
    other = GPU.model_copy(update={"device": "NVIDIA H200"})
    Store(results).append(record(FUSED, CRASH, machine=other, build=nightly(rng.randint(0, 9))))


def add_release(rng, results):
    build = Build(torch=f"2.{rng.randint(9, 12)}.0+cu130", channel="release", variant="cu130")
    Store(results).append(record(FUSED, CRASH, machine=GPU, build=build))


def remove(rng, results):
    if len(Store(results).files()) > 1:
        any_file(rng, results).unlink()


def rename(rng, results):
    path = any_file(rng, results)
    path.rename(path.with_name(f"a-copy-{rng.random()}.jsonl"))


def rewrite_at_the_same_size_and_time(rng, results):
    path = any_file(rng, results)
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"median_us":1', b'"median_us":2').replace(b'"crash"', b'"wrong"'))
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut_short(rng, results):
    path = any_file(rng, results)
    os.truncate(path, max(1, path.stat().st_size - 700))


def touch(rng, results):
    any_file(rng, results).touch()


def lose_a_part(rng, results):
    for path in list(results.glob(f"*/{NAME}/*.parquet"))[:1]:
        path.unlink()


WHAT_HAPPENS = (add_night, add_night, measure_again, another_device, add_release, remove, rename,
                rewrite_at_the_same_size_and_time, cut_short, touch, lose_a_part)


@pytest.mark.parametrize("seed", range(3))
def test_an_index_that_was_brought_up_to_date_says_what_one_that_is_made_anew_says(tmp_path, seed):
    rng, results = random.Random(seed), tmp_path / "results"
    add_night(rng, results)
    for happens in rng.sample(WHAT_HAPPENS, len(WHAT_HAPPENS)):
        happens(rng, results)
        assert content(results) == made_anew(results), happens.__name__


def test_the_detector_finds_in_the_index_what_it_finds_in_the_records(tmp_path):
    nights(tmp_path, 45, CASES, noise=0.01, edit=slower(1.1, 36))
    records = latest(Store(tmp_path).read_all()[0])
    names, builds = (sorted({get(one) for one in records}) for get in (lambda r: r.id, lambda r: r.build.date))
    times = np.full((2, len(names), len(builds)), np.nan)
    for one in records:
        times[:, names.index(one.id), builds.index(one.build.date)] = one.timing.median_us, one.timing.baseline_us
    of_records = [(names[change.row], change.first, change.z) for change in detect(*times)]
    (panel,), _ = next(panels(tmp_path))
    of_index = [(panel.cases[change.row], change.first, change.z)
                for change in detect(panel.metrics["median_us"], panel.metrics["baseline_us"])]
    assert of_index == of_records
    assert any(name == FUSED.id and first == 36 for name, first, _ in of_index)


# ---- what is read


@pytest.fixture
def opened(monkeypatch):
    """Return the names of records files as they are opened, and of parts as they are written."""
    names = []

    def count(place, name, label):
        really = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *arguments: names.append(label(*arguments)) or really(*arguments))

    count(Store, "read", lambda self, path: path.stem)
    count(series_index, "file_state", lambda path: path.stem)
    count(series_index.Part, "write", lambda self, path: path.stem)
    return names


def test_a_night_opens_its_own_records_and_changes_one_part(tmp_path, opened):
    nights(tmp_path, 70, (FUSED,))
    content(tmp_path)
    assert len(list(tmp_path.glob(f"*/{NAME}/*.parquet"))) == 3
    opened.clear()
    content(tmp_path)
    assert opened == [], "nothing new, nothing opened"
    nights(tmp_path, 1, (FUSED,), first=70)
    content(tmp_path)
    assert opened == [nightly(70).stem, nightly(70).stem, "2026-08"]


def test_a_file_whose_time_alone_changed_is_compared_and_not_read(tmp_path, opened):
    nights(tmp_path, 2, (FUSED,))
    content(tmp_path)
    opened.clear()
    path = Store(tmp_path).files()[0]
    os.utime(path)
    content(tmp_path)
    assert opened == [path.stem, "2026-06"], "hashed, and its new time is noted"


def test_the_results_folder_is_listed_once_however_many_machines_it_holds(tmp_path, monkeypatch):
    machines = [GPU.model_copy(update={"name": f"gpu-{number}"}) for number in range(4)]
    for machine in machines:
        nights(tmp_path, 2, (FUSED,), machine=machine)
    listed = []
    really = Store.files
    monkeypatch.setattr(Store, "files", lambda self, machine=None: listed.append(machine) or really(self, machine))
    find_changes(tmp_path)
    assert listed.count(None) == 1, "the confirmations"
    assert sorted(filter(None, listed)) == [machine.name for machine in machines]


def test_records_that_come_while_it_is_read_are_all_there_in_the_end(tmp_path):
    nights(tmp_path, 2, (FUSED,))
    failed = []

    def reads():
        try:
            for _ in range(5):
                content(tmp_path)
        except Exception as error:      # a thread's exception would be lost
            failed.append(error)

    readers = [threading.Thread(target=reads) for _ in range(2)]
    for reader in readers:
        reader.start()
    nights(tmp_path, 20, CASES, first=2)
    for reader in readers:
        reader.join()
    assert failed == []
    (panel,), _ = next(panels(tmp_path))
    assert len(panel.builds) == 22 and (panel.verdict[:, 2:] >= 0).all()


@pytest.mark.parametrize(("stem", "part"), [
    ("2.15.0.dev20261120-cu130", "2026-11"), ("2.13.0-cpu", "2.13"), ("2.13.1-rocm7.2", "2.13"),
    ("2.15.0a0-gitabc-cpu", "2.15"), ("..-etc-passwd", "other"), ("99999.1-cpu", "other")])
def test_a_part_holds_a_month_of_nightlies_or_a_minor_version(stem, part):
    assert part_of(stem) == part
