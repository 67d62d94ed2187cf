"""Known faults in the factor of a stored scale, as data: functions from a scale's bits and value to its factor.

A recovered map (scale -> factor) is compared with each; if none fits, `describe_factors` describes its structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.formats import FORMATS, Format
from fpxbench.numbers.scaling import Scaling
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.kinds import Kind

_FEWEST_RIGHT = 8
"""Fewest right scales in a range that indicates a narrower type."""
Agree = Callable[[Tensor, Tensor], Tensor]
"""(recovered factors, predicted factors) -> bool tensor: where they are equal within rounding."""


@dataclass(frozen=True)
class ScaleFunction:
    """One fault in reading a scale.

    factor : (codes, values) -> factors, float64; `codes` are the stored bits, int64, or None for fp32 scales
    """

    kind: Kind
    message: str
    factor: Callable[[Tensor | None, Tensor], Tensor]
    besides: Kind | None = None
    """The kind of a second fault that `message` includes."""

    @property
    def kinds(self) -> list[Kind]:
        return [self.kind] if self.besides is None else [self.kind, self.besides]


def stored_format(scaling: Scaling) -> Format | None:
    """Return the format of stored block scales; None for fp32."""
    return scaling.scale_format.format if scaling.scale_format.coded else None


def scale_functions(scaling: Scaling) -> Iterator[ScaleFunction]:
    """Yield every known fault in reading the block scales of `scaling`, simplest first."""
    fmt = stored_format(scaling)
    yield ScaleFunction(
        Kind.SCALE_MISSING, "the scale is not applied: every factor is 1", lambda codes, values: torch.ones_like(values)
    )
    yield ScaleFunction(Kind.SCALE_SQUARED, "the scale is applied twice: each factor is the square of the scale",
                        lambda codes, values: values.square())
    yield ScaleFunction(Kind.SCALE_INVERTED, "weights are divided by the scale: each factor is its reciprocal",
                        lambda codes, values: 1 / values)
    yield ScaleFunction(
        Kind.SCALE_MISREAD, "each factor is the square root of the scale", lambda codes, values: values.sqrt()
    )
    yield ScaleFunction(
        Kind.SCALE_MISREAD, "each factor is 1 over the square of the scale", lambda codes, values: 1 / values.square()
    )
    yield ScaleFunction(
        Kind.SCALE_MISREAD, "the scale is applied three times: each factor is its cube", lambda codes, values: values**3
    )
    if fmt is not None:
        yield from _of_codes(fmt)
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        yield ScaleFunction(Kind.SCALE_NARROWED, f"scales pass through {name}: factors are the scales rounded to it",
                            lambda codes, values, dtype=dtype: values.float().to(dtype).double())
    yield from _of_values(fmt)


def _of_codes(fmt: Format) -> Iterator[ScaleFunction]:
    yield ScaleFunction(Kind.SCALE_BITS_AS_VALUE,
                        "the bits of the scale are used as its value: code c multiplies by c",
                        lambda codes, values: codes.double())
    yield ScaleFunction(Kind.SCALE_BITS_AS_VALUE,
                        "the bits of the scale are used as its value: code c, a signed byte, multiplies by c",
                        lambda codes, values: _signed(codes))
    if not fmt.mantissa_bits:
        yield ScaleFunction(Kind.SCALE_BITS_AS_VALUE,
                            f"the exponent is used as the scale: code c multiplies by c - {fmt.bias}",
                            lambda codes, values: (codes - fmt.bias).double())
        yield ScaleFunction(Kind.SCALE_MISREAD,
                            "the exponent is read as a signed byte: code c multiplies by 2^c, c from -128 to 127",
                            lambda codes, values: torch.exp2(_signed(codes)))
        yield ScaleFunction(
            Kind.SCALE_ENDS_LOST,
            "E8M0 is decoded by a shift into fp32's exponent: code 0 multiplies by 0 and code 255 by infinity,"
            " not by 2^-127 and NaN",
            lambda codes, values: torch.where(codes == 0, 0.0, torch.where(codes == 255, torch.inf, values)))
        yield ScaleFunction(Kind.SCALE_ENDS_LOST, "code 0 multiplies by 0, not by 2^-127",
                            lambda codes, values: torch.where(codes == 0, 0.0, values))
        yield ScaleFunction(Kind.SCALE_ENDS_LOST, "code 255 multiplies by infinity, not by NaN",
                            lambda codes, values: torch.where(codes == 255, torch.inf, values))
    else:
        yield from _subnormal_codes(fmt)
    if fmt.nan_code is not None:
        finite = [("multiplies by 0", 0.0), ("multiplies by 1", 1.0), (f"multiplies by {fmt.max:g}", fmt.max),
                  ("is read as a number, by the rule of all other codes", _past_max(fmt))]
        for text, past in finite:
            yield ScaleFunction(Kind.SCALE_ENDS_LOST, f"the NaN code 0x{fmt.nan_code:02x} {text}",
                                lambda codes, values, past=past: torch.where(values.isnan(), past, values))
    for other in _other_formats(fmt):
        fnuz = fmt.specials == "fn" and other.specials == "fnuz" and other.bias == fmt.bias + 1
        yield ScaleFunction(Kind.FN_AS_FNUZ if fnuz else Kind.SCALE_MISREAD,
                            f"scale codes are read as {other.name}; they are {fmt.name}",
                            lambda codes, values, other=other:
                            decode_table(other, codes.device).double()[codes & ((1 << other.bits) - 1)])


def _past_max(fmt: Format) -> float:
    """Return the number that the NaN code would be by the rule of all other codes."""
    exponent = (fmt.nan_code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    mantissa = fmt.nan_code & ((1 << fmt.mantissa_bits) - 1)
    return 2.0 ** (exponent - fmt.bias) * (1 + mantissa / 2**fmt.mantissa_bits)


def _signed(codes: Tensor) -> Tensor:
    return torch.where(codes > 127, codes - 256, codes).double()


def _subnormal_codes(fmt: Format) -> Iterator[ScaleFunction]:
    """Yield faults in the subnormals and the mantissa of a float scale format."""
    least, unit = fmt.min_normal, 1 << fmt.mantissa_bits

    def subnormal(codes: Tensor) -> Tensor:
        return ((codes & fmt.magnitude_mask) < unit) & (codes & fmt.magnitude_mask > 0)

    yield ScaleFunction(Kind.SCALE_ENDS_LOST, "subnormal scales multiply by 0",
                        lambda codes, values: torch.where(subnormal(codes), 0.0, values))
    yield ScaleFunction(
        Kind.SCALE_ENDS_LOST, "subnormal scales are read with an implicit one",
        lambda codes, values: torch.where(subnormal(codes), (1 + (codes % unit) / unit) * least, values))
    yield ScaleFunction(
        Kind.SCALE_ENDS_LOST, "subnormal scales and 0 are read as normal numbers of exponent field 0",
        lambda codes, values: torch.where(codes & fmt.magnitude_mask < unit, (1 + (codes % unit) / unit) * least / 2,
                                          values))
    yield ScaleFunction(
        Kind.SCALE_MISREAD, "only the exponent of the scale is read, its mantissa is lost",
        lambda codes, values: torch.where(codes % unit == codes, torch.where(codes % unit > 0, least / 2, 0.0),
                                          decode_table(fmt, codes.device).double()[codes - codes % unit]))
    for dropped in range(1, fmt.mantissa_bits + 1):
        lost = ("the lowest mantissa bit of the scale is" if dropped == 1
                else f"the lowest {dropped} mantissa bits of the scale are")
        yield ScaleFunction(Kind.SCALE_MISREAD, f"{lost} not read", lambda codes, values, dropped=dropped:
                            decode_table(fmt, codes.device).double()[codes >> dropped << dropped])


def _of_values(fmt: Format | None) -> Iterator[ScaleFunction]:
    if fmt is not None and not fmt.mantissa_bits:
        return
    for text, rounded in (("down", torch.floor), ("up", torch.ceil), ("to the nearest power", torch.round)):
        yield ScaleFunction(Kind.SCALE_MISREAD, f"each scale multiplies by a power of two: its own, rounded {text}",
                            lambda codes, values, rounded=rounded: torch.exp2(rounded(values.log2())))


def _other_formats(fmt: Format) -> Iterator[Format]:
    names = ("e4m3fnuz", "e5m2", "e5m2fnuz", "e3m4", "e8m0", "e4m3fn")
    yield from (FORMATS[name] for name in names if name != fmt.name)
    if not fmt.mantissa_bits:
        return
    for exponent_bits in range(2, 8):
        mantissa_bits = 8 - exponent_bits
        yield Format(f"ue{exponent_bits}m{mantissa_bits}", exponent_bits, mantissa_bits, (1 << (exponent_bits - 1)) - 1,
                     signed=False)


def matching_functions(
    scaling: Scaling, codes: Tensor | None, values: Tensor, seen: Tensor, agree: Agree
) -> list[ScaleFunction]:
    """Return the simplest known faults that give all factors `seen` of the scales `values` (float64, NaN included).

    Faults are tried alone first, then combined with a constant factor.
    """
    known = list(scale_functions(scaling))

    def gives(predicted: Tensor) -> bool:
        certain = within_fp32(predicted, values)
        of_nan = values.isnan()
        # Infinity read for NaN matches a prediction of infinity or NaN.
        agrees = agree(seen, predicted)
        nan_fits = torch.where(seen.isnan(), predicted.isnan(), agrees | (seen.isinf() & ~predicted.isfinite()))
        # A factor that leaves fp32's range on the way may become 0, infinite or the right value, but nothing else.
        ordinary = (seen.abs() > 2.0**-90) & (seen.abs() < 2.0**90)
        fits = torch.where(of_nan, nan_fits, agrees | (~certain & ~ordinary))
        return int(certain.sum()) > len(values) // 8 and bool(fits.all())

    alone = [one for one in known if gives(one.factor(codes, values))]
    if alone:
        return alone
    clamped = _clamped(values, seen, agree)
    if clamped is not None:
        return [clamped]
    found = []
    for one in [_OWN, *known]:
        predicted = one.factor(codes, values)
        usable = predicted.isfinite() & (predicted != 0) & seen.isfinite() & (seen != 0)
        if int(usable.sum()) < 3:
            continue
        constant = float((seen[usable] / predicted[usable]).median())
        if gives(constant * predicted):
            found.append(_times(one, constant, scaling))
            if one.kind is Kind.SCALED:     # any other fault that also fits has no effect on these scales
                break
    return found


_OWN = ScaleFunction(Kind.SCALED, "", lambda codes, values: values)


def _times(one: ScaleFunction, constant: float, scaling: Scaling) -> ScaleFunction:
    """Return the fault `one` combined with a `constant` factor, which is reported as a bias if it is a power of two."""
    def factor(codes: Tensor | None, values: Tensor) -> Tensor:
        return constant * one.factor(codes, values)

    if one.kind not in (Kind.SCALED, Kind.SCALE_ENDS_LOST):
        return ScaleFunction(one.kind, f"{one.message}, times {constant:.4g}", factor)
    message = f"each scale multiplies by {constant:.4g} times its value"
    fmt, exponent = stored_format(scaling), math.log2(constant) if constant > 0 else math.nan
    if fmt is not None and abs(exponent - round(exponent)) < 1e-6:
        message += f", as when codes are read with bias {fmt.bias - round(exponent)}, theirs is {fmt.bias}"
    if one.kind is Kind.SCALED:
        return ScaleFunction(Kind.SCALED, message, factor)
    return ScaleFunction(Kind.SCALED, f"{message}; and {one.message}", factor, Kind.SCALE_ENDS_LOST)


def within_fp32(predicted: Tensor, values: Tensor) -> Tensor:
    """Return where a prediction can be compared, bool [S]: not where a wrong factor leaves fp32's normal range, since
    the product then depends on the order of multiplications."""
    magnitude = predicted.abs()
    normal = (magnitude >= 2.0**-100) & (magnitude <= 2.0**100)
    return normal | (predicted == values) | (predicted == 0) | ~predicted.isfinite()


def _clamped(values: Tensor, seen: Tensor, agree: Agree) -> ScaleFunction | None:
    """Return the fault of scales that are clamped to a range; None if they are not."""
    order = values.nan_to_num(torch.inf).argsort()
    low, high = float(seen[order[0]]), float(seen[order[int(values.isfinite().sum()) - 1]])
    inside = agree(seen, values)
    for bounds in ((low, None), (None, high), (low, high)):
        usable = [bound for bound in bounds if bound is not None and bound > 0 and bound < torch.inf]
        if not usable or low == high or not bool(inside.any()):
            continue

        def clamped(codes: Tensor | None, values: Tensor, bounds: tuple = bounds) -> Tensor:
            return values.clamp(*bounds)

        if bool(agree(seen, clamped(None, values)).all()):
            ends = " and ".join(f"those {side} {bound:.4g} multiply by it"
                                for side, bound in zip(("below", "above"), bounds, strict=True) if bound is not None)
            return ScaleFunction(Kind.SCALE_NARROWED, f"scales, or products with them, are clamped: {ends}", clamped)
    return None


def right_range(values: Tensor, seen: Tensor, agree: Agree) -> tuple[int, int] | None:
    """Return the first and the last of `values`, ascending, between which all factors are right, if smaller ones are
    rounded or lost and larger ones are infinite, as by a narrower type; else None."""
    right = agree(seen, values) | values.isnan()
    below = ~right & seen.isfinite()
    unit = seen[below & (seen > 0)].amin() if bool((below & (seen > 0)).any()) else torch.zeros(())
    # rounded to a multiple of the narrower type's smallest number, or to zero
    rounded = ((seen - values).abs() <= unit / 2 * (1 + 2.0**-6)) if float(unit) else seen == 0
    small = below & rounded
    past = ~right & ~seen.isfinite()
    if not bool((right | small | past).all()) or bool(right.all()):
        return None
    first = int(small.nonzero()[-1]) + 1 if bool(small.any()) else 0
    last = int(past.nonzero()[0]) - 1 if bool(past.any()) else int((~values.isnan()).sum()) - 1
    return (first, last) if last - first >= _FEWEST_RIGHT else None


def describe_factors(names: list[str], values: Tensor, seen: Tensor, agree: Agree) -> str:
    """Describe a map that no known fault gives: runs of scales with the same ratio of factor to value.

    `names` are the scales' names, ascending by value.
    """
    ratios = []
    for value, factor in zip(values.tolist(), seen.tolist(), strict=True):
        right = bool(agree(torch.tensor([factor], dtype=torch.float64), torch.tensor([value], dtype=torch.float64)))
        if right:
            ratios.append("its own value")
        elif factor == 0 or factor != factor or abs(factor) == float("inf"):
            ratios.append(f"{factor:g}")
        elif value and value == value:
            ratios.append(f"{factor / value:.3g} times its value")
        else:
            ratios.append(f"{factor:.4g}")
    runs: list[tuple[int, int, str]] = []
    for at, ratio in enumerate(ratios):
        if runs and runs[-1][2] == ratio:
            runs[-1] = (runs[-1][0], at, ratio)
        else:
            runs.append((at, at, ratio))
    if len(runs) <= 6:
        return "; ".join(f"{names[a]}{f' to {names[b]}' if b > a else ''}: {text}" for a, b, text in runs)
    wrong = [at for at, ratio in enumerate(ratios) if ratio != "its own value"]
    return "; ".join(f"{names[at]}: {ratios[at]}" for at in wrong[:4]) + f" and {len(wrong) - 4} more"
