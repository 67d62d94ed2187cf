"""The Ray cluster: its nodes, and a worker on each device. The only module that imports Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fpxbench.builds.environments import default_root
from fpxbench.builds.environments.folder import ROOT_VARIABLE
from fpxbench.fleet.fleet_messages import DeviceType, Seat
from fpxbench.records.fields import LARGEST_INTEGER
from fpxbench.user_error import UserError

MACHINE_LABEL = "fpxbench-machine"
CONNECT_WITHIN_S = 10.0
MOST_DEVICES = 1024
"""Largest number of devices of one node."""
CLIENT_PORT = 10001
"""Ray's default port for ``ray://``."""
_ACCELERATOR = "accelerator_type:"

Call = Any
"""A call of a worker that has not returned yet: Ray's ObjectRef."""


class NoRay(UserError):
    """Ray is not installed."""


class NoCluster(UserError):
    """The cluster cannot be reached, or cannot be used from this Python."""


class WorkerEnded(RuntimeError):
    """The worker, or its node, is gone."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, as Ray describes it."""

    id: str
    host: str
    gpus: int
    cpus: int
    accelerator_type: str
    machine: str | None
    """Value of its label ``fpxbench-machine``."""

    @property
    def label(self) -> str:
        """Host and the beginning of the id: two nodes may share a host."""
        return f"{self.host} ({self.id[:8]})"


def connect(address: str | None) -> None:
    """Join the cluster at `address` (``auto``, ``ray://HOST:10001``, ``HOST:6379``), or start Ray here (None).

    Raise NoRay, and NoCluster with the reason.
    """
    ray = _ray()
    if address is not None and address != "auto":
        _reach(address)
    if address is None:
        os.environ.setdefault(ROOT_VARIABLE, str(default_root()))   # `asv` and `confirm` share these environments
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        advice = ("`ray start --head` starts one on this machine; without --address fpxbench starts its own"
                  if address == "auto" else "a cluster that asks for a token needs RAY_AUTH_MODE=token here too")
        raise NoCluster(f"--address {address}: {_message(error)} ({advice})") from None


def disconnect() -> None:
    """Leave the cluster; workers of this process end."""
    _ray().shutdown()


def nodes() -> list[Node]:
    """Return the nodes that are alive. Raise NoCluster if the cluster does not answer."""
    try:
        listed = _ray().nodes()
    except Exception as error:      # Ray raises gRPC's errors, its own, and RuntimeError
        raise NoCluster(f"the cluster no longer answers: {_message(error)}") from None
    return [_node(each) for each in listed if each.get("Alive")]


def _node(listed: dict[str, Any]) -> Node:
    resources = listed.get("Resources", {})
    accelerators = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    return Node(
        id=listed["NodeID"], host=str(listed.get("NodeManagerHostname", "")),
        gpus=min(int(resources.get("GPU", 0)), MOST_DEVICES), cpus=min(int(resources.get("CPU", 0)), LARGEST_INTEGER),
        accelerator_type=next(iter(accelerators), ""), machine=listed.get("Labels", {}).get(MACHINE_LABEL),
    )


def ask_version(node: Node) -> Call:
    """Begin to ask which fpxbench a node has; the result is JSON with ``version``, ``source``, ``python`` and
    ``machines`` (the names of its devices in the results)."""
    ray = _ray()
    described = (node.gpus, node.machine, node.accelerator_type)

    # Nested, so that it travels by value: the node may have no fpxbench, or another one.
    def asked() -> str:
        import json
        import sys

        found = {"version": "", "source": "", "python": sys.executable}
        try:
            import fpxbench

            found["version"] = str(fpxbench.__version__)
            from fpxbench.fleet.fleet_messages import source_digest

            found["source"] = source_digest()
            from fpxbench.fleet.devices import kinds_here

            found["machines"] = kinds_here(*described)
        except ImportError as error:
            found["error"] = str(error)
        return json.dumps(found)

    return ray.remote(asked).options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node)).remote()


@dataclass
class Worker:
    """A `DeviceWorker` on a node."""

    _handle: Any

    def call(self, method: str, *arguments: object) -> Call:
        """Begin a call; `result` has what it returned."""
        return self._handle.call.remote(method, *arguments)

    def end(self) -> None:
        """End the worker and what it runs; its spools stay on the node."""
        _ray().kill(self._handle)


def start_worker(node: Node, device: DeviceType, seat: Seat) -> Worker:
    """Begin to start a worker on one device of `node`. It waits until Ray has the device free."""
    ray = _ray()

    class RayDeviceWorker:
        """A `DeviceWorker` on the GPU that Ray assigned to it."""

        def __init__(self, seat: str) -> None:
            import ray

            from fpxbench.fleet.device_worker import DeviceWorker

            ids = ray.get_runtime_context().get_accelerator_ids().get("GPU") or [""]
            self._worker = DeviceWorker(seat, str(ids[0]))

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self._worker, method)(*arguments)

    gpu = device == "cuda"
    options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpu else {"num_gpus": 0, "num_cpus": max(node.cpus, 1)}
    if gpu and node.accelerator_type:
        options["accelerator_type"] = node.accelerator_type
    handle = ray.remote(RayDeviceWorker).options(
        max_restarts=0, max_task_retries=0, scheduling_strategy=_on(node), **options,
    ).remote(seat.model_dump_json())
    return Worker(handle)


def ready(calls: Iterable[Call], wait_s: float) -> list[Call]:
    """Return the calls that have returned, after at most `wait_s` seconds."""
    pending = list(calls)
    if not pending:
        return []
    done, _ = _ray().wait(pending, num_returns=len(pending), timeout=0)
    return done or _ray().wait(pending, num_returns=1, timeout=wait_s)[0]


def result(call: Call, timeout_s: float | None = None) -> Any:
    """Return what a call returned. Raise WorkerEnded if its worker is gone or it raised."""
    ray = _ray()
    try:
        return ray.get(call, timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise WorkerEnded(_message(error)) from None


def _on(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise NoRay("the fleet runs on Ray, which is not installed: pip install 'fpxbench[fleet]'")
    import ray

    return ray


def _reach(address: str) -> None:
    """Raise NoCluster unless something listens at `address`: Ray itself waits for two minutes, and then exits."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or (CLIENT_PORT if parts.scheme else None)
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("", "ray") or not host or not port:
        raise NoCluster(f"--address {address}: an address is auto, ray://HOST:{CLIENT_PORT} or HOST:6379")
    try:
        socket.create_connection((host, port), CONNECT_WITHIN_S).close()
    except OSError as error:
        raise NoCluster(f"--address {address}: nothing answers at {host} port {port}: {error.strerror or error}. "
                        f"`ray start --head` starts a cluster; it listens at 6379, and at {CLIENT_PORT} for "
                        "ray://") from None


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def read_version(text: str) -> dict[str, str]:
    """Return what `ask_version` found. Raise WorkerEnded for a malformed reply."""
    try:
        found = json.loads(text[:4096])
        return {str(name): str(value)[:400] for name, value in found.items()}
    except (ValueError, AttributeError, TypeError):
        raise WorkerEnded(f"malformed reply: {text[:100]!r}") from None
