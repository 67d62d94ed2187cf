"""Make model-like weights and activations, and weights with every scale: for faults that N(0, 1) does not show."""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.case import Case

KINDS_OF_ROWS = 8
_OUTLIER = 50.0
_LOUD = 200.0
_OFFSET = 64.0


def model_weight(case: Case, rng: torch.Generator, device: str) -> Tensor:
    """Return a weight, fp32 [N, K], whose rows r % 8 are: N(0, 1), zeros, constant, heavy-tailed, with zero blocks,
    tiny, huge, half zeros of both signs; two columns are 50 times larger.

    Tiny and huge rows differ by 2**120 if each row has its own scales of sufficient range, else by 2**12.
    """
    n, k = case.n, case.k
    weight = torch.randn(n, k, generator=rng, device=device)
    tail = torch.randn(n, k, generator=rng, device=device).abs().clamp(min=2.0**-7)
    kind = torch.arange(n, device=device)[:, None] % KINDS_OF_ROWS
    column = torch.arange(k, device=device)[None, :]
    weight[:, [k // 7, k // 3]] *= _OUTLIER
    span = _span(case)
    zeroed = ((kind == 1) | ((kind == 4) & (column // 32 % 2 == 1)) | ((kind == 7) & (column % 2 == 0)))
    weight = torch.where(kind == 2, 0.3, weight)
    weight = torch.where(kind == 3, weight / tail, weight)
    weight = torch.where(kind == 5, weight * 2.0**-span, weight)
    weight = torch.where(kind == 6, weight * 2.0**span, weight)
    return torch.where(zeroed, 0.0 * weight, weight).contiguous()      # zeros keep their sign


def _span(case: Case) -> int:
    """Return the largest distance of rows from 1, as a power of two."""
    scaling = scheme_named(case.scheme).scaling
    own_scales = scaling is None or (scaling.block_rows == 1 and not scaling.has_tensor_scale)
    narrow = case.activation == "fp16" or (scaling is not None and scaling.scale_format.bits in (8, 16) and not
                                           scaling.scale_format.powers_of_two)
    return 60 if own_scales and not narrow and scaling is not None else 6


def model_activation(x: Tensor) -> Tensor:
    """Return activations [M, K] whose rows m % 6 are: as given, with two outlier channels, zeros of both signs, with a
    common offset, small, large."""
    m, k = x.shape
    kind = torch.arange(m, device=x.device)[:, None] % 6
    loud = torch.zeros(1, k, dtype=torch.bool, device=x.device)
    loud[0, [k // 5, k // 2]] = True
    x = torch.where((kind == 1) & loud, x * _LOUD, x)
    x = torch.where(kind == 2, 0.0 * x, x)
    x = torch.where(kind == 3, x + _OFFSET, x)
    x = torch.where(kind == 4, x * 2.0**-6, x)
    return torch.where(kind == 5, x * 2.0**4, x)


def every_scale(case: Case, rng: torch.Generator, device: str) -> Tensor:
    """Return a weight, fp32 [N, K], whose blocks have every scale that finite weights can have in the scheme's format.

    This excludes NaN, scales that no fp32 weight needs, and for fp16 activations those out of fp16's range.
    """
    scheme = scheme_named(case.scheme)
    shape = scheme.scaling.grid_shape(case.n, case.k)
    scales = scale_values(scheme, case.activation)
    order = torch.arange(shape[0] * shape[1]) % len(scales)
    # Scales of neighbours along K differ much, so that reading a neighbour's scale shows.
    shift = torch.arange(shape[1])[None, :] * (len(scales) // 2)
    grid = scales[(order.reshape(shape[1], shape[0]).T + shift) % len(scales)].to(device)
    table = decode_table(scheme.format, device)
    finite = (table.isfinite() & (table.abs() <= scheme.format.max)).nonzero().reshape(-1)
    codes = finite[torch.randint(len(finite), (case.n, case.k), generator=rng, device=device)]
    rows, columns = scheme.scaling.block_shape(case.n, case.k)
    codes[::rows, ::columns] = scheme.format.max_code       # once per block, to determine its scale
    factors = scheme.scaling.spread(grid, case.n, case.k)
    return (table[codes.int()] * factors).float().contiguous()


def scale_values(scheme: Scheme, activation: str) -> Tensor:
    """Return the scales to use, fp32 [S], ascending: all of a coded format; powers of two and others in fp32."""
    fmt, stored = scheme.format, scheme.scaling.scale_format
    low, high = (2.0**-14, 2.0**15) if activation == "fp16" else (2.0**-126, 2.0**126)
    if stored.coded:
        values = decode_table(stored.format).double()
        values = values[values.isfinite() & (values > 0)].sort().values
        if scheme.scaling.has_tensor_scale:     # under a tensor scale that keeps them near 1
            values = values * 2.0**-8
    else:
        exponents = torch.arange(-126, 127, 2).double()
        values = torch.cat([torch.exp2(exponents), 1.37 * torch.exp2(exponents)]).sort().values
        low, high = max(low, 2.0**-100), min(high, 2.0**100)
        values = scheme.scaling.factors(Scales(stored.encode(values.float()))).double() if stored.bits == 16 else values
    # A block's largest number must be in the range of 16 bits, and no weight may exceed fp32.
    kept = values[(values * fmt.max >= low) & (values * fmt.max <= high)]
    return kept.float()


def quiet(x: Tensor) -> Tensor:
    """Return activations small enough for sums of weights under the largest scales to stay in range."""
    return x * 2.0**-8
