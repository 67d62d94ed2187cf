"""Find a checkpoint's quantized layers: which tensors belong together, in which dialect, under which scheme."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from fpxbench.checkpoint.checkpoint_folder import Checkpoint
from fpxbench.checkpoint.dialects import DIALECTS, GGUF_SCHEMES, SCALE_FORMATS, Dialect, Element
from fpxbench.checkpoint.quant_state import QuantState, read_state
from fpxbench.checkpoint.tensor_entry import ITEM_BITS, CheckpointError, TensorEntry
from fpxbench.numbers.scheme import scheme_named

_STANDARD_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Grid:
    """The block of weights that share a scale: `rows` by `columns`; 0 means the whole dimension."""

    rows: int
    columns: int

    @property
    def name(self) -> str:
        """The scaling's name: ``tensor``, ``row``, ``g128``, ``b128x128``."""
        if self.rows == 1:
            return f"g{self.columns}" if self.columns else "row"
        return f"b{self.rows}x{self.columns}" if self.rows else "tensor"


@dataclass
class QuantizedLayer:
    """One quantized weight of a checkpoint.

    Parameters
    ----------
    name : the layer's, without the tensors' suffixes
    dialect : of `DIALECTS`
    others : names of further dialects that the tensors fit as well
    element, n, k, experts : the weight is [N, K], or [experts, N, K]
    grid : which weights share a scale; None where the scale's shape fits no block
    scale_format : ``fp32``, ``bf16``, ``fp16``, ``e8m0``, ``e4m3fn``
    codes, scales, global_scale, activation_scale : the tensors; None if absent
    state : the parsed description beside flat codes; None for dialects without one
    described_by : the tensors of that description, by what they hold: ``state``, ``values``, ``nested_scales``, …
    problems : one sentence for each thing that is wrong
    """

    name: str
    dialect: Dialect
    element: Element
    n: int
    k: int
    codes: TensorEntry
    scales: TensorEntry | None
    experts: int = 1
    others: tuple[str, ...] = ()
    grid: Grid | None = None
    scale_format: str = ""
    global_scale: TensorEntry | None = None
    activation_scale: TensorEntry | None = None
    state: QuantState | None = None
    described_by: dict[str, TensorEntry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def scheme(self) -> str | None:
        """The scheme's name by its parts (``e4m3fn-b128x128``, ``mxfp4``), or None where a part is not known."""
        if self.dialect.interleaved:
            return GGUF_SCHEMES.get(self.codes.dtype)
        if self.grid is None:
            return None
        name = scheme_name(self.element.format, self.grid, self.scale_format)
        return f"{name}.div" if name == "nvfp4" and self.dialect.global_divides else name

    @property
    def decodes_without_scheme(self) -> bool:
        """Whether its numbers can be read although it has no scheme: GGUF's Q4_1, with an offset for each block."""
        return self.dialect.interleaved and self.codes.dtype == "Q4_1" and not self.problems

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        parts = {"codes": self.codes, "scales": self.scales, "global scale": self.global_scale,
                 "activation scale": self.activation_scale, **self.described_by}
        return {part: tensor for part, tensor in parts.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def scheme_name(element: str, grid: Grid, scale_format: str) -> str:
    """Return the name of the scheme with these parts. A scale format that the scaling does not imply is appended."""
    if scale_format == "e4m3fn":
        return "nvfp4" if (element, grid.name) == ("e2m1", "g16") else f"{element}-{grid.name}.e4m3fn"
    if scale_format == "e8m0":
        if grid.name == "g32":
            return {"e2m1": "mxfp4", "e4m3fn": "mxfp8_e4m3fn", "e5m2": "mxfp8_e5m2", "e3m2": "mxfp6_e3m2",
                    "e2m3": "mxfp6_e2m3"}.get(element, f"{element}-mx")
        return f"{element}-{grid.name}.e8m0"
    return f"{element}-{grid.name}" + ("" if scale_format == "fp32" else f".{scale_format}")


def quantized_layers(checkpoint: Checkpoint) -> list[QuantizedLayer]:
    """Return the quantized layers, by name, each in the dialect that fits its tensors best.

    Where the tensors fit several dialects, the config's ``quant_method`` decides; the rest are in `others`.
    """
    declared = declared_methods(checkpoint)
    candidates: dict[str, list[QuantizedLayer]] = defaultdict(list)
    with_suffix = {suffix: list(_with_suffix(checkpoint, suffix))
                   for suffix in {dialect.codes for dialect in DIALECTS.values()}}
    for dialect in DIALECTS.values():
        for name, codes in with_suffix[dialect.codes]:
            layer = _layer(checkpoint, dialect, name, codes)
            if layer is not None:
                candidates[name].append(layer)
    return [_best(found, declared) for _, found in sorted(candidates.items())]


def declared_methods(checkpoint: Checkpoint) -> frozenset[str]:
    """Return what config.json and hf_quant_config.json call the quantization, and the dtype that Quark gives weights.
    """
    declared = [_found(checkpoint.config, *path) for path in (
        ("quantization_config", "quant_method"), ("quantization_config", "quant_algo"),
        ("hf_quant_config", "quant_method"), ("hf_quant_config", "quant_algo"),
        ("hf_quant_config", "quantization", "quant_algo"),
        ("quantization_config", "global_quant_config", "weight", "dtype"))]
    return frozenset(str(name) for name in declared if name)


def _found(config: object, *path: str) -> object:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def grid_of(shape: tuple[int, ...], n: int, k: int, block: int | None = None) -> Grid | None:
    """Infer from the scales' shape which elements of an [n, k] weight share a scale; None if no block fits.

    If several blocks would give the same number of scales (a ragged last block), `block` is preferred, then a standard
    size that divides.
    """
    side = tuple(s for s in shape if s != 1) if len(shape) != 2 else shape
    if len(shape) == 4 and shape[1] == shape[3] == 1:       # ModelOpt keeps the dimensions inside of a block
        side = shape[0], shape[2]
    if prod(shape) == 1:
        return Grid(0, 0)
    if side in ((n,), (n, 1)):
        return Grid(1, 0)
    if len(side) != 2:
        return None
    columns = _block(side[1], k, block)
    rows = 1 if side[0] == n else _block(side[0], n, columns)
    return Grid(rows, columns) if rows and columns else None


def _grid(dialect: Dialect, shape: tuple[int, ...], n: int, k: int, declared: int | None) -> Grid | None:
    if dialect.block:
        return Grid(1, dialect.block) if shape[:1] == (n,) and prod(shape) == n * -(-k // dialect.block) else None
    return grid_of(shape, n, k, declared)


def _is_scheme(name: str | None) -> bool:
    try:
        return name is not None and scheme_named(name) is not None
    except ValueError:
        return False


def _block(count: int, size: int, preferred: int | None) -> int | None:
    fitting = [block for block in _STANDARD_BLOCKS if -(-size // block) == count]
    if preferred in fitting:
        return preferred
    exact = [block for block in fitting if size % block == 0]
    return next(iter(exact or fitting), preferred if preferred and -(-size // preferred) == count else None)


def _with_suffix(checkpoint: Checkpoint, suffix: str) -> Iterator[tuple[str, TensorEntry]]:
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(suffix):
            yield name.removesuffix(suffix), tensor


def _layer(checkpoint: Checkpoint, dialect: Dialect, name: str, codes: TensorEntry) -> QuantizedLayer | None:
    """Return the layer `name` read in `dialect`, or None if its tensors do not fit."""
    element = dialect.elements.get(codes.dtype)
    if element is None or len(codes.shape) < (3 if dialect.grouped else 2):
        return None
    if dialect.interleaved:
        n, k = codes.shape[-2:]
        return QuantizedLayer(name, dialect, element, n, k, codes, None, prod(codes.shape[:-2]))
    scales = checkpoint.tensors.get(name + dialect.scales)
    if scales is None or scales.dtype not in dialect.scale_dtypes:
        return None
    if dialect.state:
        return _described(checkpoint, dialect, name, codes, scales)

    def part(suffix: str) -> TensorEntry | None:
        return checkpoint.tensors.get(name + suffix) if suffix else None

    experts = codes.shape[:-3] if dialect.grouped else codes.shape[:-2]
    n, *width = codes.shape[len(experts):]
    k, left_over = divmod(prod(width) * ITEM_BITS[codes.dtype], element.bits)
    if left_over:
        return None
    grid = _grid(dialect, scales.shape[len(experts):], n, k, _declared_block(checkpoint))
    global_scale = part(dialect.global_scale)
    layer = QuantizedLayer(
        name, dialect, element, n, k, codes, scales, prod(experts), grid=grid, scale_format=SCALE_FORMATS[scales.dtype],
        global_scale=global_scale, activation_scale=part(dialect.activation_scale))
    zero_points = part(dialect.zero_point)
    if zero_points is not None:
        layer.described_by["zero points"] = zero_points
    if not n * k * layer.experts:
        layer.problems.append(f"{name}: has no elements: {list(codes.shape)}")
    elif grid is None:
        blocks = f"blocks of {dialect.block}" if dialect.block else "block"
        layer.problems.append(f"{name}: scales of shape {list(scales.shape)} fit no {blocks} of a weight [{n}, {k}]")
    elif not _is_scheme(layer.scheme):
        layer.problems.append(f"{name}: no scheme of {element.format} has {layer.scale_format} scales for {grid.name}")
    needs_global = layer.scale_format == "e4m3fn" and dialect.global_scale and not dialect.global_optional
    if needs_global and global_scale is None:
        layer.problems.append(f"{name}: has no {dialect.global_scale[1:]}, which the block scales are relative to")
    return layer


def _described(checkpoint: Checkpoint, dialect: Dialect, name: str, codes: TensorEntry,
               scales: TensorEntry) -> QuantizedLayer | None:
    """Read the layer by the description beside its flat codes; None if it has none of this dialect."""
    suffixes = {"state": dialect.state, "values": dialect.values}
    if scales.dtype == "U8":
        suffixes |= {"nested_scales": dialect.nested_scales, "nested_values": dialect.nested_values}
    parts = {part: checkpoint.tensors.get(name + suffix) for part, suffix in suffixes.items()}
    if parts["state"] is None:
        return None
    element = dialect.elements[codes.dtype]
    layer = QuantizedLayer(name, dialect, element, 0, 0, codes, scales, scale_format="fp32",
                           described_by={part: entry for part, entry in parts.items() if entry is not None})
    try:
        layer.state = state = read_state(parts["state"])
    except CheckpointError as error:
        layer.problems.append(str(error))
        return layer
    layer.n, layer.k = state.n, state.k
    count = -(-state.n * state.k // state.block)
    missing = [name + suffixes[part] for part, entry in parts.items() if entry is None]
    if missing:
        layer.problems.append(f"{name}: {', '.join(missing)} is missing")
    if codes.nbytes * 8 != state.n * state.k * element.bits or scales.elements != count:
        layer.problems.append(f"{name}: {codes.nbytes} bytes of codes and {scales.elements} scales, where [{state.n},"
                              f" {state.k}] in blocks of {state.block} has"
                              f" {state.n * state.k * element.bits // 8} and {count}")
    elif state.k % state.block:
        layer.problems.append(f"{name}: blocks of {state.block} cross the rows of a weight [{state.n}, {state.k}],"
                              " which no scheme has")
    elif bool(state.nested_block) != (scales.dtype == "U8"):
        layer.problems.append(f"{name}: scales are {scales.dtype}, and the description says nested blocks of"
                              f" {state.nested_block}")
    else:
        layer.grid = Grid(1, state.block)
    return layer


def _declared_block(checkpoint: Checkpoint) -> int | None:
    """Return the block size that the config names, if it names one."""
    declared = checkpoint.config.get("quantization_config")
    sizes: list[object] = []
    if isinstance(declared, dict):
        block = declared.get("weight_block_size")
        sizes += [declared.get("group_size"), block[-1] if isinstance(block, list) and block else None]
        groups = declared.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            sizes.append(weights.get("group_size") if isinstance(weights, dict) else None)
    return next((size for size in sizes if type(size) is int and size > 0), None)


def _best(found: list[QuantizedLayer], declared: frozenset[str]) -> QuantizedLayer:
    """Return the reading that the config declares; else the one with the fewest problems, then with the most of its
    tensors used."""
    def rank(layer: QuantizedLayer) -> tuple[bool, int, int, int]:
        agrees = layer.dialect.methods & declared
        return not agrees, len(layer.problems), -len(agrees), -len(layer.tensors)

    best, *rest = sorted(found, key=rank)
    best.others = tuple(layer.dialect.name for layer in rest if rank(layer) == rank(best))
    return best
