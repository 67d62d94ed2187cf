"""Known ways to misread a stored weight, as data: which code is taken, what it decodes to, which scale it meets.

A weight is read in three steps that can each go wrong, and a known mistake is another choice in one of them. What an
implementation *would* give under a mistake is computed here; `fpxbench.diagnose` compares that with what it does give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from fpxbench import packing
from fpxbench.codec import decode, decode_table
from fpxbench.formats import Format
from fpxbench.scaling import NV_SCALE_FORMAT, Scaling
from fpxbench.verdict import Kind
from fpxbench.weight import QuantizedWeight

E4M3_MAXIMA = (448.0, 240.0, 224.0)
"""What the scale of an E4M3 weight gets divided by: the maximum of FN, of FNUZ, and the half of FN's that some kernels
keep as headroom on FNUZ hardware."""


@dataclass(frozen=True)
class Misreading:
    """One mistake in one step of reading a weight.

    `apply` depends on the step:
    ``codes``: (codes [N, K_pad], columns [C]) -> the codes [N, C] that are read instead;
    ``table``: (table [2**bits]) -> the table read by instead;
    ``scales``: (weight, columns [C]) -> the factors [N or 1, C] multiplied by instead.
    """

    step: str
    kind: Kind
    sentence: str
    apply: Callable


def misreadings(weight: QuantizedWeight) -> list[Misreading]:
    """Every known mistake that can be made on `weight`. Raises ValueError for a weight whose codes cannot be read."""
    scheme, (n, k) = weight.scheme, weight.shape
    return [
        *code_misreadings(scheme.format, weight.layout, k),
        *table_misreadings(scheme.format, scheme.scaling),
        *scale_misreadings(scheme.scaling, scheme.format, n, k),
    ]


# Which code is taken.


def code_misreadings(fmt: Format, layout: str, k: int) -> Iterator[Misreading]:
    """Bits taken from the wrong place of a row."""
    k_pad = packing.padded_k(k)
    column = torch.arange(k_pad)

    def moved(kind: Kind, sentence: str, **sources: Tensor) -> Misreading:
        return Misreading("codes", kind, sentence, _piecewise(fmt.bits, {int(s[1:]): m for s, m in sources.items()}))

    cut = packing.pieces(fmt.bits)
    if layout == "planar":
        for offset, width in cut:
            planes = 8 // width
            for order in _plane_orders(planes):
                source = _from_planes(column, k_pad, order)
                if planes == 2:
                    sentence = f"the two nibbles of each byte are exchanged: weight k reads the code of k ± {k_pad // 2}"
                    yield moved(Kind.NIBBLE_SWAP, sentence, **{f"p{offset}": source})
                else:
                    sentence = (f"the planes of the {width}-bit piece are read in the order {', '.join(map(str, order))},"
                                f" not 0 to {planes - 1}")
                    yield moved(Kind.PLANE_SWAP, sentence, **{f"p{offset}": source})
        for backwards in (False, True):
            sources = {f"p{offset}": _as_neighbours(column, k_pad, 8 // width, backwards)
                       for offset, width in cut if width < 8}
            if sources:
                yield moved(Kind.PLANE_SWAP,
                            "the planes are read as neighbours: the fields of one byte are taken for weights next to each"
                            f" other{', the high field first' if backwards else ''}", **sources)
        if len(cut) > 1:
            yield Misreading("codes", Kind.PLANE_SWAP,
                             f"the pieces of {' and '.join(str(width) for _, width in cut)} bits are put together in the wrong order",
                             lambda codes, columns: _pieces_reversed(codes[:, columns.to(codes.device)], fmt.bits))
    neighbours = Kind.NIBBLE_SWAP if fmt.bits == 4 else Kind.PLANE_SWAP
    yield moved(neighbours, "each two neighbours along K are exchanged: weight k reads the code of k ^ 1",
                **{f"p{offset}": column ^ 1 for offset, _ in cut})
    if fmt.bits == 8:
        yield Misreading("codes", Kind.NIBBLE_SWAP, "the two nibbles of each 8-bit code are exchanged",
                         lambda codes, columns: nibbles_exchanged(codes[:, columns.to(codes.device)]))


def _plane_orders(planes: int) -> list[tuple[int, ...]]:
    """Orders of planes to try, the right one left out: all of 2 or 4; of 8 the reversed, the rotated and the pairwise."""
    right = tuple(range(planes))
    if planes <= 4:
        return [order for order in permutations(right) if order != right]
    return [right[::-1], right[1:] + right[:1], right[-1:] + right[:-1], tuple(plane ^ 1 for plane in right)]


def _from_planes(column: Tensor, k_pad: int, order: tuple[int, ...]) -> Tensor:
    size = k_pad // len(order)
    return torch.tensor(order)[column // size] * size + column % size


def _as_neighbours(column: Tensor, k_pad: int, planes: int, backwards: bool) -> Tensor:
    plane = planes - 1 - column % planes if backwards else column % planes
    return plane * (k_pad // planes) + column // planes


def _piecewise(bits: int, sources: dict[int, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def read(codes: Tensor, columns: Tensor) -> Tensor:
        taken = torch.zeros(codes.shape[0], len(columns), dtype=torch.uint8, device=codes.device)
        for offset, width in packing.pieces(bits):
            at = sources[offset][columns.cpu()] if offset in sources else columns
            taken |= codes[:, at.to(codes.device)] & (((1 << width) - 1) << offset)
        return taken

    return read


def _pieces_reversed(codes: Tensor, bits: int) -> Tensor:
    mixed, start = torch.zeros_like(codes), 0
    for offset, width in reversed(packing.pieces(bits)):
        mixed |= ((codes >> offset) & ((1 << width) - 1)) << start
        start += width
    return mixed


def nibbles_exchanged(codes: Tensor) -> Tensor:
    """8-bit codes with their upper and lower four bits exchanged."""
    return ((codes & 0xF) << 4) | (codes >> 4)


# What it decodes to.


def table_misreadings(fmt: Format, scaling: Scaling | None = None) -> Iterator[Misreading]:
    """Codes decoded by another definition than the format's."""

    def table(kind: Kind, sentence: str, apply: Callable[[Tensor], Tensor]) -> Misreading:
        return Misreading("table", kind, sentence, apply)

    def read_as(other: Format) -> Callable[[Tensor], Tensor]:
        return lambda right: decode_table(other, right.device)

    other = sibling(fmt)
    if other is not None:
        half = other.bias > fmt.bias
        kind = Kind.FN_AS_FNUZ if half else Kind.FNUZ_AS_FN
        sentence = (f"every normal code decodes to {'half' if half else 'twice'} its value: read with bias {other.bias},"
                    f" the format's is {fmt.bias}")
        yield table(kind, f"{sentence} (as {other.name})", read_as(other))
        if scaling is None or scaling.kind != "mx":     # there, an exponent of the block scale that is one off looks the same
            yield table(kind, sentence, read_as(replace(fmt, bias=other.bias)))

    codes = torch.arange(1 << fmt.bits)
    if fmt.twos_complement:
        step = fmt.min_subnormal
        yield table(Kind.SIGN_LOST, "two's complement codes are read as unsigned", lambda right: (codes * step).float().to(right.device))
    if fmt.signed:
        yield table(Kind.SIGN_LOST, "negative weights are read as positive", torch.abs)
    if fmt.signed and not fmt.twos_complement and fmt.specials != "fnuz":
        minus_zero = 1 << (fmt.bits - 1)
        yield table(Kind.NEGATIVE_ZERO, f"-0, the code {fmt.describe_code(minus_zero)}, is read as NaN",
                    lambda right: right.masked_fill((codes == minus_zero).to(right.device), torch.nan))
    if fmt.has_nan:
        yield table(Kind.NAN_CODE_LOST, f"NaN codes such as {fmt.describe_code(_a_nan(fmt))} are read as numbers",
                    read_as(replace(fmt, specials="none")))
    if not fmt.is_integer and fmt.mantissa_bits:
        yield from _subnormals(fmt, codes, table)
        for dropped in range(1, fmt.mantissa_bits + 1):
            keep = codes & fmt.magnitude_mask & ~((1 << dropped) - 1)
            lost = "the lowest mantissa bit is" if dropped == 1 else f"the lowest {dropped} mantissa bits are"
            yield table(Kind.TRUNCATED, f"{lost} not read",
                        lambda right, keep=keep: torch.where(right.isfinite(), right[keep.to(right.device)].copysign(right), right))


def _subnormals(fmt: Format, codes: Tensor, table: Callable[..., Misreading]) -> Iterator[Misreading]:
    mantissa = codes & ((1 << fmt.mantissa_bits) - 1)
    subnormal = is_subnormal(fmt)
    sign = torch.where(codes >> (fmt.bits - 1) > 0, -1.0, 1.0) if fmt.signed else torch.ones(len(codes))
    one_added = sign * (1 + mantissa / 2**fmt.mantissa_bits)
    yield table(Kind.SUBNORMAL_FLUSHED, "subnormal codes are read as zero",
                lambda right: right.masked_fill(subnormal.to(right.device), 0.0))
    wrong = {
        "subnormal codes are read with an implicit one": (subnormal, one_added * 2.0 ** (1 - fmt.bias)),
        "subnormal codes are read as normal ones with exponent field 0": (subnormal, one_added * 2.0 ** -fmt.bias),
        "subnormal codes and zero are read as normal ones with exponent field 0":
            (subnormal | ((mantissa == 0) & (codes & fmt.magnitude_mask == 0)), one_added * 2.0 ** -fmt.bias),
        "subnormal codes are read as half their value": (subnormal, sign * mantissa * fmt.min_subnormal / 2),
        "subnormal codes are read as twice their value": (subnormal, sign * mantissa * fmt.min_subnormal * 2),
    }
    for sentence, (where, value) in wrong.items():
        yield table(Kind.SUBNORMAL_WRONG, sentence, lambda right, where=where, value=value: torch.where(
            where.to(right.device) & right.isfinite(), value.float().to(right.device), right))


def is_subnormal(fmt: Format) -> Tensor:
    """Which codes are subnormal: bool [2**bits]; zero is not. None of an integer format's."""
    magnitude = torch.arange(1 << fmt.bits) & fmt.magnitude_mask
    if fmt.is_integer:
        return torch.zeros(1 << fmt.bits, dtype=torch.bool)
    return (magnitude > 0) & (magnitude >> fmt.mantissa_bits == 0)


def sibling(fmt: Format) -> Format | None:
    """The 8-bit format with the same bits and the other convention: E4M3FN for E4M3FNUZ and back; None if there is none."""
    if fmt.bits != 8 or fmt.specials == "none":
        return None
    base = f"e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    if fmt.specials == "fnuz":
        specials = "fn" if fmt.mantissa_bits == 3 else "ieee"
        return replace(fmt, name=base + ("fn" if specials == "fn" else ""), bias=fmt.bias - 1, specials=specials)
    return replace(fmt, name=f"{base}fnuz", bias=fmt.bias + 1, specials="fnuz")


def _a_nan(fmt: Format) -> int:
    return fmt.nan_code if fmt.nan_code is not None else fmt.magnitude_mask


# Which scale it meets.


def scale_misreadings(scaling: Scaling, fmt: Format, n: int, k: int) -> Iterator[Misreading]:
    """Scales left out, or taken from the wrong place."""

    def scales(kind: Kind, sentence: str, apply: Callable[[QuantizedWeight, Tensor], Tensor]) -> Misreading:
        return Misreading("scales", kind, sentence, apply)

    def grid(change: Callable[[QuantizedWeight], Tensor]) -> Callable[[QuantizedWeight, Tensor], Tensor]:
        return lambda weight, columns: change(weight)[:, block_of(columns, scaling)]

    def at(row: Callable[[Tensor], Tensor], block: Callable[[Tensor], Tensor]) -> Callable[[QuantizedWeight, Tensor], Tensor]:
        """Row and block number -> those whose scale is taken; numbers past an end run on into the next row, as memory does."""
        def factors(weight: QuantizedWeight, columns: Tensor) -> Tensor:
            held = weight.scale_grid()
            n, g = torch.arange(held.shape[0])[:, None], block_of(columns.cpu(), scaling)[None, :]
            flat = (row(n) * held.shape[1] + block(g)) % held.numel()
            return held.reshape(-1)[flat.to(held.device)]
        return factors

    yield scales(Kind.SCALE_MISSING, "the scale is not applied", grid(lambda weight: torch.ones_like(weight.scale_grid())))
    if scaling.kind == "nv":
        yield scales(Kind.SCALE_MISSING, "the tensor scale is not applied",
                     grid(lambda weight: decode(weight.scales, NV_SCALE_FORMAT)))
        yield scales(Kind.SCALE_MISSING, "the block scale is not applied",
                     grid(lambda weight: weight.tensor_scale.expand(weight.scales.shape)))
        yield scales(Kind.FN_AS_FNUZ, "block scales are read as half their value: by e4m3fnuz's bias 8, theirs is 7",
                     grid(lambda weight: weight.scale_grid() / 2))
    if scaling.kind == "mx":
        for exponent, side in ((1, "high"), (-1, "low")):
            yield scales(Kind.BLOCK_OFF_BY_ONE,
                         f"every weight reads as {'twice' if exponent > 0 else 'half'} its value: the exponent of the E8M0 block scale"
                         f" is read one too {side} (the element's bias being off by one looks the same)",
                         grid(lambda weight, factor=2.0**exponent: weight.scale_grid() * factor))
    if fmt.max in E4M3_MAXIMA:
        for other in E4M3_MAXIMA:
            if other != fmt.max and fmt.max / other not in (2.0, 0.5):      # a factor of 2 is a bias's before it is a maximum's
                yield scales(Kind.WRONG_MAX, f"scales are taken from the maximum {other:g}; {fmt.name} reaches {fmt.max:g}",
                             grid(lambda weight, ratio=fmt.max / other: weight.scale_grid() * ratio))
    if scaling.kind == "tensor":
        return
    blocks = scaling.blocks(k)
    if scaling.kind == "row":
        yield scales(Kind.SCALE_TRANSPOSED, "row scales are applied along K instead of N",
                     lambda weight, columns: weight.scale_grid().reshape(1, -1)[:, columns % weight.shape[0]])
        for step, which in ((1, "next"), (-1, "previous")):
            sentence = f"each row is multiplied by the scale of the {which} row"
            yield scales(Kind.BLOCK_OFF_BY_ONE, sentence, at(lambda n, step=step: n + step, lambda g: g))
            yield scales(Kind.BLOCK_OFF_BY_ONE, sentence,
                         at(lambda r, step=step: (r + step).clamp(0, n - 1), lambda g: g))
        return
    yield scales(Kind.SCALE_TRANSPOSED, f"the scales [{n}, {blocks}] are read column by column, as if they were [{blocks}, {n}]",
                 lambda weight, columns: _read_transposed(weight.scale_grid())[:, block_of(columns, scaling)])
    for step, which in ((1, "next"), (-1, "previous")):
        sentence = f"each block is multiplied by the scale of the {which} block"
        ends = {"": lambda g, step=step: g + step,
                " of its row, the last by its own": lambda g, step=step: (g + step).clamp(0, blocks - 1),
                " of its row, round and round": lambda g, step=step: (g + step) % blocks}
        for end, block in ends.items():
            yield scales(Kind.BLOCK_OFF_BY_ONE, sentence + end, at(lambda r: r, block))
        yield scales(Kind.BLOCK_OFF_BY_ONE,
                     f"blocks begin one column {'early' if step > 0 else 'late'}: a weight beside each boundary meets the {which} block's scale",
                     lambda weight, columns, step=step: weight.scale_grid()[
                         :, block_of((columns + step).clamp(0, k - 1), scaling)])


def _read_transposed(grid: Tensor) -> Tensor:
    return grid.reshape(grid.shape[1], grid.shape[0]).T


def block_of(columns: Tensor, scaling: Scaling) -> Tensor:
    """The number of the block that each column lies in."""
    return torch.zeros_like(columns) if scaling.block is None else columns // scaling.block
