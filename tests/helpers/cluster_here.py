"""A cluster without Ray: each worker is an object of this process, and a test decides when its calls return."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fpxbench
from fpxbench.fleet import cluster, driver
from fpxbench.fleet.device_worker import DeviceWorker
from fpxbench.fleet.fleet_messages import DeviceType, Seat, source_digest
from fpxbench.fleet.spool import FOLDER_VARIABLE


@dataclass(eq=False)
class Call:
    """A call that returns when its result is asked for."""

    node: str
    share: int
    method: str
    compute: Callable[[], Any]


class Worker:
    """A `DeviceWorker` of one device."""

    def __init__(self, here: ClusterHere, node: str, seat: Seat) -> None:
        self._here, self._node, self._share = here, node, seat.share
        with here.on(node):
            self._worker = DeviceWorker(seat.model_dump_json(), str(seat.share))

    def call(self, method: str, *arguments: object) -> Call:
        return Call(self._node, self._share, method, lambda: getattr(self._worker, method)(*arguments))

    def end(self) -> None:
        self._worker.stop()
        for spool in self._worker._spools.values():
            spool.release()


class ClusterHere:
    """Takes the place of `fpxbench.fleet.cluster`. machines : by node, what its records are filed under"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, machines: dict[str, str], gpus: int = 0) -> None:
        self._root = root
        self._nodes = [cluster.Node(name, name, gpus, 1, "H100" if gpus else "", machine)
                       for name, machine in machines.items()]
        self._nodes.append(cluster.Node("head", "head", 0, 0, "", None))
        self.returned: list[tuple[str, int, str]] = []
        """Node, number of the device and method of each call that returned, in order."""
        self.holds: Callable[[Call], bool] = lambda call: False
        """Which calls do not return yet."""
        self.before: Callable[[Call], None] = lambda call: None
        """Called before a call is carried out."""
        for name in ("nodes", "ask_version", "start_worker", "ready", "result"):
            monkeypatch.setattr(cluster, name, getattr(self, name))
        monkeypatch.setattr(driver, "POLL_S", 0.05)
        monkeypatch.setattr(driver, "NODES_EVERY_S", 0.05)

    def folder(self, node: str) -> Path:
        """Return the folder of a node's spools."""
        return self._root / "nodes" / node

    @contextmanager
    def on(self, node: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, FOLDER_VARIABLE, str(self.folder(node)))
            yield

    def nodes(self) -> list[cluster.Node]:
        return self._nodes

    def ask_version(self, node: cluster.Node) -> Call:
        version = json.dumps({"version": fpxbench.__version__, "source": source_digest()})
        return Call(node.id, 0, "version", lambda: version)

    def start_worker(self, node: cluster.Node, device: DeviceType, seat: Seat) -> Worker:
        return Worker(self, node.id, seat)

    def ready(self, calls: Iterable[Call], wait_s: float) -> list[Call]:
        done = [call for call in calls if not self.holds(call)]
        if not done:
            time.sleep(0.01)
        return done

    def result(self, call: Call, timeout_s: float | None = None) -> Any:
        self.before(call)
        with self.on(call.node):
            value = call.compute()
        self.returned.append((call.node, call.share, call.method))
        return value
