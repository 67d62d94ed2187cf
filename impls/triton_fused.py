"""Decode, product and scale in one Triton kernel, for any scheme of up to 8 bits.

Weights are stored as fragments (`fpxbench.numbers.packing.fragment`) and multiplied by `_fragment_kernel` or, on sm_90
where it was measured to be faster (with more than 16 rows of x, mostly), by `_stream_kernel`. What fragments cannot
hold (N or K no multiple of 8, blocks of 16 with fp32 scales, formats whose products bfloat16 does not hold), and every
weight on AMD GPUs, is stored in planar rows (`_planar`). The result differs from float64 by fp32 accumulation and the
rounding of the output: no weight is rounded.

Without a GPU the same kernels run in Triton's interpreter, for correctness only. Nothing is tuned at the first call;
with FPX_TUNE=1 candidates are timed, and the fastest is used and remembered (`_tiles`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fpxbench.checking.tuning import tuning
from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls import _fragment, _fragment_weight, _planar, _tiles, _triton_codes, _tuning
from fpxbench.impls._tiles import AnyTile, TileDevice
from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.packing.fragment import fragment_named
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.weight import QuantizedWeight

Config = AnyTile | _planar.Config
LEAST_ARCH = 80
"""First architecture with bfloat16 in ``mma.sync`` and ``fma.bf16x2``."""
Derived = TypeVar("Derived")


@implementation("triton_fused")
class TritonFused(Implementation):
    """One Triton kernel decodes, multiplies and scales, with matrix instructions from one token on."""

    any_layout = True       # a weight in another layout than fragments is copied to planar rows once

    def __init__(self) -> None:
        self._derived = WeakIdKeyDictionary()
        self._fastest: dict[tuple, Config] = {}

    def supports(self, scheme: Scheme, device: str) -> Support:
        if importlib.util.find_spec("triton") is None:
            return Support.no("needs Triton: pip install triton", missing=True)
        if not scheme.quantized:
            return Support.no(f"{scheme.name} has no codes to decode")
        if scheme.activation is not None:
            return Support.no(f"multiplies 16-bit activations; {scheme.name} rounds them to {scheme.activation.name}")
        if isinstance(scheme.format, Codebook):
            return Support.no(f"decodes arithmetically, but {scheme.format.name} is a list of values")
        why_not = _triton_codes.why_not(scheme.format)
        return Support.no(why_not) if why_not else Support.yes()

    def no_timing(self, device: str) -> str | None:
        return "runs in Triton's interpreter: correctness only" if device == "cpu" else None

    def max_elements(self, device: str) -> int | None:
        return 1 << 20 if device == "cpu" else None

    def layout_for(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str:
        return (_fragment_weight.layout_of(scheme, *shape) if device_of(device) else None) or "planar"

    def stored(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return the weight as fragments if the kernels can multiply these codes and scales, else in planar rows."""
        chosen = super().stored(weight)
        fits = chosen.layout == "planar" or self._operands(chosen) is not None
        return chosen if fits else weight.relayout("planar")

    def prepare(self, weight: QuantizedWeight) -> None:
        if weight.layout == "planar" or self._operands(weight) is None:
            planar = self._planar(weight)
            self._once(planar, "scales", _planar.scale_tensors)

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        """Return the oracle's codes and scales, as `stored` lays them out."""
        layout = self.layout_for(scheme, (weight.shape[0], weight.shape[1]), weight.device)
        return self.stored(quantize(weight, scheme, layout))

    def matmul(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        return self._multiplied(x, weight, self._pick(x, weight))

    def configs(self, x: Tensor, weight: QuantizedWeight) -> Sequence[Config]:
        """Return what `matmul` may pick: one tile, or with FPX_TUNE=1 all that are worth trying, that one first."""
        m, target = tokens(x), _planar.target_of(x.device)
        tune = tuning() and not target.interpreted
        if self._fragments(x, weight) is not None:
            bits, kind = weight.scheme.format.bits, _fragment_weight.scaling_kind(weight.scheme.scaling)
            device = device_of(x.device)
            picked = _tiles.pick(m, *weight.shape, bits, kind, device)
            # Products are timed one at a time, which does not show overlap: all candidates overlap as the table's tile
            # does.
            others = _tuning.candidates(m, bits, kind, device) if tune else ()
            return list(dict.fromkeys([picked, *(replace(tile, overlap=picked.overlap) for tile in others)]))
        if tune:
            return _planar.worth_trying(m, weight.scheme, weight.shape[1], target)
        return [_planar.default_config(m, weight.scheme, *weight.shape, target)]

    def matmul_with(self, x: Tensor, weight: QuantizedWeight, config: Config) -> Tensor:
        """Return ``x @ weight.T`` by a tile, for fragments, or a config of planar rows."""
        return self._multiplied(x, weight, config)

    def _multiplied(self, x: Tensor, weight: QuantizedWeight, config: Config) -> Tensor:
        n, k = weight.shape
        checked(x, weight)
        rows = x.reshape(-1, k)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        # The interpreter truncates bf16 results instead of rounding them.
        out = x.new_empty(rows.shape[0], n, dtype=torch.float32 if x.device.type == "cpu" else x.dtype)
        if rows.shape[0]:
            with torch.cuda.device_of(x):
                if isinstance(config, AnyTile):
                    _fragment.matmul(rows, self._operands(weight), config, out, device_of(x.device))
                else:
                    planar = self._planar(weight)
                    scales = self._once(planar, "scales", _planar.scale_tensors)
                    _planar.matmul(rows, planar, scales, config, out)
        return out.to(x.dtype).reshape(*x.shape[:-1], n)

    def _pick(self, x: Tensor, weight: QuantizedWeight) -> Config:
        checked(x, weight)
        candidates = self.configs(x, weight)
        if len(candidates) == 1 or x.numel() == 0 or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        key = (weight.scheme, weight.shape, tokens(x), x.dtype, x.device)
        if key not in self._fastest:
            self._fastest[key] = self._tuned(x, weight, candidates)
        return self._fastest[key]

    def _tuned(self, x: Tensor, weight: QuantizedWeight, candidates: Sequence[Config]) -> Config:
        """Return the fastest candidate, and remember it in the user's own table if it is a tile."""
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        def milliseconds(config: Config) -> float:
            try:
                return do_bench(lambda: self._multiplied(x, weight, config), warmup=3, rep=15, return_mode="median")
            except OutOfResources:      # the candidates were chosen on an H200
                return float("inf")

        best = min(candidates, key=milliseconds)
        scaling = _fragment_weight.scaling_kind(weight.scheme.scaling)
        if isinstance(best, AnyTile) and scaling != "fp32":
            _tiles.save(_tiles.TileEntry(device_of(x.device).arch, _tiles.width_of(weight.scheme.format.bits),
                                     *weight.shape, _tiles.m_class(tokens(x)), best))
        return best

    def _fragments(self, x: Tensor, weight: QuantizedWeight) -> _fragment_weight.FragmentOperands | None:
        """Return what the fragment kernels read of the weight, or None if they cannot multiply it exactly by `x`."""
        if device_of(x.device) is None:
            return None
        made = self._operands(weight)
        inexact = made is None or _fragment_weight.why_not_activation(made, x.dtype == torch.bfloat16)
        return None if inexact else made

    def _operands(self, weight: QuantizedWeight) -> _fragment_weight.FragmentOperands | None:
        if fragment_named(weight.layout) is None or weight.layout != _fragment_weight.layout_of(
                weight.scheme, *weight.shape):
            return None
        return self._once(weight, "operands", _fragment_weight.operands)

    def _planar(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return the weight in planar rows: itself, or a copy that is made once."""
        return weight if weight.layout == "planar" else self._once(weight, "planar", lambda w: w.relayout("planar"))

    def _once(self, weight: QuantizedWeight, what: str, make: Callable[[QuantizedWeight], Derived]) -> Derived:
        """Return ``make(weight)``, kept for as long as the weight's tensors are alive and unchanged."""
        stored = [tensor for tensor in (weight.packed, weight.scales, weight.tensor_scale) if tensor is not None]
        state = (what, *((id(tensor), version(tensor)) for tensor in stored))
        kept = self._derived.setdefault(weight.packed, {})
        if what not in kept or kept[what][0] != state:
            # The scales are kept as well, so that no other tensor can have their id.
            kept[what] = (state, stored[1:], make(weight))
        return kept[what][2]


def device_of(device: torch.device) -> TileDevice | None:
    """Return the device as the fragment kernels know it; None for one that they do not run on."""
    target = _planar.target_of(device)
    if target.interpreted:
        return TileDevice(0)
    if target.backend != "cuda" or target.capability < LEAST_ARCH:
        return None
    return TileDevice(target.capability, _fragment.has_stream(target.capability))


def checked(x: Tensor, weight: QuantizedWeight) -> None:
    """Raise ValueError for operands that do not fit together or are not what the kernels take."""
    k = weight.shape[1]
    if x.dtype not in _planar.ACTIVATIONS or x.shape[-1] != k or x.device != weight.device:
        raise ValueError(f"x must be bfloat16 or float16 [..., {k}] on {weight.device},"
                         f" not {x.dtype} {list(x.shape)} on {x.device}")


def tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def version(tensor: Tensor) -> Any:
    """Return what changes when PyTorch writes to the tensor. Tensors of inference mode have no such count: None."""
    return None if tensor.is_inference() else tensor._version
