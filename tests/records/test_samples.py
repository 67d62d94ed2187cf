"""The records that come with the repository are real ones, and readable."""

import runpy
import subprocess
import sys

import pytest
from places import CHECKOUT

from fpxbench.casts.cast_changes import CastSnapshot, changes
from fpxbench.casts.cast_record import CastRecord
from fpxbench.checking.traffic import UNFUSED_BYTES
from fpxbench.records.record import Case, Flag
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status

FOLDER = CHECKOUT / "reports" / "samples"
SAMPLES = Store(FOLDER)
KERNEL_TABLE = CHECKOUT / "tools" / "kernel_table.py"


def test_every_line_is_a_record():
    records, broken = SAMPLES.read_all()
    assert not broken
    assert {record.machine.arch for record in records} >= {"sm_90"}


def test_no_time_without_a_right_answer_and_no_bandwidth_above_the_machines():
    timed = [record for record in SAMPLES.read_all()[0] if record.timing]
    assert len(timed) > 100
    assert {record.verdict.status for record in timed} == {Status.OK}
    assert max(record.traffic.roofline_fraction for record in timed) < 1.1


def test_the_fused_kernel_writes_no_decoded_weight_on_a_gpu():
    """At most three kernels: the activation is put in order first, and parts of sums are added up after."""
    fused = [
        r
        for r in SAMPLES.read_all()[0]
        if r.timing and r.machine.kind == "cuda" and r.case.implementation == "triton_fused" and not r.case.experts
    ]
    assert {record.traffic.kernels_launched for record in fused if record.case.m == 1} == {1}
    assert {record.traffic.kernels_launched for record in fused} <= {1, 2, 3}
    for record in fused:
        case, traffic = record.case, record.traffic
        assert Flag.UNFUSED not in record.flags, case.id
        activation, result = 2 * case.m * case.k, 2 * case.m * case.n
        # What is left may be parts of sums: no more than one or two a multiprocessor.
        assert traffic.peak_bytes - activation - result < UNFUSED_BYTES * 2 * case.n * case.k, case.id


def test_what_changed_in_pytorchs_casts_from_2_11_to_2_15_shows_in_the_samples():
    store = Store(FOLDER, CastRecord)
    files = {
        path.stem.partition("-")[0]: path for path in store.files() if path.parent.parent.name == "cpu-amd-epyc-2c"
    }
    builds = {}
    for version, path in files.items():
        records, broken = store.read(path)
        assert not broken
        builds[version] = [
            CastSnapshot.of(record) for record in records if record.conversion.engine.value in ("eager", "compiled")
        ]

    def changed(before, after):
        return {
            (change.aspect, change.before, change.after, change.conversions[0].target)
            for change in changes(builds[before], builds[after])
        }

    assert changed("2.11.0", "2.13.0") == {
        ("overflow", "nan", "saturate", "e4m3fn"),
        ("infinity", "nan", "saturate", "e4m3fn"),
    }
    assert changed("2.13.0", "2.14.1") == set()
    # torch.finfo(float8_e5m2fnuz).eps
    assert changed("2.14.1", "2.15.0") == {("status", "wrong", "ok", "e5m2fnuz")}


def test_the_speedups_in_the_docs_are_those_of_the_samples_records():
    done = subprocess.run([sys.executable, KERNEL_TABLE, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_speedups_are_those_of_right_records_beside_the_peers(tmp_path, monkeypatch):
    """A wrong record has no speedup."""
    monkeypatch.syspath_prepend(KERNEL_TABLE.parent)

    def speedups(records):
        folder = tmp_path / "gpu" / "records"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.jsonl").write_text("".join(f"{record.model_dump_json()}\n" for record in records))
        tool = runpy.run_path(str(KERNEL_TABLE))
        return tool["markdown"](tool["records_of"](tmp_path)).splitlines()

    asked = ("llama3-8b.o", "mxfp4", 16, "bf16")
    of_layer = [record for record in SAMPLES.read_all()[0] if record.case.implementation in ("triton_fused", "humming")
                and (record.case.workload, record.case.scheme, record.case.m, record.case.activation) == asked]
    assert {record.case.implementation for record in of_layer} == {"triton_fused", "humming"}
    ours, peer = sorted(of_layer, key=lambda record: record.case.implementation != "triton_fused")
    row = f"| `mxfp4` |  |  |  |  | {ours.timing.speedup:.2f} ({peer.timing.speedup:.2f}) |  |  |  |"
    assert row in speedups([ours, peer])
    elsewhere = peer.model_copy(update={"machine": peer.machine.model_copy(update={"device": "another GPU"})})
    with pytest.raises(SystemExit, match="another GPU.*: a table is of one GPU"):
        speedups([ours, elsewhere])
    peer.verdict.status = Status.WRONG
    assert row.replace(f" ({peer.timing.speedup:.2f})", "") in speedups([ours, peer])
    ours.verdict.status = Status.WRONG
    with pytest.raises(SystemExit, match="no right and timed records"):
        speedups([ours, peer])


def test_the_cases_of_the_table_can_be_run():
    done = subprocess.run([sys.executable, KERNEL_TABLE, "--cases", "humming"], capture_output=True, text=True)
    cases = [Case.model_validate_json(line) for line in done.stdout.splitlines()]
    assert len({case.id for case in cases}) == 192 and {case.implementation for case in cases} == {"humming"}
