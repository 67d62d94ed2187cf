"""Write a layer in another dialect: exactly, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fpxbench.checkpoint.dialects import DIALECTS, SCALE_FORMATS, Dialect, Element
from fpxbench.checkpoint.layers import QuantizedLayer
from fpxbench.checkpoint.quant_state import state_bytes
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_weight
from fpxbench.numbers.packing import pack
from fpxbench.numbers.weight import QuantizedWeight

_TORCH = {"F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
          "F8_E5M2FNUZ": "float8_e5m2fnuz", "U8": "uint8", "I8": "int8", "F8_E8M0": "float8_e8m0fnu", "F4": "uint8"}


def in_dialect(name: str, weight: QuantizedWeight, dialect: Dialect, *, nearest: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a layer called `name` as `dialect` stores them: the same numbers, bit for bit.

    With `nearest` the reciprocal of a global scale may be rounded: factors then differ by one unit in the last place.

    Raises CheckpointError with the reason if the dialect cannot represent this weight exactly.
    """
    if dialect.interleaved:
        raise CheckpointError(f"{name}: {dialect.name} can be read, but not written")
    fmt, scaling = weight.scheme.format, weight.scheme.scaling
    dtype, element = _element(name, fmt.name, dialect)
    if dialect.scale_divisor != 1:
        raise CheckpointError(f"{name}: {dialect.name} stores scales times {dialect.scale_divisor:g}, which rounds"
                              " them")
    if dialect.block and (scaling.block_rows, scaling.block) != (1, dialect.block):
        raise CheckpointError(f"{name}: {dialect.name} has one scale per {dialect.block} weights along K, but this is"
                              f" {weight.scheme.name}")
    if dialect.state:
        return _described(name, weight, dialect, element)
    k = weight.shape[1]
    codes = pack(weight.codes(), fmt.bits, element.layout)
    scales = _scales(name, weight, dialect)
    if dialect.grouped:
        if scaling.block is None or k % scaling.block:
            raise CheckpointError(
                f"{name}: {dialect.name} holds whole blocks, but K = {k} ends inside one of {scaling.name}"
            )
        codes = codes.unflatten(1, (k // scaling.block, -1))
    tensors = {name + dialect.codes: codes.view(getattr(torch, _TORCH[dtype])), name + dialect.scales: scales}
    if scaling.has_tensor_scale:
        tensors[name + dialect.global_scale] = _global_scale(name, weight, dialect, nearest)
    return tensors


def _described(name: str, weight: QuantizedWeight, dialect: Dialect, element: Element) -> dict[str, Tensor]:
    """Return flat codes and scales with their description."""
    scaling, fmt = weight.scheme.scaling, weight.scheme.format
    (n, k), block = weight.shape, scaling.block
    if scaling.block_rows != 1 or block is None or k % block or scaling.scale_format.format.name != "fp32":
        raise CheckpointError(f"{name}: {dialect.name} holds an fp32 scale for each whole block along K, but this is"
                              f" {weight.scheme.name} with K = {k}")
    packed = pack(weight.codes(), fmt.bits, element.layout)
    values = torch.tensor([fmt.value(code) for code in range(1 << fmt.bits)])
    described = state_bytes(dialect.state.rpartition("__")[2], n, k, block)
    return {name + dialect.codes: packed.reshape(-1, 1), name + dialect.scales: weight.scales.reshape(-1),
            name + dialect.values: values, name + dialect.state: torch.tensor(list(described), dtype=torch.uint8)}


def convert(
    layers: Iterable[QuantizedLayer], dialect_name: str, output: Path, *, nearest: bool = False
) -> tuple[int, list[str]]:
    """Write every layer that can be converted to a safetensors file in `dialect_name`; return their number, and the
    reasons for the others.

    Given a writer's name (``modelopt``), use for each layer the first of its dialects that can represent it. Raises
    CheckpointError for an unknown name.
    """
    among = [dialect for name, dialect in DIALECTS.items() if name == dialect_name]
    among = among or [dialect for name, dialect in DIALECTS.items() if name.startswith(f"{dialect_name}-")]
    if not among:
        raise CheckpointError(f"no dialect {dialect_name!r}: one of {', '.join(DIALECTS)}, or what some of them begin"
                              " with: modelopt")
    tensors: dict[str, Tensor] = {}
    converted, refusals = 0, []
    for layer in layers:
        try:
            weights = [read_weight(layer, expert) for expert in range(layer.experts)]
            parts = _in_one_of(layer.name, weights, among, nearest)
        except CheckpointError as error:
            refusals.append(str(error))
            continue
        converted += 1
        tensors |= (
            parts[0] if layer.experts == 1 else {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        )
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)
    return converted, refusals


def _in_one_of(name: str, weights: list[QuantizedWeight], dialects: list[Dialect],
               nearest: bool) -> list[dict[str, Tensor]]:
    """Return the tensors of each weight in the first of `dialects` that can represent all. Raise CheckpointError with
    the reason of each if none can."""
    refusals = []
    for dialect in dialects:
        try:
            return [in_dialect(name, weight, dialect, nearest=nearest) for weight in weights]
        except CheckpointError as error:
            refusals.append(str(error).removeprefix(f"{name}: "))
    raise CheckpointError(f"{name}: {'; '.join(refusals)}")


def _element(name: str, fmt: str, dialect: Dialect) -> tuple[str, Element]:
    for dtype, element in dialect.elements.items():
        if element.format == fmt:
            return dtype, element
    known = ", ".join(dict.fromkeys(element.format for element in dialect.elements.values()))
    raise CheckpointError(f"{name}: {dialect.name} holds {known}, but these codes are {fmt}")


def _scales(name: str, weight: QuantizedWeight, dialect: Dialect) -> Tensor:
    scale_format = weight.scheme.scaling.scale_format
    dtype = next(
        (dtype for dtype in sorted(dialect.scale_dtypes) if SCALE_FORMATS[dtype] == scale_format.format.name), None
    )
    if dtype is None:
        known = ", ".join(sorted({SCALE_FORMATS[dtype] for dtype in dialect.scale_dtypes}))
        raise CheckpointError(
            f"{name}: {dialect.name} holds scales in {known}, but these are {scale_format.format.name}"
        )
    scales = weight.scales.view(getattr(torch, _TORCH[dtype])) if scale_format.coded else weight.scales
    return scales.reshape(()) if weight.scales.numel() == 1 else scales


def _global_scale(name: str, weight: QuantizedWeight, dialect: Dialect, nearest: bool) -> Tensor:
    """Return the second-level scale as the dialect stores it. A reciprocal is used only if every block keeps its
    factor."""
    if not dialect.global_scale:
        raise CheckpointError(f"{name}: {dialect.name} has no second-level scale, but {weight.scheme.name} needs one")
    scale, scaling = weight.tensor_scale, weight.scheme.scaling
    divides = bool(getattr(scaling, "divides", False))
    if divides != dialect.global_divides:
        block, reciprocal = scaling.scale_format.decode(weight.scales), 1 / scale
        same = torch.equal(
            block * scale if not divides else block / scale, block / reciprocal if not divides else block * reciprocal
        )
        if not (same or nearest):
            raise CheckpointError(
                f"{name}: {dialect.name} stores the reciprocal of the global scale, and for {scale.item():.8g} "
                "no fp32 reciprocal keeps every block's factor (--nearest uses the nearest one)"
            )
        scale = reciprocal
    return scale.reshape(1) if dialect.global_divides else scale.reshape(())
