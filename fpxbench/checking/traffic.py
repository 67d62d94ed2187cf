"""Analyze a timed case's memory traffic: useful bandwidth, flags, and its bottleneck."""

from __future__ import annotations

from fpxbench.checking.effects import HEAVY_KERNEL, Effects
from fpxbench.checking.operands import Operands
from fpxbench.records.record import OVER_ROOFLINE, Flag, Timing, Traffic

NOISY_HALF_WIDTH = 0.05
UNFUSED_BYTES = 0.25
"""Scratch memory above this share of the 16-bit weight means that decoded weights were written out."""
_WRITES_FASTER = 2.0
"""How much faster than the measured read bandwidth a kernel may write, for example into a cache."""
_SLOW_BASELINE = 1.25
"""Largest plausible speedup over dense if arithmetic limits both."""
_MEMORY_SHARE = 0.7
"""A call is memory-bound if its bytes take more than this share of its time."""
_OF_DENSE_RATE = 0.5
"""A call is not compute-bound below this share of the dense product's rate."""
_PASSES_OF_X = 4
"""How many times its bytes a kernel may move to copy, reorder or quantize the activation."""


def traffic_of(operands: Operands, effects: Effects, median_s: float | None, read_gb_per_s: float | None,
               kept_bytes: int | None = None) -> Traffic:
    """Return the bytes and kernels of a case, and the useful bandwidth if it was timed."""
    case = operands.case
    element = 2
    bytes_min = operands.bytes_read + case.rows * (case.k + case.n) * element
    gb_per_s = bytes_min / median_s / 1e9 if median_s else None
    return Traffic(
        packed_bytes=operands.weight.nbytes, bytes_min=bytes_min, gb_per_s=gb_per_s,
        roofline_fraction=gb_per_s / read_gb_per_s if gb_per_s and read_gb_per_s else None,
        kernels_launched=len(effects.kernels), heavy_kernels=effects.heavy_kernels,
        kernels=[kernel.name[:200] for kernel in effects.kernels[:40]],
        peak_bytes=effects.peak_bytes, kept_bytes=kept_bytes,
    )


def wrote_decoded_weight(operands: Operands, peak_bytes: int) -> bool:
    """Return whether one call held much of the weight in decoded form, beyond its output and a copy of the activation.
    """
    case = operands.case
    return peak_bytes - operands.output_bytes - 2 * case.rows * case.k > UNFUSED_BYTES * 2 * case.n * case.k


def decoded_apart(operands: Operands, seen: Effects, read_gb_per_s: float | None) -> bool | None:
    """Return whether kernels other than the products take as long as writing the decoded weight to memory; None if
    preparing the activation may take as long too.

    Kernels that reorder the activation or add partial sums are part of a fused product, and take less. Without a
    measured bandwidth, every kernel that takes 5% of the call counts.
    """
    case = operands.case
    if not read_gb_per_s:
        return seen.heavy_kernels > operands.products
    decode_us = 2 * operands.weights_read / (read_gb_per_s * 1e3) / _WRITES_FASTER
    activation_us = _PASSES_OF_X * 2 * case.rows * case.k / (read_gb_per_s * 1e3)
    times = sorted(seen.times_us, reverse=True)
    others = sum(times[operands.products:])
    if others < max(decode_us, HEAVY_KERNEL * sum(times)):
        return False
    return True if others >= activation_us else None


def not_asked(operands: Operands, moved: Traffic, seen: Effects, read_gb_per_s: float | None) -> dict[str, str]:
    """Return flag -> why it could not be determined, for a timed case."""
    if not operands.weight.scheme.quantized or wrote_decoded_weight(operands, moved.peak_bytes) \
            or decoded_apart(operands, seen, read_gb_per_s) is not None:
        return {}
    return {Flag.UNFUSED: f"kernels beside the product may prepare {operands.case.rows} tokens or decode the weight:"
                          " both take as long; no large scratch memory was seen"}


def flags(operands: Operands, times: Timing, moved: Traffic, beyond_cache: bool, seen: Effects,
          read_gb_per_s: float | None) -> list[Flag]:
    """Return the flags of a right, timed case."""
    found = []
    quantized = operands.weight.scheme.quantized
    if quantized and (decoded_apart(operands, seen, read_gb_per_s)
                      or wrote_decoded_weight(operands, moved.peak_bytes)):
        found.append(Flag.UNFUSED)
    if beyond_cache and _over_roofline(moved):
        found.append(Flag.OVER_ROOFLINE)
    if quantized and _slow_baseline(operands, times, read_gb_per_s):
        found.append(Flag.SLOW_BASELINE)
    low, high = times.ci95_us
    if (high - low) / 2 > NOISY_HALF_WIDTH * times.median_us:
        found.append(Flag.NOISY)
    if quantized and moved.kept_bytes:
        found.append(Flag.KEEPS_DECODED_COPY)
    return found


def _over_roofline(moved: Traffic) -> bool:
    return moved.roofline_fraction is not None and moved.roofline_fraction > OVER_ROOFLINE


def _slow_baseline(operands: Operands, times: Timing, read_gb_per_s: float | None) -> bool:
    """Return whether the dense product was slower than its arithmetic explains.

    False for CPUs, whose dense product may lack instructions that a kernel uses, for experts, and for quantized
    activations.
    """
    case = operands.case
    if operands.device == "cpu" or operands.rule is not None or case.experts or not read_gb_per_s:
        return False
    certain = times.speedup_ci95[0] if times.speedup_ci95 else 0.0
    return times.median_us > 2 * _dense_us(operands, read_gb_per_s) and certain > _SLOW_BASELINE


def _dense_us(operands: Operands, read_gb_per_s: float) -> float:
    """Return the time of moving the dense product's bytes once, in µs."""
    case = operands.case
    return 2 * (operands.weights_read + case.rows * (case.k + case.n)) / (read_gb_per_s * 1e3)


def _percent(share: float) -> str:
    return "under 1%" if share < 0.01 else f"{share:.0%}"


def bottleneck(operands: Operands, times: Timing, moved: Traffic, read_gb_per_s: float | None) -> str:
    """Describe a case's bottleneck in one sentence."""
    parts = []
    if operands.weight.scheme.quantized and moved.kept_bytes:
        parts.append(f"keeps a decoded copy of the weight: {moved.kept_bytes / 1e6:.1f} MB held between calls, beside"
                     f" {moved.packed_bytes / 1e6:.1f} MB stored")
    if wrote_decoded_weight(operands, moved.peak_bytes):
        parts.append("writes the decoded weight to memory and reads it back"
                     f" ({moved.peak_bytes / 1e6:.0f} MB of scratch)")
    if operands.weight.scheme.quantized and moved.heavy_kernels > operands.products:
        parts.append(f"spends its time in {moved.heavy_kernels} kernels where"
                     f" {'one' if operands.products == 1 else operands.products} would do")
    if read_gb_per_s and _over_roofline(moved):
        parts.append(
            f"{moved.roofline_fraction:.1f} times faster than its bytes can be read from memory: they come from a"
            " cache, or not all of them are read"
        )
    elif read_gb_per_s:
        share = moved.bytes_min / (read_gb_per_s * 1e3) / times.median_us
        if parts:
            parts.append(f"reading the packed bytes once would take {_percent(share)} of the time")
        else:
            parts.append(_limit(operands, times, moved, read_gb_per_s, share))
    return "; ".join(parts)


def _limit(operands: Operands, times: Timing, moved: Traffic, read_gb_per_s: float, share: float) -> str:
    case = operands.case
    if share > _MEMORY_SHARE:
        return f"memory: it moves {moved.gb_per_s:.0f} GB/s of the {read_gb_per_s:.0f} GB/s that this machine reads"
    reading = f"reading its bytes would take only {_percent(share)} of the time"
    if case.rows > 64 and times.baseline_us:
        flops = 2 * case.rows * case.n * case.k / 1e6
        reached, dense = flops / times.median_us, flops / times.baseline_us
        if reached < _OF_DENSE_RATE * dense:
            launched = f"{moved.kernels_launched} kernels a call, " if (moved.kernels_launched or 0) > 1 else ""
            return (f"neither memory nor arithmetic: {launched}{reached:.3g} TFLOP/s where dense reaches {dense:.3g};"
                    f" {reading}")
        if _dense_us(operands, read_gb_per_s) <= _MEMORY_SHARE * times.baseline_us:
            return (f"arithmetic: {reached:.3g} TFLOP/s at M = {case.m}, where memory would take {_percent(share)} of"
                    " the time")
    return f"{'decoding and launches' if operands.weight.scheme.quantized else 'launches'}, not memory: {reading}"
