"""Records as sweeps leave them, made up but of the real classes: every status, several mistakes, timings, flags."""

from __future__ import annotations

import random
from pathlib import Path

from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Accuracy, Build, Flag, Machine, Record, Timing, Traffic
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict

BUILD = Build(torch="2.13.0+cpu", triton="3.7.1", git="8d1e0f3c", channel="release", variant="cpu", date="2026-10-14",
              key="a" * 40)
CPU = Machine(name="cpu-epyc-2c", device="AMD EPYC 7B13", arch="x86_64 AVX2", host="bench-1", memory_bytes=64 << 30,
              read_gb_per_s=24.8, cache_bytes=32 << 20, facts={"cores": 2, "os": "Linux 6.1"})
GPU = Machine(name="nvidia-h100", device="NVIDIA H100 80GB HBM3", arch="sm_90", kind="cuda", memory_bytes=80 << 30,
              read_gb_per_s=3050.0, cache_bytes=50 << 20)
GPU_BUILD = BUILD.model_copy(update={"torch": "2.13.0+cu130", "variant": "cu130"})

SCHEMES = {
    "bf16": (16, None),
    "int8-row": (8, 41.2),
    "e4m3fn-row": (8, 31.5),
    "e4m3fnuz-row": (8, 31.5),
    "e5m2-row": (8, 25.6),
    "e5m2fnuz-row": (8, 25.6),
    "e3m4-row": (8, 37.5),
    "e4m3fn-g128": (8.25, 31.9),
    "e3m2-row": (6, 25.6),
    "e2m3-row": (6, 30.9),
    "mxfp8_e4m3fn": (8.25, 30.6),
    "mxfp6_e3m2": (6.25, 25.4),
    "mxfp4": (4.25, 18.8),
    "nvfp4": (4.5, 20.4),
    "e2m1-g32": (5, 19.9),
}
LAYERS = {"canary.codes": (64, 256, (1,)), "llama2-7b.o": (4096, 4096, (1,)), "llama3-8b.k": (1024, 4096, (1, 16))}
SPEED = {
    "dense": 1.0,
    "int8_weight_only": 1.6,
    "eager_upcast": 0.11,
    "native_float8": 0.085,
    "compiled_mixed_mm": 0.31,
    "triton_fused": 2.6,
}

CRASH_LOG = (
    "\x1b[31mFatal Python error: Segmentation fault\x1b[0m\n<script>alert('log')</script>\nlibtriton.so(+0x1f00)\n"
)


def case(
    implementation: str = "triton_fused",
    scheme: str = "e4m3fn-row",
    workload: str = "llama2-7b.o",
    m: int = 1,
    n: int = 4096,
    k: int = 4096,
) -> Case:
    return Case(implementation=implementation, scheme=scheme, workload=workload, m=m, n=n, k=k)


def record(
    of: Case,
    verdict: Verdict | None = None,
    *,
    speedup: float | None = None,
    machine: Machine = CPU,
    build: Build = BUILD,
    flags: tuple[Flag, ...] = (),
    no_timing: str | None = None,
    seed: int = 0,
    **more,
) -> Record:
    """Return one record; timed if `speedup` is given, else right without a time unless `verdict` says otherwise."""
    verdict = verdict or Verdict(status=Status.OK)
    bits, noise = SCHEMES.get(of.scheme, (8, 30.0))
    packed = int(of.n * of.k * bits / 8)
    rng = random.Random(f"{seed} {of.id}")
    timing = None
    traffic = Traffic(packed_bytes=packed)
    if speedup is not None:
        baseline = 2 * of.n * of.k / (machine.read_gb_per_s * 1e3) * (1 + of.m / 64)
        middle = baseline / speedup
        samples = sorted(middle * (1 + rng.gauss(0, 0.015)) for _ in range(25))
        timing = Timing(samples_us=samples, median_us=samples[12], ci95_us=(samples[7], samples[17]),
                        baseline_us=baseline, speedup=baseline / samples[12],
                        speedup_ci95=(baseline / samples[17], baseline / samples[7]))
        least = packed + 2 * of.m * (of.n + of.k)
        rate = least / samples[12] / 1e3
        unfused = Flag.UNFUSED in flags
        traffic = Traffic(
            packed_bytes=packed,
            bytes_min=least,
            gb_per_s=rate,
            roofline_fraction=rate / machine.read_gb_per_s,
            kernels_launched=3 if unfused else 1,
            kernels=["aten::to", "aten::mm", "aten::mul"][: 3 if unfused else 1],
            peak_bytes=2 * of.n * of.k if unfused else 2 * of.m * of.n,
            bottleneck=f"writes the decoded weight to memory and reads it back ({2 * of.n * of.k / 1e6:.0f} MB of "
                       f"scratch); "
            "takes 3 kernels where one would do"
            if unfused
            else "",
        )
    elif verdict.status is Status.OK:
        no_timing = no_timing or "a canary: its shape is there to be right on, and too small to time"
    right = verdict.status is Status.OK
    accuracy = Accuracy(relative_error=0.0021, bound=0.011, worst_ulp=0.6, sqnr_db=noise) if right else Accuracy()
    return Record(started_at="2026-11-23T20:17:41+00:00", elapsed_s=0.41, case=of, build=build, machine=machine,
                  verdict=verdict, accuracy=accuracy, timing=timing, traffic=traffic, flags=list(flags),
                  no_timing=no_timing, about=f"{of.implementation} says what it does.", source="0123456789ab", seed=7,
                  **more)


def verdict_of(implementation: str, scheme: str, workload: str) -> Verdict:
    """Return the verdict that this sample has for a case."""
    if implementation == "native_float8":
        if scheme == "e4m3fnuz-row":
            return Verdict(
                status=Status.WRONG, kind=Kind.FN_AS_FNUZ, summary="decodes every weight to half its value",
                evidence={"gain": "0.4997", "codes_off": 254, "worst_at": [0, 17], "table": {"0x38": [1.0, 0.5]}}
            )
        if not scheme.startswith(("e4m3", "e5m2")):
            return Verdict(
                status=Status.UNSUPPORTED, summary="takes the four torch.float8 dtypes with one scale a row or tensor"
            )
    if implementation == "compiled_mixed_mm" and scheme == "e5m2fnuz-row":
        return Verdict(
            status=Status.CRASH, kind=Kind.COMPILER_ABORT, signal="SIGABRT", exit_code=-6, log_tail=CRASH_LOG,
            summary="died by SIGABRT: size mismatch when packing elements for LLVM struct expected 4 but got 8"
        )
    if implementation == "int8_weight_only" and scheme != "int8-row":
        return Verdict(status=Status.UNSUPPORTED, summary="takes int8-row only")
    if implementation == "dense" and scheme != "bf16":
        return Verdict(status=Status.UNSUPPORTED, summary="keeps 16-bit weights only")
    if implementation == "triton_fused" and scheme == "nvfp4" and not workload.startswith("canary"):
        return Verdict(status=Status.NONFINITE, summary="12 of 4096 outputs are not finite, the first at [0, 77]: nan",
                       evidence={"nonfinite": 12})
    return Verdict(status=Status.OK)


def varied(machine: Machine = CPU, build: Build = BUILD) -> list[Record]:
    """Return a sweep of every implementation × scheme × layer above."""
    records = []
    for workload, (n, k, tokens) in LAYERS.items():
        for m in tokens:
            for scheme in SCHEMES:
                for implementation, speed in SPEED.items():
                    if scheme == "bf16" and implementation != "dense":
                        continue
                    of = case(implementation, scheme, workload, m, n, k)
                    verdict = verdict_of(implementation, scheme, workload)
                    if workload.startswith("canary") or verdict.status is not Status.OK:
                        records.append(record(of, verdict, machine=machine, build=build))
                        continue
                    bits = SCHEMES[scheme][0]
                    speedup = speed * (8 / bits if implementation == "triton_fused" else 1) * (1 if m == 1 else 0.7)
                    flags = (Flag.UNFUSED,) if implementation in ("eager_upcast", "native_float8") else ()
                    if implementation == "compiled_mixed_mm" and scheme == "e3m4-row":
                        flags = (Flag.NOISY,)
                    records.append(record(of, speedup=speedup, machine=machine, build=build, flags=flags))
    return records


def write(results: Path, records: list[Record]) -> None:
    store = Store(results)
    for one in records:
        store.append(one)
