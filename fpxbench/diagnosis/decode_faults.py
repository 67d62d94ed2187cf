"""Known faults in reading a stored weight, as data: which code is read, what it decodes to, which scale multiplies it.

A weight is read in three steps, and a known fault is a wrong choice in one of them. This data predicts the resulting
weight; `fpxbench.diagnosis.products` compares predictions with the effective weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fpxbench.diagnosis.code_order_faults import code_order_faults
from fpxbench.diagnosis.decode_fault import DecodeFault
from fpxbench.diagnosis.scale_places import block_size_faults, scale_places
from fpxbench.numbers.codebook import Codebook, NumberFormat
from fpxbench.numbers.formats import Format, format_named
from fpxbench.numbers.scaling import Scaling
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind, sibling_kind

E4M3_MAXIMA = (448.0, 240.0, 224.0)
"""Maxima that E4M3 scales are derived from: FN's, FNUZ's, and half of FN's, which some kernels use as headroom on FNUZ
hardware."""


def decode_faults(weight: QuantizedWeight) -> list[DecodeFault]:
    """Return every known fault that applies to `weight`. Raise ValueError for a weight whose codes cannot be read."""
    scheme, (n, k) = weight.scheme, weight.shape
    return [*code_order_faults(scheme.format, weight.layout, k), *table_faults(scheme.format),
            *scale_faults(scheme.scaling, scheme.format, n, k)]


# Decode tables.


def table_fault_named(format_name: str, read: list[str]) -> tuple[Kind, str] | None:
    """Return kind and message of the fault in `table_faults` that decodes the format's codes to exactly `read`, or
    None."""
    fmt = format_named(format_name)
    right, table = decode_table(fmt), torch.tensor([float(number) for number in read])
    for fault in table_faults(fmt):
        if torch.equal(torch.nan_to_num(fault.apply(right), nan=torch.pi), torch.nan_to_num(table, nan=torch.pi)):
            return fault.kind, fault.message
    return None


def table_faults(fmt: NumberFormat) -> Iterator[DecodeFault]:
    """Yield the faults of codes decoded by a definition other than the format's."""
    if isinstance(fmt, Codebook):       # its codes have no fields to misread
        yield _table(Kind.SIGN_LOST, "negative weights are read as positive", torch.abs)
        return
    yield from _read_as_the_sibling(fmt)
    codes = torch.arange(1 << fmt.bits)
    if fmt.twos_complement:
        step = fmt.min_subnormal
        yield _table(Kind.SIGN_LOST, "two's complement codes are read as unsigned",
                     lambda right: (codes * step).float().to(right.device), True)
    if fmt.signed:
        yield _table(Kind.SIGN_LOST, "negative weights are read as positive", torch.abs)
    if fmt.signed and not fmt.twos_complement and fmt.specials != "fnuz":
        minus_zero = 1 << (fmt.bits - 1)
        yield _table(Kind.NEGATIVE_ZERO, f"-0, the code {fmt.describe_code(minus_zero)}, is read as NaN",
                     lambda right: right.masked_fill((codes == minus_zero).to(right.device), torch.nan))
    if fmt.has_nan:
        yield from _nan_lost(fmt)
    if not fmt.is_integer and fmt.mantissa_bits:
        yield from _subnormals(fmt, codes)
        yield from _truncated(fmt, codes)


_table = partial(DecodeFault, "table")


def _read_as(other: Format) -> Callable[[Tensor], Tensor]:
    return lambda right: decode_table(other, right.device)


def _read_as_the_sibling(fmt: Format) -> Iterator[DecodeFault]:
    other = fmt.sibling
    if other is None:
        return
    half = other.bias > fmt.bias
    message = (f"every normal code decodes to {'half' if half else 'twice'} its value: read with bias {other.bias},"
               f" the format's is {fmt.bias}")
    yield _table(sibling_kind(fmt.specials), f"{message} (as {other.name})", _read_as(other), True)
    now_nan = decode_table(other).isnan() & decode_table(fmt).isfinite()
    if bool(now_nan.any()):
        code = other.describe_code(int(now_nan.nonzero()[0]))
        yield _table(sibling_kind(fmt.specials), f"{message} (as {other.name}, whose NaN {code} is read as 0)",
                     lambda right: decode_table(other, right.device).nan_to_num(0.0, torch.inf, -torch.inf), True,
                     lambda table: bool((table[now_nan.to(table.device)] == 0).all()))


def _nan_lost(fmt: Format) -> Iterator[DecodeFault]:
    of_nan, a_nan = decode_table(fmt).isnan(), fmt.describe_code(_a_nan(fmt))

    def nan_is(test: Callable[[Tensor], Tensor]) -> Callable[[Tensor], bool]:
        return lambda table: bool(test(table[of_nan.to(table.device)]).all())

    infinity = fmt.describe_code(fmt.magnitude_mask & ~((1 << fmt.mantissa_bits) - 1))
    read = f"infinity, {infinity}, and NaN codes such as {a_nan} are read as finite numbers" if fmt.has_infinity else \
        f"NaN codes such as {a_nan} are read as numbers"
    yield _table(Kind.NAN_CODE_LOST, read, _read_as(replace(fmt, specials="none")), True, nan_is(torch.isfinite))
    yield _table(Kind.NAN_CODE_LOST, f"NaN codes such as {a_nan} are read as zero",
                 lambda right: right.masked_fill(right.isnan(), 0.0), False, nan_is(lambda read: read == 0))


def _truncated(fmt: Format, codes: Tensor) -> Iterator[DecodeFault]:
    for dropped in range(1, fmt.mantissa_bits + 1):
        low = (1 << dropped) - 1
        keep = codes & fmt.magnitude_mask & ~low
        lost = "the lowest mantissa bit is" if dropped == 1 else f"the lowest {dropped} mantissa bits are"
        yield _table(Kind.TRUNCATED, f"{lost} not read", lambda right, keep=keep: torch.where(
            right.isfinite(), right[keep.to(right.device)].copysign(right), right))
        if fmt.has_nan:  # or the bits are dropped before the test for NaN
            yield _table(Kind.TRUNCATED, f"{lost} not read",
                         lambda right, low=low: right[(codes & ~low).to(right.device)])


def _subnormals(fmt: Format, codes: Tensor) -> Iterator[DecodeFault]:
    """Yield faults relative to the table that they are applied to, which another fault may already have changed."""
    subnormal = is_subnormal(fmt)
    zero = codes & fmt.magnitude_mask == 0
    with_one = 1 + (codes & ((1 << fmt.mantissa_bits) - 1)) / 2**fmt.mantissa_bits

    def where(changed: Tensor, instead: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the change of a table; `instead` takes the table and its smallest normal number."""
        return lambda right: torch.where(changed.to(right.device) & right.isfinite(),
                                         instead(right, right[1 << fmt.mantissa_bits]).float().copysign(right), right)

    yield _table(Kind.SUBNORMAL_FLUSHED, "subnormal codes are read as zero",
                 where(subnormal, lambda right, least: right * 0), False,
                 lambda table: bool((table[subnormal.to(table.device)] == 0).all()))

    def read(what: str, changed: Tensor, instead: Callable[[Tensor, Tensor], Tensor]) -> DecodeFault:
        return _table(Kind.SUBNORMAL_WRONG, f"subnormal codes {what}", where(changed, instead))

    yield read("are read with an implicit one", subnormal, lambda right, least: with_one.to(right.device) * least)
    yield read("are read as normal ones with exponent field 0", subnormal,
               lambda right, least: with_one.to(right.device) * least / 2)
    yield read("and zero are read as normal ones with exponent field 0", subnormal | zero,
               lambda right, least: with_one.to(right.device) * least / 2)
    yield read("are read as half their value", subnormal, lambda right, least: right / 2)
    yield read("are read as twice their value", subnormal, lambda right, least: right * 2)


def is_subnormal(fmt: NumberFormat) -> Tensor:
    """Return which codes are subnormal, bool [2**bits]: not zero, and none in integer formats and codebooks."""
    if isinstance(fmt, Codebook) or fmt.is_integer:
        return torch.zeros(1 << fmt.bits, dtype=torch.bool)
    magnitude = torch.arange(1 << fmt.bits) & fmt.magnitude_mask
    return (magnitude > 0) & (magnitude >> fmt.mantissa_bits == 0)


def only_scales_finite_codes(fault: DecodeFault, fmt: NumberFormat) -> bool:
    """Return whether a table fault is a constant factor on all finite codes: quantizers store no others."""
    if fault.step != "table":
        return False
    right = decode_table(fmt)
    finite = right.isfinite() & (right != 0)
    ratio = fault.apply(right)[finite] / right[finite]
    return bool((ratio == ratio[0]).all()) and bool(ratio[0] != 1) and bool((fault.apply(right)[right == 0] == 0).all())


def _a_nan(fmt: Format) -> int:
    return fmt.nan_code if fmt.nan_code is not None else fmt.magnitude_mask


# Scales.


def scale_faults(scaling: Scaling, fmt: NumberFormat, n: int, k: int) -> Iterator[DecodeFault]:
    """Yield the faults of scales that are omitted, misread, or read from the wrong position."""
    yield from _scale_values(scaling, fmt)
    yield from _scale_places(scaling, n, k)


def _scale_values(scaling: Scaling, fmt: NumberFormat) -> Iterator[DecodeFault]:
    scales = partial(DecodeFault, "scales")
    yield scales(Kind.SCALE_MISSING, "the scale is not applied",
                 lambda block, tensor: (torch.ones_like(block), torch.ones_like(tensor)), True)
    if scaling.has_tensor_scale:
        yield scales(Kind.GLOBAL_SCALE_MISSING, "the tensor scale is not applied",
                     lambda block, tensor: (block, torch.ones_like(tensor)))
        yield scales(Kind.GLOBAL_SCALE_INVERTED, "weights are divided by the tensor scale, not multiplied",
                     lambda block, tensor: (block, 1 / tensor))
        yield scales(Kind.GLOBAL_SCALE_MISREAD, "the tensor scale is applied twice",
                     lambda block, tensor: (block, tensor.square()))
        yield scales(
            Kind.SCALE_MISSING, "the block scale is not applied", lambda block, tensor: (torch.ones_like(block), tensor)
        )
        yield scales(Kind.FN_AS_FNUZ, "block scales are read as half their value: by e4m3fnuz's bias 8, theirs is 7",
                     # 0x7f is NaN in E4M3, and 240 in E4M3FNUZ.
                     lambda block, tensor: (torch.where(block.isnan(), 240.0, block / 2), tensor))
    level = "block scale" if scaling.has_tensor_scale else "scale"
    yield scales(Kind.SCALE_SQUARED, f"the {level} is applied twice: each factor is its square",
                 lambda block, tensor: (block.square(), tensor))
    yield scales(Kind.SCALE_INVERTED, f"weights are divided by the {level}, not multiplied",
                 lambda block, tensor: (1 / block, tensor))
    for factor in (2.0, 0.5):
        yield scales(
            Kind.SCALED, scaled_by(factor, scaling, fmt), lambda block, tensor, factor=factor: (block * factor, tensor)
        )
    if fmt.max in E4M3_MAXIMA:
        for other in E4M3_MAXIMA:
            # a factor of 2 is attributed to the bias, not to the maximum
            if other != fmt.max and fmt.max / other not in (2.0, 0.5):
                yield scales(Kind.WRONG_MAX,
                             f"scales are taken from the maximum {other:g}; {fmt.name} reaches {fmt.max:g}",
                             lambda block, tensor, ratio=fmt.max / other: (block * ratio, tensor))


def scaled_by(factor: float, scaling: Scaling, fmt: NumberFormat) -> str:
    """Return the message for weights that are all `factor` times their value, a fault with several possible causes."""
    if factor not in (2.0, 0.5):
        return f"every weight is {factor:.3g} times its value: a product or a scale that is off by that factor"
    side = "low" if factor < 1 else "high"
    exponent = f", an E8M0 exponent that is read one too {side}" if scaling.scale_format.powers_of_two else ""
    bias = (f", or codes read with bias {fmt.bias + (1 if factor < 1 else -1)}, not {fmt.bias}"
            if isinstance(fmt, Format) and not fmt.is_integer else "")
    return (
        f"every weight is {factor:g} times its value: a product or a scale that is off by that factor{exponent}{bias}")


def _scale_places(scaling: Scaling, n: int, k: int) -> Iterator[DecodeFault]:
    if scaling.block is None and scaling.block_rows == 1:
        yield DecodeFault("blocks", Kind.SCALE_TRANSPOSED, "row scales are applied along K instead of N",
                          lambda grid, columns, rows: grid.reshape(1, -1)[:, columns % grid.shape[0]])
    for place in scale_places(scaling, n, k):
        yield DecodeFault("places", place.kind, place.message, place.apply)
    if scaling.block is None:
        return
    for step, side, which in ((1, "early", "next"), (-1, "late", "previous")):
        yield DecodeFault(
            "blocks", Kind.BLOCK_OFF_BY_ONE,
            f"blocks begin one column {side}: a weight beside each boundary meets the {which} block's scale",
            lambda grid, columns, rows, step=step:
                grid[block_row_of(rows, scaling)][:, block_of((columns + step).clamp(0, k - 1), scaling)])
    for message, positions in block_size_faults(scaling, n, k):
        yield DecodeFault("blocks", Kind.BLOCK_SIZE_MISTAKEN, message,
                          lambda grid, columns, rows, positions=positions: grid.reshape(-1)[positions(columns, rows)])


def block_of(columns: Tensor, scaling: Scaling) -> Tensor:
    """Return the number of the block of each column."""
    return torch.zeros_like(columns) if scaling.block is None else columns // scaling.block


def block_row_of(rows: Tensor, scaling: Scaling) -> Tensor:
    """Return the row in the grid of scales for each row of the weight."""
    return torch.zeros_like(rows) if scaling.block_rows is None else rows // scaling.block_rows
