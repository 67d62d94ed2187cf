"""Known ways to store a weight wrongly, as data: how a value became a code, and how a block got its scale.

`fpxbench.diagnose` compares the codes and scales that an implementation stored with what each of these would store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench import packing
from fpxbench.codec import Overflow, Rounding, encode
from fpxbench.formats import Format
from fpxbench.misreadings import code_misreadings, is_subnormal, sibling
from fpxbench.verdict import Kind

Divide = Callable[[Tensor], Tensor]
"""A weight [N, K] over its scales, fp32 [N, K]."""

QUOTIENT_SLACK = 2.0**-22
"""w * (1 / s) may differ from w / s by this much, and then round to the other side of a midpoint: not a mistake."""


@dataclass(frozen=True)
class Misencoding:
    """One mistake in turning a weight into codes: `apply(weight, divide)` gives the uint8 codes that it would store."""

    kind: Kind
    sentence: str
    apply: Callable[[Tensor, Divide], Tensor]


def misencodings(fmt: Format, layout: str, k: int, largest_stored: int) -> Iterator[Misencoding]:
    """Every known mistake of an encoder to `fmt`; `largest_stored` is the largest magnitude code that it did store."""

    def rounded(kind: Kind, sentence: str, **how: Rounding | Overflow) -> Misencoding:
        return Misencoding(kind, sentence, lambda weight, divide: encode(divide(weight), fmt, **how))

    def changed(kind: Kind, sentence: str, change: Callable[[Tensor, Tensor], Tensor]) -> Misencoding:
        """`change` takes the right codes and the values they stand for before rounding."""
        def apply(weight: Tensor, divide: Divide) -> Tensor:
            values = divide(weight)
            return change(encode(values, fmt), values)
        return Misencoding(kind, sentence, apply)

    yield rounded(Kind.TRUNCATED, "codes are rounded toward zero, not to the nearest", rounding=Rounding.TOWARD_ZERO)
    yield rounded(Kind.TIES_AWAY, "halfway values are rounded away from zero, not to the even code", rounding=Rounding.NEAREST_AWAY)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        yield Misencoding(Kind.DOUBLE_ROUNDING, f"values are rounded twice: to {name} after the scale, then to {fmt.name}",
                          lambda weight, divide, dtype=dtype: encode(divide(weight).to(dtype), fmt))
        yield Misencoding(Kind.DOUBLE_ROUNDING, f"values are rounded twice: to {name} before the scale, then to {fmt.name}",
                          lambda weight, divide, dtype=dtype: encode(divide(weight.to(dtype).float()), fmt))
    if fmt.has_nan:
        yield rounded(Kind.OVERFLOW_NAN, f"what rounds past {fmt.max:g} is stored as NaN, not as {fmt.max:g}", overflow=Overflow.NAN)
    if fmt.has_infinity:
        yield rounded(Kind.OVERFLOW_INF, f"what rounds past {fmt.max:g} is stored as infinity, not as {fmt.max:g}",
                      overflow=Overflow.INFINITY)
    if 0 < largest_stored < fmt.max_code:
        top = fmt.value(largest_stored)
        yield Misencoding(Kind.SATURATED, f"what lies past {top:g} is stored as {top:g}; {fmt.name} reaches {fmt.max:g}",
                          lambda weight, divide: encode(divide(weight).clamp(-top, top), fmt))
    other = sibling(fmt)
    if other is not None:
        kind = Kind.FNUZ_AS_FN if other.specials == "fnuz" else Kind.FN_AS_FNUZ
        yield Misencoding(kind, f"the stored codes are {other.name}'s (bias {other.bias}); the scheme reads them as {fmt.name}'s"
                                f" (bias {fmt.bias})", lambda weight, divide: encode(divide(weight), other))
    if fmt.specials == "fnuz":
        minus_zero = 1 << (fmt.bits - 1)
        yield changed(Kind.NEGATIVE_ZERO, f"negative values that round to zero are stored as {fmt.describe_code(minus_zero)},"
                                          " which is NaN: FNUZ has no -0",
                      lambda codes, values: codes.masked_fill((codes == 0) & torch.signbit(values), minus_zero))
    if fmt.signed:
        yield Misencoding(Kind.SIGN_LOST, "negative weights are stored as positive",
                          lambda weight, divide: encode(divide(weight.abs()), fmt))
    if not fmt.is_integer and fmt.mantissa_bits:
        subnormal = is_subnormal(fmt)
        yield changed(Kind.SUBNORMAL_FLUSHED, "what rounds to a subnormal code is stored as zero",
                      lambda codes, values: codes.masked_fill(subnormal.to(codes.device)[codes.int()], 0))
        yield changed(Kind.SUBNORMAL_FLUSHED, f"values below the smallest normal, {fmt.min_normal:g}, are stored as zero",
                      lambda codes, values: codes.masked_fill(values.abs() < fmt.min_normal, 0))
    for moved in code_misreadings(fmt, layout, k):
        yield changed(moved.kind, f"the right codes lie in the wrong places, as though {moved.sentence}",
                      lambda codes, values, moved=moved: _moved(codes, moved.apply))


def _moved(codes: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    k = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, packing.padded_k(k) - k))
    return apply(padded, torch.arange(k, device=codes.device))


def same_number(codes: Tensor, fmt: Format) -> Tensor:
    """Codes with -0 written as +0, where the format has a -0: which of them is stored makes no difference."""
    if not fmt.signed or fmt.twos_complement or fmt.specials == "fnuz":
        return codes
    return codes.masked_fill(codes == 1 << (fmt.bits - 1), 0)
