"""What was not asked is not named: maps that could not all be recovered."""

from __future__ import annotations

import pytest
from confusion import NAMED, UNCERTAIN, outcome_of, singles
from fault_injection import Faulty
from injections import injections

from fpxbench.diagnosis.experiment import Experiment
from fpxbench.diagnosis.recovery import maps
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.maps import RecoveredMaps
from fpxbench.diagnosis.scale_places import scale_places
from fpxbench.numbers.scaling import scaling_named
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind

pytestmark = pytest.mark.usefixtures("one_thread")


def order_not_asked(bench, table):
    return Experiment(name="order", right=None, message="no time was left"), None


def maps_of(scheme="mxfp4", **reading):
    case = Case(implementation="injected", scheme=scheme, workload="injected", m=33, n=40, k=96)
    return RecoveredMaps(Bench(Faulty(reading), case, "cpu", seed=1))


@pytest.mark.parametrize("scheme", ["mxfp4", "e2m1-nv16x16", "e4m3fn-b16x32"])
def test_moved_outputs_are_not_taken_for_moved_scales_where_codes_were_not_asked(monkeypatch, scheme):
    """In two dimensions, rows also meet other scales than those of their block."""
    found = maps_of(scheme, output_roll=5).diagnosis()
    assert (found.kind, found.evidence["kinds"]) == (Kind.OUTPUT_PERMUTED, ["output_permuted"])
    monkeypatch.setattr(maps, "recover_order", order_not_asked)
    found = maps_of(scheme, output_roll=5).diagnosis()
    assert found.kind is None and found.evidence["fitting"] == ["output_permuted", "scale_permuted"]
    assert "whether they meet their codes too was not asked" in found.message


def test_maps_that_are_right_are_listed_where_none_is_wrong(monkeypatch):
    assert maps_of().messages() == "as defined: table, scales, blocks, order"
    assert maps_of(flush=True).messages().startswith("table: ")
    monkeypatch.setattr(maps, "recover_order", order_not_asked)
    assert maps_of().messages() == "as defined: table, scales, blocks; not recovered: order"


def test_only_scales_of_blocks_along_k_can_be_in_tensor_core_tiles():
    """In two dimensions no hardware reads them so: neither looked for nor injected."""
    for name, possible in (("mx", True), ("nv", True), ("b128x128", False), ("nv16x16", False)):
        found = {place.kind for place in scale_places(scaling_named(name), 512, 1024)}
        assert (Kind.SCALE_SWIZZLED in found) is possible
    for name, possible in (("mxfp4", True), ("e4m3fn-b128x128", False), ("e2m1-nv16x16", False)):
        assert (Kind.SCALE_SWIZZLED in {fault.kind for fault in injections(scheme_named(name))}) is possible


def test_a_sweep_diagnoses_moved_outputs_under_blocks_in_two_dimensions_without_an_exception(capfd):
    moved = next(each for each in singles("e2m1-nv16x16") if each[0].kind is Kind.OUTPUT_PERMUTED)
    found = outcome_of("e2m1-nv16x16", moved, shape=(33, 40, 96), sweep=True)
    assert found.outcome in (NAMED, UNCERTAIN), found
    assert "Traceback" not in capfd.readouterr().err
