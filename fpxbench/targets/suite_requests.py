"""Requests of the suite's own `triton_fused` kernels. Imports PyTorch: `fpxbench.targets.suite` calls it in a child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpxbench.implementation import discover
from fpxbench.numbers.dtypes import DTYPE_NAMES
from fpxbench.numbers.scheme import scheme_named
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.operations import ProbeSpec, Request

discover()
from fpxbench.impls import _planar  # noqa: E402  (discover makes the package of implementations)

K = 4096


def requests(specs: list[ProbeSpec], architectures: list[Architecture]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the request for each probe, by its id and the name of the architecture."""
    return {spec.id: {architecture.name: request(spec, architecture) for architecture in architectures}
            for spec in specs}


def request(spec: ProbeSpec, architecture: Architecture) -> Request:
    """Return the request for K = 4096 and one configuration of those that a GPU tries: M = 1 or 16."""
    scheme, x = scheme_named(spec.format), spec.options["x"]
    target = _planar.Target("hip") if architecture.capability is None else _planar.Target("cuda",
        architecture.capability)
    assert scheme.scaling is not None
    scales = "*u8" if scheme.scaling.scale_format.coded else "*fp32"
    signature = {"scales": scales, "tensor_scale": "*fp32", "out": f"*{x}", "N": "i32"}
    if spec.options["kernel"] == "matvec":
        words = 4 * int(architecture.target["warp_size"])
        constants = _planar.matvec_constants(scheme, K, 1, x, target, _planar.Matvec(2, words, 1))
        signature |= {"x": "*i64", "packed": "*i32"}
        options = {"num_warps": 1}
    else:
        tile = _planar.fitted(16, 32, 64, 4, scheme, K, target)
        constants = _planar.dot_constants(scheme, K, x, target, tile)
        signature |= {"x": f"*{x}", "packed": "*u8", "M": "i32"}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    constants = {name: _plain(value) for name, value in constants.items()}
    file = Path(_planar.__file__).with_name("_triton_kernels.py")
    return {"file": str(file), "kernel": f"{spec.options['kernel']}_kernel", "signature": signature,
            "constants": constants,
            "options": options, "divisible": sorted(set(signature) - {"M"})}


def _plain(value: object) -> object:
    """Return a constant as JSON carries it: a Triton dtype by its name in ``triton.language``."""
    if type(value).__name__ == "dtype":
        return {"dtype": DTYPE_NAMES[str(value)].triton}
    return value
