"""Records on disk: nothing lost, nothing broken passed over in silence."""

import subprocess
import sys

import pytest
from places import HELPERS
from sample_records import BUILD, CPU, GPU, GPU_BUILD, case, record

from fpxbench.records import store as stores
from fpxbench.records.record import Record
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status, Verdict


def three(store):
    for m in (1, 4, 16):
        store.append(record(case(m=m), speedup=1.1))
    return store.file(CPU.name, BUILD)


def test_records_lie_by_machine_and_build(tmp_path):
    store = Store(tmp_path)
    store.append(record(case(), speedup=1.5))
    store.append(record(case(), speedup=2.5, machine=GPU, build=GPU_BUILD))
    assert [path.relative_to(tmp_path).as_posix() for path in store.files()] == [
        "cpu-epyc-2c/records/2.13.0-cpu.jsonl", "nvidia-h100/records/2.13.0-cu130.jsonl",
    ]
    records, broken = store.read_all()
    assert [r.machine.name for r in records] == ["cpu-epyc-2c", "nvidia-h100"] and not broken


def test_a_broken_line_is_reported_with_its_number_and_the_others_are_read(tmp_path):
    store = Store(tmp_path)
    path = three(store)
    lines = path.read_bytes().splitlines()
    newer = lines[0].replace(b'"schema":%d' % Record.SCHEMA, b'"schema":%d' % (Record.SCHEMA + 1))
    damaged = [lines[0], b"{not json", b"", b"\xff\xfe\x00", lines[1], b"[]", newer, b'{"schema":1}', lines[2]]
    path.write_bytes(b"\n".join(damaged) + b"\n")
    records, broken = store.read(path)
    assert [r.case.m for r in records] == [1, 4, 16]
    assert [line.number for line in broken] == [2, 4, 6, 7, 8]
    assert all(str(line).startswith(f"{path}:{line.number}: ") and str(line).endswith("; skipped") for line in broken)
    assert f"newer fpxbench than this one (which reads schema {Record.SCHEMA} and older)" in broken[3].reason


@pytest.mark.parametrize("cut", [1, 100, 400])
def test_a_line_torn_off_by_a_kill_costs_only_itself(tmp_path, cut):
    store = Store(tmp_path)
    path = three(store)
    path.write_bytes(path.read_bytes()[:-cut])
    store.append(record(case(m=64), speedup=1.1))
    store.append(record(case(m=512), speedup=1.1))
    records, broken = store.read(path)
    # Losing only the newline loses nothing.
    assert [r.case.m for r in records] == ([1, 4, 16, 64, 512] if cut == 1 else [1, 4, 64, 512])
    assert [line.number for line in broken] == ([] if cut == 1 else [3])


def test_a_line_too_long_to_be_a_record_is_reported_without_being_read_whole(tmp_path, monkeypatch):
    store = Store(tmp_path)
    path = three(store)
    lines = path.read_bytes().splitlines()
    monkeypatch.setattr(stores, "MAX_LINE_BYTES", max(map(len, lines)) + 1)
    path.write_bytes(b"\n".join([lines[0], b"x" * 100_000, lines[1]]) + b"\n")
    records, broken = store.read(path)
    assert [r.case.m for r in records] == [1, 4]
    assert [(line.number, "longer than" in line.reason) for line in broken] == [(2, True)]


APPENDER = """
import sys
from sample_records import case, record
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
log = sys.argv[2] * 4096
for m in range(int(sys.argv[3])):
    Store(sys.argv[1]).append(record(case(workload="w" + sys.argv[2], m=m), Verdict(status=Status.CRASH, log_tail=log)))
"""


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    writers, each = "abc", 150
    here = HELPERS
    running = [
        subprocess.Popen([sys.executable, "-c", APPENDER, tmp_path, name, str(each)], cwd=here) for name in writers
    ]
    assert [process.wait(600) for process in running] == [0] * len(writers)
    records, broken = Store(tmp_path).read_all()
    assert not broken
    assert {r.case.id for r in records} == {case(workload="w" + name, m=m).id for name in writers for m in range(each)}
    assert len(records) == len(writers) * each


def test_the_latest_record_of_a_case_counts_and_builds_and_machines_stay_apart():
    first, second = record(case(), speedup=1.1), record(case(), Verdict(status=Status.CRASH))
    gpu, other = record(case(), speedup=2.0, machine=GPU, build=GPU_BUILD), record(case(m=4), speedup=1.0)
    assert latest([first, gpu, other, second]) == [second, gpu, other]


def test_a_folder_without_records_has_none(tmp_path):
    assert Store(tmp_path / "nowhere").read_all() == ([], [])


@pytest.mark.parametrize("machine", ["../up", "a/b", "", ".."])
def test_a_machine_whose_name_is_a_path_is_not_looked_up(tmp_path, machine):
    with pytest.raises(ValueError, match="cannot be a folder or file name"):
        Store(tmp_path).file(machine, BUILD)


def test_source_builds_of_one_version_are_several_builds():
    builds = [BUILD.model_copy(update={"channel": "source", "triton": triton, "git": git})
              for triton, git in (("3.8.0", "abc"), ("3.9.0", "abc"), ("3.9.0", "def"))]
    records = [record(case(), build=build).model_copy(update={"elapsed_s": number})
               for number in (0, 1) for build in builds]
    assert [(each.build.triton, each.build.git, each.elapsed_s) for each in latest(records)] == [
        ("3.8.0", "abc", 1), ("3.9.0", "abc", 1), ("3.9.0", "def", 1)]
    released = [record(case(), build=BUILD.model_copy(update={"triton": triton})) for triton in ("3.8.0", "3.9.0")]
    assert latest(released) == released[1:]     # its Triton is pinned
