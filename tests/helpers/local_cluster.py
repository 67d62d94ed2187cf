"""A Ray cluster of several nodes on this host. A node has a folder of its own; builds' environments are shared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

MEMORY = 78643200


class LocalCluster:
    """A head that measures nothing, and nodes that are added and removed."""

    def __init__(self, root: Path) -> None:
        from ray.cluster_utils import Cluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self.root = root
        # On a busy machine a node that lives may answer late. One that is killed refuses at once.
        late = {"health_check_timeout_ms": 60_000}
        # Neither the autoscaler nor what copies workers' logs to drivers has anything to do.
        self._cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False, "no_monitor": True,
            "include_log_monitor": False, "_system_config": late})
        self.nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self, name: str, *, machine: str | None = None, gpus: int = 0, accelerator: str = "",
            **variables: str) -> None:
        """Start a node. machine : what its records are filed under; variables : of its processes' environment"""
        variables = {"FPX_FLEET_FOLDER": str(self.root / "nodes" / name),
                     "FPX_ENVIRONMENTS": str(self.root / "environments")} | variables
        self.nodes[name] = self._add(
            num_cpus=1, num_gpus=gpus, env_vars=variables, labels={"fpxbench-machine": machine} if machine else None,
            resources={f"accelerator_type:{accelerator}": 1} if accelerator else None)

    def _add(self, **node: Any) -> Any:
        before = dict(os.environ)
        # Ray starts a node's processes with this process's environment.
        os.environ.update(node.pop("env_vars", {}))
        try:
            return self._cluster.add_node(object_store_memory=MEMORY, include_dashboard=False, **node)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def kill(self, name: str) -> None:
        """End a node and everything on it, at once."""
        self._cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()
