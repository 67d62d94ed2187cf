"""Generate a case's inputs from its seed: weights, activations and probes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fpxbench.checking import model_values
from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.workloads import WeightContents, contents_of

ACTIVATION_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def generator(seed: int, *purpose: object, device: str = "cpu") -> torch.Generator:
    """Return a generator for one purpose of one case: the same seed and purpose give the same numbers."""
    return torch.Generator(device).manual_seed(derived_seed(seed, *purpose))


def derived_seed(seed: int, *purpose: object) -> int:
    """Return the seed of one purpose, of 56 bits."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def make_weight(case: Case, seed: int, device: str = "cpu", contents: WeightContents | None = None) -> Tensor:
    """Return the weight of a case, fp32 [N, K], the same for every implementation.

    contents : None: as the case's workload says. `CODES`: values on which encoders and decoders differ, under scales of
        1: every finite number of the scheme's format, all midpoints, their neighbours, and for MX, whose rule allows
        it, numbers past the maximum. With a tensor scale, the first block is larger, so that the tensor scale and all
        other block scales are powers of two, and midpoints are ties however weights are divided. A dense scheme gets
        N(0, 1).
    """
    rng = generator(seed, "weight", case.n, case.k, device=device)
    scheme = scheme_named(case.scheme)
    contents = contents or contents_of(case.workload)
    if contents is WeightContents.VALUES:
        return model_values.model_weight(case, rng, device)
    if contents is WeightContents.SCALES and scheme.quantized:
        return model_values.every_scale(case, rng, device)
    if contents is WeightContents.NORMAL or not scheme.quantized:
        return torch.randn(case.n, case.k, generator=rng, device=device)
    fmt, block = scheme.format, scheme.scaling.block or case.k
    numbers, beside = _discriminating_values(fmt, device, reach=scheme.scaling.reach(fmt))
    values = torch.cat([numbers, beside])
    order = torch.randperm(case.n * case.k, generator=rng, device=device) % len(values)
    weight = values[order].reshape(case.n, case.k)
    # Every number occurs in as few columns as possible, far apart, so that few one-hot activations read every code.
    columns = -(-len(numbers) // case.n)
    spread = torch.arange(columns, device=device) * case.k // columns
    spread = (spread + (spread % block == 0)).clamp(max=case.k - 1)     # a block's first column holds the maximum
    order = torch.randperm(len(numbers), generator=rng, device=device)
    cycled = order[torch.arange(columns * case.n, device=device) % len(numbers)]
    weight[:, spread] = numbers[cycled].reshape(columns, case.n).T
    weight[:, ::block] = fmt.max    # makes each block's scale 1
    if scheme.scaling.has_tensor_scale:
        _, tensor_scale = scheme.scaling.levels(scheme.scaling.choose(weight, fmt))
        larger = (1 / torch.frexp(tensor_scale).mantissa).bfloat16().float()      # 1.75 for 1 / 448: 2**-8
        rows, columns = scheme.scaling.block_shape(case.n, case.k)
        weight[:rows, :columns] *= larger
    return weight.contiguous()


def _discriminating_values(fmt: NumberFormat, device: str, *, reach: float) -> tuple[Tensor, Tensor]:
    """Return every finite number of a format, and the midpoints with neighbours that 16 bits round onto them."""
    numbers = decode_table(fmt, device)
    numbers = numbers[numbers.isfinite() & (numbers >= -fmt.max)]      # int8's -128 lies past the scale rule's range
    ascending = numbers.unique()
    middle = (ascending[1:] + ascending[:-1]) / 2
    step = 2.0**-12
    beside = [middle, middle * (1 + step), middle * (1 - step)]
    if reach > fmt.max:
        past = reach * (1 - step)    # just below the limit for a block with scale 1
        beside.append(torch.tensor([past, -past], device=device))
    return numbers, torch.cat(beside)


def make_activation(case: Case, seed: int, purpose: object, device: str = "cpu") -> Tensor:
    """Return the activation [M, K] for one purpose, in the case's dtype: N(0, 1), or as the workload's contents say.

    `purpose` is the number of a checked call, or the name of another use ("timing"); purposes do not share numbers.
    """
    rng = generator(seed, "activation", purpose, case.m, case.k, device=device)
    x = torch.randn(case.m, case.k, generator=rng, device=device)
    contents = contents_of(case.workload)
    if contents is WeightContents.VALUES:
        x = model_values.model_activation(x)
    elif contents is WeightContents.SCALES:
        x = model_values.quiet(x)
    return x.to(ACTIVATION_DTYPES[case.activation])


def drawn_activation(case: Case, seed: int, purpose: object, rows: Tensor) -> Tensor:
    """Return the activation [M, K] for one purpose, in the case's dtype: rows drawn from `rows` [R, K].

    If R is small, purposes share rows; random signs make them differ.
    """
    rng = generator(seed, "activation", purpose, case.m, case.k, device=str(rows.device))
    picked = torch.randint(len(rows), (case.m,), generator=rng, device=rows.device)
    sign = torch.randint(2, (case.m, 1), generator=rng, device=rows.device) * 2 - 1
    return (rows[picked] * sign).to(ACTIVATION_DTYPES[case.activation])


def one_hot(columns: list[int], m: int, k: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return the activation [m, k] whose row i is 1 at ``columns[i % len(columns)]`` and 0 elsewhere."""
    x = torch.zeros(m, k, dtype=dtype, device=device)
    rows = torch.arange(m, device=device)
    picked = torch.tensor(columns, device=device)[rows % len(columns)]
    x[rows, picked] = 1.0
    return x


def columns_covering_codes(weight: QuantizedWeight, most: int) -> list[int]:
    """Return at most `most` columns that together hold as many different codes as possible (greedy set cover).

    One-hot activations of these columns show how each code is decoded, including rare ones (subnormals, the maximum).
    Only the first 4,096 rows are considered.
    """
    codes = weight.codes()[:4096]
    k, codes_count = codes.shape[1], 1 << weight.scheme.format.bits
    index = torch.arange(k, device=codes.device) * codes_count + codes.long()
    present = (torch.bincount(index.reshape(-1), minlength=k * codes_count) > 0).reshape(k, codes_count)
    uncovered = present.any(dim=0)
    chosen: list[int] = []
    while len(chosen) < most and bool(uncovered.any()):
        gain = (present & uncovered).sum(dim=1)
        column = int(gain.argmax())
        chosen.append(column)
        uncovered &= ~present[column]
    return chosen
