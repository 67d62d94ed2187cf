"""An implementation with a fault of each kind that is no other choice in storing or reading a weight: what
`profile_coverage` measures beside the faults of `fault_injection`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import world
from fault_injection import Faulty
from injections import injections
from places import FAULTY_IMPLS
from ruled import ByRule

from fpxbench.implementation import Implementation, discover
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Kind, Stage

SCHEMES = ("mxfp4", "nvfp4", "e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "mxfp8_e4m3fn", "mxfp8_e5m2", "mxfp6_e3m2",
           "e3m2-g128", "int8-row")
"""Of each kind, the fault on the first of these that has it is measured: `smoke` asks the first four."""
ON_A_GPU, OF_TARGETS = "on a GPU only", "`fpxbench targets` only"


class Example(NamedTuple):
    """A fault of one kind, and the scheme that it is measured on."""

    kind: Kind
    fault: str
    scheme: str
    make: Callable[[], Implementation]
    timed: bool = False
    """Whether it shows only where a case is timed."""
    elsewhere: str = ""
    """What alone finds it, where it is not measured on a CPU."""


class CodesPermuted(world.World):
    def values(self, weight):
        k = weight.shape[1]
        return super().values(weight)[:, torch.randperm(k, generator=torch.Generator().manual_seed(k))]


class ScalesPermuted(world.World):
    def block_scales(self, weight):
        scales = super().block_scales(weight)
        return scales[torch.randperm(len(scales), generator=torch.Generator().manual_seed(len(scales)))]


class ScalesRooted(world.World):
    def block_scales(self, weight):
        return super().block_scales(weight).sqrt()


class ScalesBlended(world.World):
    def block_scales(self, weight):
        scales = super().block_scales(weight).clone()
        scales[:, -1] = (scales[:, -1] + scales[:, -2]) / 2
        return scales


class ActivationRounded(world.World):
    def matmul(self, x, weight):
        return super().matmul(ActivationRule("e4m3fn-row").values(x.reshape(-1, x.shape[-1])).reshape(x.shape)
                              .to(x.dtype), weight)


class NanOfOneInAll(world.World):
    def matmul(self, x, weight):
        return super().matmul(x, weight) + 0 * x.sum()


class Raises(world.World):
    message = ""

    def matmul(self, x, weight):
        raise RuntimeError(self.message)


MESSAGES = {
    Kind.UNSUPPORTED_ROUNDING: "Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne",
    Kind.UNSUPPORTED_CONVERSION: "target doesn't provide conversion for this type",
    Kind.UNSUPPORTED_DTYPE: "type fp8e4nv not supported in this architecture",
    Kind.UNSUPPORTED_ARCH: "no kernel image is available for execution on the device",
    Kind.ASSEMBLER_ERROR: "PTXAS error: Internal Triton PTX codegen error",
    Kind.COMPILER_ABORT: "LLVM ERROR: Cannot select: intrinsic",
    Kind.PASS_FAILED: "PassManager::run failed",
}
OWN: dict[Kind, tuple[str, str, Callable[[], Implementation]]] = {
    Kind.WEIGHT_TRANSPOSED: ("a square weight transposed", "e5m2-row", world.SquareTransposed),
    Kind.CODE_PERMUTED: ("columns in a random order", "mxfp4", CodesPermuted),
    Kind.SCALE_PERMUTED: ("scales of rows in a random order", "mxfp4", ScalesPermuted),
    Kind.SCALE_MISREAD: ("the root of each scale", "mxfp4", ScalesRooted),
    Kind.SCALE_PADDING_READ: ("the mean of two scales for the last one", "mxfp4", ScalesBlended),
    Kind.ZERO_BLOCK: ("zeros divided by their scale", "e4m3fn-row", world.ZerosDividedByZero),
    Kind.ROUNDING_BIASED: ("random rounding, up too often", "mxfp4",
                           lambda: ByRule("stochastic", declared=False, bias=0.1)),
    Kind.ACTIVATION_QUANTIZED: ("rounded to E4M3, undeclared", "e4m3fn-row", ActivationRounded),
    Kind.NONFINITE_SPREADS: ("0 times the sum of x is added", "mxfp4", NanOfOneInAll),
}
PLANTED = {
    Kind.STALE_ACTIVATION_SCALE: "stale_activation_scale", Kind.GIBBERISH: "gibberish", Kind.INACCURATE: "ragged_k",
    Kind.WRONG_SHAPE: "shape", Kind.WRONG_DTYPE: "dtype", Kind.UNWRITTEN_OUTPUT: "unwritten_output",
    Kind.STALE_OUTPUT: "stale_output", Kind.INPUT_MODIFIED: "activation_modified",
    Kind.NOT_REPEATABLE: "one_in_fifty", Kind.CONFIG_DEPENDENT: "one_config", Kind.M_DEPENDENT: "some_m",
    Kind.SHAPE_DEPENDENT: "k_from_256", Kind.ACTIVATION_LAYOUT: "strides_ignored",
    Kind.WEIGHT_DEPENDENT: "first_weight", Kind.BIAS_WRONG: "bias_scaled",
    Kind.READS_UNWRITTEN: "padding_read", Kind.OUTPUT_CHANGED: "output_reused",
    Kind.LAZY_OUTPUT: "lazy_output", Kind.ENVIRONMENT_PATCHED: "linear_patched",
    Kind.EXPERT_MISTAKEN: "next_expert", Kind.EXPERT_BOUNDARY: "expert_boundary",
    Kind.EMPTY_EXPERT: "empty_experts_skipped",
}
"""Implementations of tests/faulty_impls, on e4m3fn-row."""
TIMED = {Kind.FROZEN_INPUT: "input_frozen", Kind.RESULT_REMEMBERED: "result_remembered"}
GPU_ONLY = {Kind.STREAM_UNSAFE: "sums in a buffer that streams share", Kind.HIDDEN_WORK: "work on another stream",
            Kind.READS_EARLY: "a kernel launched early that does not wait"}


@cache
def _planted() -> dict[str, type[Implementation]]:
    return discover([FAULTY_IMPLS])[0]


def planted(name: str) -> Callable[[], Implementation]:
    return lambda: _planted()[f"faulty_{name}"]()


def examples() -> list[Example]:
    """Return a fault of each kind, in the order of `Kind`'s names."""
    found: dict[Kind, Example] = {}
    for scheme in SCHEMES:
        for injection in injections(scheme_named(scheme)):
            found.setdefault(injection.kind, Example(
                injection.kind, injection.about, scheme, lambda injection=injection: Faulty(
                    {} if injection.storing else injection.how, injection.how if injection.storing else None)))
    for kind, (fault, scheme, make) in OWN.items():
        found[kind] = Example(kind, fault, scheme, make)
    for kind, message in MESSAGES.items():
        made = type("Raises", (Raises,), {"message": message})
        found[kind] = Example(kind, f"raises “{message[:40]}”", "e4m3fn-row", made)
    for kind, name in (PLANTED | TIMED).items():
        about = (_planted()[f"faulty_{name}"].__doc__ or name).strip().split(".")[0]
        found[kind] = Example(kind, about[0].lower() + about[1:], "e4m3fn-row", planted(name), timed=kind in TIMED)
    for kind, fault in GPU_ONLY.items():
        found[kind] = Example(kind, fault, "e4m3fn-row", world.World, elsewhere=ON_A_GPU)
    for kind in Kind:
        if kind.emitted_by and not kind.emitted_by & (Stage.PRODUCT | Stage.STORED | Stage.CONTRACT | Stage.COMPILER):
            found[kind] = Example(kind, kind.seen.split(".")[0], "–", world.World, elsewhere=OF_TARGETS)
    return sorted(found.values(), key=lambda example: str(example.kind))
