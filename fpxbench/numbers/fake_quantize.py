"""Fake quantization for quantization-aware training: numbers rounded to a format, kept in their own dtype.

Encodes and decodes, with every rounding and overflow of `fpxbench.numbers.tensor_codec`. Compiles as one graph
(``torch.compile(fullgraph=True)``), which fuses the definition instead of looking up a table.

The straight-through estimator: Bengio, Léonard and Courville, "Estimating or propagating gradients through stochastic
neurons for conditional computation", arXiv:1308.3432; clipped as in Courbariaux et al., arXiv:1602.02830 §2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.numbers.codec_definition import SOURCES
from fpxbench.numbers.formats import Format
from fpxbench.numbers.rounding import Overflow, Rounding
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.tensor_codec import check_request, decode, encode_checked


def fake_quantize(
    x: Tensor,
    fmt: Format,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    *,
    straight_through: bool = False,
    clip_gradient: bool = True,
    random_bits: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return `x` rounded once to the numbers of `fmt`; same shape and dtype (fp64, fp32, bf16 or fp16). NaN stays NaN.

    The derivative of rounding is zero, so the result requires no gradient. With `straight_through` rounding counts as
    the identity: gradients pass unchanged where |x| is within the format's range, and are zero past it, where x has no
    influence. `clip_gradient=False` lets them pass there too.

    Raises what `fpxbench.numbers.tensor_codec.encode` raises, TypeError if `fmt` is not a `Format`, and ValueError for
    a dtype that does not hold every number of the format.
    """
    if not isinstance(fmt, Format):
        raise TypeError(
            f'fake_quantize takes a Format, not {fmt!r}: fpxbench.numbers.formats.format_named("e4m3fn") gives one'
        )
    check_request(x, fmt, rounding, overflow, random_bits)
    if not _holds(x.dtype, fmt):
        raise ValueError(
            f"{x.dtype} does not hold every number of {fmt.name}, {fmt.min_subnormal:g} to {fmt.max:g}: use float32"
        )
    flat = x.detach().reshape(-1)
    values = decode(encode_checked(flat, fmt, rounding, overflow, random_bits, generator), fmt).to(x.dtype)
    if not fmt.has_nan:
        values = torch.where(flat.isnan(), flat, values)
    values = values.reshape(x.shape)
    if not straight_through:
        return values
    lowest = fmt.min_subnormal if not fmt.has_zero else -fmt.max if fmt.signed else 0.0
    passes = (x >= lowest) & (x <= fmt.max) if clip_gradient else None
    return _StraightThrough.apply(x, values, passes)


def fake_quantize_weight(weight: Tensor, scheme: Scheme, *, straight_through: bool = False) -> Tensor:
    """Return float `weight` [N, K] quantized under `scheme` and decoded; same dtype.

    Codes and scales are those of `Scheme.quantize`; their fp32 product is rounded once more for a weight of 16 bits.
    With `straight_through` the gradient of every weight passes unchanged. That includes the largest of a block, even
    where it saturates (mx, nv): the scale follows it, so it has an influence.

    Raises what `Scheme.quantize` raises, and TypeError if `scheme` is not a `Scheme`. A compiled graph cannot branch on
    values, so there a non-finite weight is not an error: its whole block becomes non-finite.
    """
    if not isinstance(scheme, Scheme):
        raise TypeError(
            f"fake_quantize_weight takes a Scheme, not {scheme!r}:"
            ' fpxbench.numbers.scheme.scheme_named("mxfp4") gives one'
        )
    values = scheme.dequantize(*scheme.quantize(weight.detach())).to(weight.dtype)
    return _StraightThrough.apply(weight, values, None) if straight_through else values


def _holds(dtype: torch.dtype, fmt: Format) -> bool:
    """Return whether `dtype` has the range of `fmt`. Its precision is enough: no format of 8 bits has more than
    bf16's."""
    _, mantissa_bits, bias = SOURCES[dtype]
    return fmt.emax <= bias and fmt.min_subnormal >= 2.0 ** (1 - bias - mantissa_bits)


class _StraightThrough(torch.autograd.Function):
    """Return `values` in the forward pass; in the backward pass, give their gradient to `x` where `passes` is true
    (None: everywhere).
    """

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, passes: Tensor | None) -> Tensor:
        ctx.save_for_backward(passes)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        passes, = ctx.saved_tensors
        return (gradient if passes is None else torch.where(passes, gradient, 0)), None, None
