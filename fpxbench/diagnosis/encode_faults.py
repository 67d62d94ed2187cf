"""Known faults in storing a weight, as data: in encoding values, and in choosing scales.

`fpxbench.diagnosis.stored` compares stored codes and scales with those of each fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.diagnosis.code_order_faults import code_order_faults
from fpxbench.diagnosis.decode_faults import E4M3_MAXIMA, is_subnormal
from fpxbench.numbers import packing
from fpxbench.numbers.codebook import Codebook, NumberFormat
from fpxbench.numbers.formats import Format
from fpxbench.numbers.scaling import Scales, Scaling
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.tensor_codec import Overflow, Rounding, decode_table, encode
from fpxbench.records.kinds import Kind, sibling_kind

Divide = Callable[[Tensor], Tensor]
"""Divides a weight [N, K] by its scales, fp32 [N, K]."""

TIE_NUDGE = 2.0**-21
QUOTIENT_SLACK = 2.0**-22
"""w * (1 / s) may differ from w / s by this much, and then round to the other side of a midpoint, which is not a fault.
Twice as much with a tensor scale t: w * ((1 / t) / s) is five roundings away from w / (s * t)."""


def quotient_slack(scales: Scales, scheme: Scheme, n: int, k: int) -> Tensor:
    """Return the allowed relative deviation of each weight's quotient from w / s: fp32 [N, K].

    It is 0 if the block's scale and the tensor scale are powers of two: every way to divide is then exact, and a tie is
    a tie. A codebook has no ties, since the midpoint between two of its values is not an fp32 number.
    """
    scaling, fmt = scheme.scaling, scheme.format
    inexact = torch.frexp(scaling.factors(scales)).mantissa != 0.5
    if scales.tensor_scale is not None:     # weights may be divided by the two scales one after the other
        inexact |= torch.frexp(scales.tensor_scale).mantissa != 0.5
    least = fmt.threshold_error if isinstance(fmt, Codebook) else 0.0
    return scaling.spread((inexact * largest_slack(scaling)).clamp_min(least), n, k)


def largest_slack(scaling: Scaling) -> float:
    """Return the largest allowed relative deviation of a quotient from w / s, under any scale."""
    return QUOTIENT_SLACK * (2 if scaling.has_tensor_scale else 1)


def nudges(slack: Tensor) -> tuple[float | Tensor, ...]:
    """Return the relative deviations of a quotient to try: 0, and `slack` to either side unless it is all 0."""
    return (0.0, -slack, slack) if bool(slack.any()) else (0.0,)


@dataclass(frozen=True)
class EncodeFault:
    """One fault in turning a weight into codes, as changes of the encoder's steps.

    before : weight [N, K] -> weight
    values : weight over its scales [N, K] -> the same
    target, rounding, overflow : format, rounding and overflow of the encoding, if not the right ones
    codes : (codes, values that they were encoded from) -> stored codes
    """

    kind: Kind
    message: str
    scales: Callable[[Scales], Scales] | None = None
    """Right scales -> wrong scales, by which the weight is then divided and multiplied."""
    before: Callable[[Tensor], Tensor] | None = None
    values: Callable[[Tensor], Tensor] | None = None
    target: Format | None = None
    rounding: Rounding | None = None
    overflow: Overflow | None = None
    codes: Callable[[Tensor, Tensor], Tensor] | None = None
    divisors: Callable[[Tensor, Tensor], Tensor] | None = None
    """(factors of the stored scales [R, G], each block's amax / max [R, G]) -> what weights are divided by, instead of
    the factors that multiply them."""

    def can_be_made_with(self, other: EncodeFault) -> bool:
        """Return whether both faults can occur at once: they must not set the same step."""
        exclusive = (("scales", "scales"), ("divisors", "divisors"), ("rounding", "rounding"), ("target", "target"),
                     ("overflow", "overflow"),
                     ("target", "overflow"), ("overflow", "target"))    # a target has its own overflow
        return all(getattr(self, mine) is None or getattr(other, its) is None for mine, its in exclusive)


def encoded(weight: Tensor, divide: Divide, fmt: NumberFormat, faults: Iterable[EncodeFault] = ()) -> Tensor:
    """Return the uint8 codes [N, K] that an encoder to `fmt` with `faults` stores."""
    faults = tuple(faults)
    for change in [one.before for one in faults if one.before]:
        weight = change(weight)
    values = divide(weight)
    for of_values in [one.values for one in faults if one.values]:
        values = of_values(values)
    how = {name: getattr(one, name) for one in faults for name in ("rounding", "overflow") if getattr(one, name)}
    target = next((one.target for one in faults if one.target), fmt)
    if not target.has_nan:      # a fault may divide a row of zeros by zero; what an encoder then stores is undefined
        values = values.nan_to_num(0.0, torch.inf, -torch.inf)
    codes = encode(values, target, **how)
    for of_codes in [one.codes for one in faults if one.codes]:
        codes = of_codes(codes, values)
    return codes


_ROUNDINGS = {
    "toward_zero": (Kind.TRUNCATED, "codes are rounded toward zero, not to the nearest"),
    "down": (Kind.TRUNCATED, "codes are rounded down, toward minus infinity, not to the nearest"),
    "up": (Kind.INACCURATE, "codes are rounded up, toward infinity, not to the nearest"),
    "to_odd": (Kind.INACCURATE, "codes are rounded to odd, not to the nearest"),
    "nearest_away": (Kind.TIES_AWAY, "halfway values are rounded away from zero, not to the even code"),
}
"""The message for each wrong rounding. Stochastic rounding is missing, since it stores different codes each time."""


def encode_faults(fmt: NumberFormat, layout: str, k: int, largest_stored: int) -> Iterator[EncodeFault]:
    """Yield every known fault of an encoder to `fmt`; `largest_stored` is the code of the largest stored magnitude."""
    for rounding in Rounding:
        if rounding.value in _ROUNDINGS and isinstance(fmt, Format):
            yield EncodeFault(*_ROUNDINGS[rounding.value], rounding=rounding)
    if isinstance(fmt, Format):     # between two values of a codebook fp32 holds no midpoint
        yield from _tie_faults()
    yield from _double_roundings(fmt)
    yield from _range_faults(fmt, largest_stored)
    if isinstance(fmt, Format) and (other := fmt.sibling) is not None:
        yield EncodeFault(sibling_kind(other.specials),
                          f"the stored codes are {other.name}'s (bias {other.bias}); the scheme reads them as"
                          f" {fmt.name}'s (bias {fmt.bias})", target=other)
    if fmt.specials == "fnuz":
        minus_zero = 1 << (fmt.bits - 1)
        yield EncodeFault(
            Kind.NEGATIVE_ZERO,
            f"negative values that round to zero are stored as {fmt.describe_code(minus_zero)}, which is NaN: FNUZ has"
            " no -0", codes=lambda codes, values: codes.masked_fill((codes == 0) & torch.signbit(values), minus_zero))
    if fmt.signed:
        yield EncodeFault(Kind.SIGN_LOST, "negative weights are stored as positive", before=torch.abs)
    if isinstance(fmt, Format) and not fmt.is_integer and fmt.mantissa_bits:
        yield from _subnormal_faults(fmt)
    for moved in code_order_faults(fmt, layout, k):
        yield EncodeFault(moved.kind, f"the right codes lie in the wrong places, as though {moved.message}",
                          codes=lambda codes, values, moved=moved: _moved(codes, moved.apply))


def _double_roundings(fmt: NumberFormat) -> Iterator[EncodeFault]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        def narrowed(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return x.to(dtype).float()

        twice = "values are rounded twice: to {} {} the scale, then to {}"
        yield EncodeFault(Kind.DOUBLE_ROUNDING, twice.format(name, "after", fmt.name), values=narrowed)
        yield EncodeFault(Kind.DOUBLE_ROUNDING, twice.format(name, "before", fmt.name), before=narrowed)


def _range_faults(fmt: NumberFormat, largest_stored: int) -> Iterator[EncodeFault]:
    """Yield faults in storing values past the maximum."""
    for has, kind, what, overflow in ((fmt.has_nan, Kind.OVERFLOW_NAN, "NaN", Overflow.NAN),
                                      (fmt.has_infinity, Kind.OVERFLOW_INF, "infinity", Overflow.INFINITY)):
        if has:
            yield EncodeFault(kind, f"what rounds past {fmt.max:g} is stored as {what}, not as {fmt.max:g}",
                              overflow=overflow)
    if 0 < largest_stored < fmt.max_code:
        top = fmt.value(largest_stored)
        yield EncodeFault(Kind.SATURATED,
                          f"what lies past {top:g} is stored as {top:g}; {fmt.name} reaches {fmt.max:g}",
                          values=lambda values: values.clamp(-top, top))


def _subnormal_faults(fmt: Format) -> Iterator[EncodeFault]:
    subnormal, small = is_subnormal(fmt), f"values below the smallest normal, {fmt.min_normal:g}, are stored as"
    yield EncodeFault(Kind.SUBNORMAL_FLUSHED, "what rounds to a subnormal code is stored as zero",
                      codes=lambda codes, values: codes.masked_fill(subnormal.to(codes.device)[codes.int()], 0))
    yield EncodeFault(Kind.SUBNORMAL_FLUSHED, f"{small} zero",
                      codes=lambda codes, values: codes.masked_fill(values.abs() < fmt.min_normal, 0))
    for factor, what in ((0.5, "half"), (2.0, "twice")):
        yield EncodeFault(
            Kind.SUBNORMAL_WRONG, f"{small} {what} their value",
            values=lambda values, factor=factor: torch.where(values.abs() < fmt.min_normal, values * factor, values))


def _tie_faults() -> Iterator[EncodeFault]:
    """Yield roundings of halfway values to a neighbour that is not the even one, as a tiny nudge before rounding."""
    for towards, nudged in (("toward zero", lambda values: values * (1 - TIE_NUDGE)),
                            ("up, toward infinity", lambda values: values + values.abs() * TIE_NUDGE),
                            ("down, toward minus infinity", lambda values: values - values.abs() * TIE_NUDGE)):
        yield EncodeFault(Kind.TIES_NOT_EVEN, f"halfway values are rounded {towards}, not to the even code",
                          values=nudged)


def scale_choice_faults(fmt: NumberFormat, scaling: Scaling) -> Iterator[EncodeFault]:
    """Yield the known faults in choosing a scale, under which codes are then made and read."""
    numbers = not scaling.scale_format.coded        # stored as numbers, not as codes
    yield from _other_divisors(scaling)
    for other in (*E4M3_MAXIMA, fmt.max + 1) if fmt.is_integer else E4M3_MAXIMA:
        if numbers and (fmt.max in E4M3_MAXIMA or fmt.is_integer) and other != fmt.max:
            yield EncodeFault(Kind.WRONG_MAX,
                              f"scales are taken from the maximum {other:g}; {fmt.name} reaches {fmt.max:g}",
                              scales=lambda scales, other=other: Scales(scales.stored * fmt.max / other))
    if scaling.scale_format.powers_of_two and isinstance(fmt, Format):
        for step, side, kind in ((1, "high", Kind.SCALE_ONE_STEP_HIGH), (-1, "low", Kind.SCALE_ONE_STEP_LOW)):
            yield EncodeFault(
                kind,
                f"every block's exponent is chosen one too {side}: MX asks for floor(log2(amax)) - {fmt.emax}",
                scales=lambda scales, step=step: Scales((scales.stored.int() + step).clamp(0, 254).to(torch.uint8)),
            )
    if numbers:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            yield EncodeFault(Kind.DOUBLE_ROUNDING, f"scales are rounded to {name} before weights are divided by them",
                              scales=lambda scales, dtype=dtype: Scales(scales.stored.to(dtype).float()))


def _other_divisors(scaling: Scaling) -> Iterator[EncodeFault]:
    """Yield faults in what weights are divided by, while they are multiplied by the right scale."""
    stored = scaling.scale_format
    if not stored.powers_of_two and (stored.coded or stored.bits == 16):
        yield EncodeFault(Kind.SCALE_ROUNDED_LATE, "codes are made under scales that are rounded only afterwards, when"
                          " they are stored", divisors=lambda factors, exact: exact)
    for step, which in ((-1, "next"), (1, "previous")) if scaling.block_rows is not None else ():
        yield EncodeFault(Kind.BLOCK_OFF_BY_ONE, f"weights are divided by the scale of the {which} row, and multiplied"
                          " by their own", divisors=lambda factors, exact, step=step: factors.roll(step, 0))
    for factor, what in ((2.0, "twice"), (0.5, "half")):
        yield EncodeFault(Kind.SCALED, f"weights are divided by {what} the scale that they are multiplied by",
                          divisors=lambda factors, exact, factor=factor: factors * factor)
    yield EncodeFault(Kind.SCALE_MISSING, "weights are not divided by the scale that they are multiplied by",
                      divisors=lambda factors, exact: torch.ones_like(factors))
    yield EncodeFault(Kind.SCALE_INVERTED, "weights are multiplied by their scale when they are stored, not divided",
                      divisors=lambda factors, exact: 1 / factors)


def _moved(codes: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    k = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, packing.padded_k(k) - k))
    return apply(padded, torch.arange(k, device=codes.device))


def same_number(codes: Tensor, fmt: NumberFormat) -> Tensor:
    """Return codes in canonical form: +0 for -0 (if the format has it), one code for all NaNs, and the first code of a
    repeated codebook value."""
    if isinstance(fmt, Codebook):
        first = dict(fmt.ascending())
        same = [first.get(fmt.value(code), code) for code in range(1 << fmt.bits)]
        return torch.tensor(same, dtype=torch.uint8, device=codes.device)[codes.int()]
    if fmt.has_nan:
        codes = torch.where(decode_table(fmt, codes.device).isnan()[codes.int()], fmt.nan_code, codes).to(torch.uint8)
    if not fmt.signed or fmt.twos_complement or fmt.specials == "fnuz":
        return codes
    return codes.masked_fill(codes == 1 << (fmt.bits - 1), 0)
