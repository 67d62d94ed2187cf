"""The suite's own `triton_fused` kernels as probes: every scheme, the matrix-vector kernel and the one on matrix instructions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fpxbench.implementation import discover
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.operations import ProbeSpec, Request

discover()
from fpxbench.impls import triton_fused  # noqa: E402  (discover makes the package of implementations)

K = 4096


def questions() -> Iterator[ProbeSpec]:
    """Both kernels for every scheme with codes; the activation's dtype alternates."""
    for at, name in enumerate(name for name in SCHEMES if scheme_named(name).quantized):
        x, other = ("bf16", "fp16") if at % 2 else ("fp16", "bf16")
        yield ProbeSpec("triton_fused", name, f"matvec-{x}", {"kernel": "matvec", "x": x})
        yield ProbeSpec("triton_fused", name, f"dot-{other}", {"kernel": "dot", "x": other})


def request(question: ProbeSpec, architecture: Architecture) -> Request:
    """For K = 4096 and one config of those that are tried on a GPU: M = 1 or 16."""
    scheme, x = scheme_named(question.format), question.options["x"]
    target = triton_fused.Target("hip") if architecture.capability is None else triton_fused.Target("cuda", architecture.capability)
    scales = "*u8" if scheme.scaling.scale_format.coded else "*fp32"
    signature = {"scales": scales, "tensor_scale": "*fp32", "out": f"*{x}", "N": "i32"}
    if question.options["kernel"] == "matvec":
        words = 4 * int(architecture.target["warp_size"])
        constants = triton_fused.matvec_constants(scheme, K, 1, x, target, triton_fused.Matvec(2, words, 1))
        signature |= {"x": "*i64", "packed": "*i32"}
        options = {"num_warps": 1}
    else:
        tile = triton_fused.fitted(16, 32, 64, 4, scheme, K, target)
        constants = triton_fused.dot_constants(scheme, K, x, target, tile)
        signature |= {"x": f"*{x}", "packed": "*u8", "M": "i32"}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    constants = {name: _plain(value) for name, value in constants.items()}
    file = Path(triton_fused.__file__).with_name("_triton_kernels.py")
    return {"file": str(file), "kernel": f"{question.options['kernel']}_kernel", "signature": signature, "constants": constants,
            "options": options, "divisible": sorted(set(signature) - {"M"})}


def _plain(value: object) -> object:
    """A constant as JSON carries it; one of Triton's dtypes by its name in ``triton.language``."""
    if type(value).__name__ == "dtype":
        return {"dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[str(value)]}
    return value
