"""Time the decode of one format to one dtype by each engine, and a copy, interleaved. Runs in a child process."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from fpxbench.casts.codec_timing import time_interleaved
from fpxbench.casts.decode_speed import EngineSpeed, Measured
from fpxbench.checking.device_lock import device_lock
from fpxbench.implementation import discover
from fpxbench.numbers.dtypes import DTYPE_NAMES
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict, classify_exception

K = 4096
ROWS = {"cpu": 4096, "cuda": 1 << 14}
"""16 million codes on a CPU, 64 million on a GPU: beyond their caches."""
CALLS = {"cpu": 1, "cuda": 8}
"""Calls per sample: on a GPU, a launch takes some microseconds."""
CHECKED_ROWS = 64

Decode = Callable[[], Tensor]


class SetupMissing(Exception):
    """Why an engine does not decode a format on a device."""


def measure(fmt: str, target: str, device: str, engines: list[str], budget_s: float) -> Measured:
    """Return the speed of each engine that decodes right, and of a copy of as many bytes."""
    torch.manual_seed(0)
    bits = FORMATS[fmt].bits
    codes = torch.randint(1 << bits, (ROWS[device], K), dtype=torch.uint8, device=device)
    dtype = getattr(torch, DTYPE_NAMES[target].torch or target)
    nbytes = codes.numel() * (1 + dtype.itemsize)
    found: dict[str, EngineSpeed] = {}
    calls: dict[str, tuple[Decode, int]] = {}
    for engine in engines:
        try:
            decode, read = _MAKERS[engine](fmt, codes, dtype)
            wrong = _wrong_codes(decode(), codes, fmt)
            if wrong:
                found[engine] = EngineSpeed(verdict=Verdict(
                    status=Status.WRONG, kind=Kind.GIBBERISH if len(wrong) > 8 else Kind.INACCURATE,
                    summary=f"{len(wrong)} codes decode to a wrong number, the first is {wrong[0]:#04x}"))
            else:
                calls[engine] = decode, read + codes.numel() * dtype.itemsize
        except SetupMissing as why:
            found[engine] = EngineSpeed(verdict=Verdict(status=Status.UNSUPPORTED, summary=str(why)))
        except Exception as error:      # a compiler can refuse in any way
            traceback.print_exception(error)
            found[engine] = EngineSpeed(verdict=classify_exception(type(error).__name__, str(error), ""))
    source = torch.ones(nbytes // 2, dtype=torch.uint8, device=device)
    calls["copy"] = source.clone, nbytes
    with device_lock(device, f"decode/{fmt}/{target}"):
        seconds = time_interleaved({name: _sample(call, device) for name, (call, _) in calls.items()}, budget_s)
    rates = {name: CALLS[device] * moved / statistics.median(seconds[name]) / 1e9 for name, (_, moved) in calls.items()}
    copied = rates.pop("copy")
    found |= {name: EngineSpeed(verdict=Verdict(status=Status.OK), gb_per_s=rate) for name, rate in rates.items()}
    return Measured(weights=codes.numel(), copy_gb_per_s=copied, engines={name: found[name] for name in engines})


def _wrong_codes(decoded: Tensor, codes: Tensor, fmt: str) -> list[int]:
    """Return the codes that decode to a wrong number; the rows compared hold every code."""
    table = decode_table(FORMATS[fmt]).to(codes.device)
    some = codes[:CHECKED_ROWS]
    got, expected = decoded[:CHECKED_ROWS].float(), table[some.int()]
    different = (got != expected) & ~(got.isnan() & expected.isnan())
    return some[different].unique().tolist()


def _sample(call: Decode, device: str) -> Callable[[], None]:
    """Return one timed sample: its calls, until they have ended."""
    def calls() -> None:
        for _ in range(CALLS[device]):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return calls


# Each returns a call, and how many bytes it reads.


def _eager(fmt: str, codes: Tensor, dtype: torch.dtype) -> tuple[Decode, int]:
    data = _as_torch_dtype(fmt, codes)
    return lambda: data.to(dtype), codes.numel()


def _compiled(fmt: str, codes: Tensor, dtype: torch.dtype) -> tuple[Decode, int]:
    data = _as_torch_dtype(fmt, codes)
    torch._dynamo.reset()
    cast = torch.compile(lambda x: x.to(dtype), fullgraph=True, dynamic=False)
    return lambda: cast(data), codes.numel()


def _triton(fmt: str, codes: Tensor, dtype: torch.dtype) -> tuple[Decode, int]:
    if codes.device.type == "cpu":
        raise SetupMissing("Triton compiles for GPUs only")
    name = DTYPE_NAMES[fmt].triton
    if name is None or FORMATS[fmt].bits < 8:
        raise SetupMissing("Triton has no dtype of this format")
    from fpxbench.casts.triton_decode import cast

    return lambda: cast(codes, name, dtype), codes.numel()


def _own(fmt: str, codes: Tensor, dtype: torch.dtype) -> tuple[Decode, int]:
    if codes.device.type != "cpu":
        from fpxbench.casts.triton_decode import decode

        return lambda: decode(codes, FORMATS[fmt], dtype), codes.numel()
    scheme = scheme_named(f"{fmt}-row")
    support = discover()[0]["cpu_fused"]().supports(scheme, "cpu")
    if not support.supported:
        raise SetupMissing(support.reason)
    from fpxbench.impls._cpu_build import Kernels

    weight = QuantizedWeight.from_codes(codes, Scales(torch.ones(len(codes), 1)), scheme)
    kernels = Kernels(weight)

    def decoded() -> Tensor:
        out = torch.empty(codes.shape, dtype=dtype)
        kernels.decode(0, out)
        return out

    return decoded, weight.packed.numel()


_MAKERS: dict[str, Callable[[str, Tensor, torch.dtype], tuple[Decode, int]]] = {
    "eager": _eager, "compiled": _compiled, "triton": _triton, "own": _own,
}


def _as_torch_dtype(fmt: str, codes: Tensor) -> Tensor:
    known = DTYPE_NAMES[fmt].torch
    if known is None or FORMATS[fmt].bits < 8:
        raise SetupMissing("PyTorch has no cast from such a format")
    return codes.view(getattr(torch, known))
