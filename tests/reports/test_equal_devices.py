"""Devices of one kind stand beside each other on the machine's page."""

import pytest
import sample_records
from sites import pages_of

from fpxbench.fleet.fleet_messages import Device
from fpxbench.fleet.spread import DeviceSpread, DeviceTime
from fpxbench.records.record import Build
from fpxbench.records.store import Store
from fpxbench.reports.site import build_site
from fpxbench.reports.sweep.device_spread_table import MOST_DEVICES, spread_table

FAST, SLOW = sample_records.case(), sample_records.case("dense", "bf16")


def gpu(index, node="gpu-7"):
    return Device(kind="nvidia-h100", type="cuda", name="NVIDIA H100", node=node, index=index,
                  uuid=f"GPU-{node}-{index}")


def spread(case, medians, build=sample_records.GPU_BUILD, half_width=0.01, at="2026-10-15T01:00:00+00:00"):
    times = [DeviceTime(device=device, median_us=us, ci95_us=(us * (1 - half_width), us * (1 + half_width)))
             for device, us in medians]
    return DeviceSpread(machine=sample_records.GPU, build=build, case=case, at=at, devices=times)


TWO = [spread(FAST, [(gpu(0), 100.0), (gpu(1), 102.0)]), spread(SLOW, [(gpu(0), 220.0), (gpu(1), 200.0)])]


def test_each_devices_ratio_to_the_fastest_has_an_interval_and_each_case_its_worst():
    table = spread_table(TWO)
    first, second = table.rows
    assert [row.device.index for row in table.rows] == [0, 1] and table.cases == (FAST, SLOW)
    assert first.cells[0].interval is None and first.cells[0].ratio == 1
    assert second.cells[0].ratio == pytest.approx(1.02)
    assert second.cells[0].interval == pytest.approx((1.02 * 0.99 / 1.01, 1.02 * 1.01 / 0.99))
    assert (first.ratio, second.ratio) == pytest.approx((1.05, 1.01)), "the median over the cases"
    assert [(device.index, cell.ratio) for device, cell in table.worst] == [(1, pytest.approx(1.02)),
                                                                            (0, pytest.approx(1.1))]


def test_a_device_that_did_not_time_a_case_has_no_ratio_there():
    table = spread_table([TWO[0], spread(SLOW, [(gpu(1), 200.0), (gpu(2), 201.0)])])
    assert [[cell is not None for cell in row.cells] for row in table.rows] == [[True, False], [True, True],
                                                                               [False, True]]
    assert table.rows[0].ratio == 1.0


def test_of_a_large_cluster_some_devices_are_shown_and_the_worst_of_all():
    many = ((gpu(number % 8, f"node-{number // 8:03d}"), 100.0 + number) for number in range(400))
    table = spread_table([spread(FAST, many)])
    assert len(table.rows) == MOST_DEVICES and table.more == 400 - MOST_DEVICES
    assert table.worst[0][0].label == "node-049 GPU 7" and table.worst[0][1].ratio == pytest.approx(4.99)


def test_the_machines_page_shows_the_newest_build_on_which_devices_were_compared(tmp_path):
    results, older = tmp_path / "results", Build(torch="2.12.0+cu130", triton="3.6.1", channel="release",
                                                 variant="cu130", date="2026-07-08", key="b" * 40)
    for build in (older, sample_records.GPU_BUILD):
        Store(results).append(sample_records.record(FAST, build=build, machine=sample_records.GPU))
    store = Store(results, DeviceSpread)
    for one in TWO:
        store.append(one.model_copy(update={"build": older}))
    site = tmp_path / "site"
    build_site(results, site)
    page = site / "machines" / "nvidia-h100" / "index.html"
    text = " ".join(pages_of(site)[page].text.split())
    assert "2 devices of this kind ran the same cases at the same time, with PyTorch 2.12.0" in text
    assert "gpu-7 GPU 0100 µsthe fastest220 µs1.100 [1.078, 1.122]1.050" in text
    assert "worst+2.0%gpu-7 GPU 1+10.0%gpu-7 GPU 0" in text
    for one in TWO[:1]:
        store.append(one)
    store.file("nvidia-h100", sample_records.GPU_BUILD).open("a").write("no record\n")
    summary = build_site(results, site)
    text = " ".join(pages_of(site)[page].text.split())
    assert "with PyTorch 2.13.0" in text and "+10.0%" not in text
    assert ["spread" in str(line.path) for line in summary.broken_lines] == [True]


def test_a_machine_with_one_device_has_no_such_table(tmp_path):
    Store(tmp_path / "results").append(sample_records.record(FAST, machine=sample_records.GPU))
    build_site(tmp_path / "results", tmp_path / "site")
    assert "Equal devices" not in (tmp_path / "site" / "machines" / "nvidia-h100" / "index.html").read_text()
