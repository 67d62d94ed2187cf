"""Make docs/fleet/progress.svg: a fleet in the middle of its work, on local nodes with stand-ins for builds.

Run from a checkout: ``python tools/fleet_picture.py``.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests/helpers"))

from fake_builds import FakeBuilds  # noqa: E402
from local_cluster import LocalCluster  # noqa: E402

from fpxbench.fleet import cluster  # noqa: E402
from fpxbench.fleet.driver import Driver, Request  # noqa: E402
from fpxbench.fleet.fleet_progress import rendered  # noqa: E402
from fpxbench.fleet.state import FleetState  # noqa: E402

RECORDS = 400
"""The picture is taken when so many are stored."""


def main() -> None:
    pictures: list[str] = []

    def show(state: FleetState) -> None:
        if state.stored >= RECORDS and not pictures:
            console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True, highlight=False)
            console.print("$ fpxbench fleet run --builds 1.0.0..1.3.0 --address auto", markup=False, style="bold")
            console.print(rendered(state))
            pictures.append(console.export_svg(title="fpxbench fleet run"))

    with tempfile.TemporaryDirectory(prefix="fpxbench-picture-") as name:
        builds = FakeBuilds(Path(name), 4, 150, seconds=0.03)
        with LocalCluster(Path(name)) as nodes:
            for node, machine in zip("abcd", ("h200", "h200", "l4", "epyc-9654"), strict=True):
                nodes.add(node, machine=machine)
            cluster.connect(nodes.address)
            request = Request(entries=builds.entries, results=Path(name) / "results", device="cpu")
            Driver(request, builds.timeline, print, show).run()
            cluster.disconnect()
    (CHECKOUT / "docs/fleet/progress.svg").write_text(pictures[0], encoding="utf-8")


if __name__ == "__main__":
    main()
