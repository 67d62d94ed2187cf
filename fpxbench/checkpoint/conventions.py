"""Tell by the numbers which convention a layer follows, where metadata is missing or wrong.

Each test compares the dialect's reading with the others that bytes of this shape allow, and says how sure it is. None
of them proves anything: a sureness is the posterior of two readings that were equally likely before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fpxbench.checkpoint.checkpoint_folder import Checkpoint
from fpxbench.checkpoint.checkpoint_report import Evidence
from fpxbench.checkpoint.layer_examination import plain_matrices
from fpxbench.checkpoint.layers import QuantizedLayer
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_plain
from fpxbench.numbers.codec import decode, encode
from fpxbench.numbers.formats import Format
from fpxbench.numbers.scaling import Scales, scaling_named
from fpxbench.numbers.weight import QuantizedWeight

TYPICAL_RMS = 0.03
"""Of a trained linear layer's weights, where the checkpoint holds no unquantized one to go by."""
DECADES = 0.5
"""Standard deviation of log10(rms) between layers of one model."""
MOST_PLAIN_ROWS = 4096
_CONTRADICTS = 10.0
"""Odds, as a logarithm, from which the other reading of one layer is a finding; of several layers each must reach as
much more as the logarithm of their number. Chance gives a finding to one checkpoint of 20,000 (docs/checkpoints.md)."""
_STRUCTURED = 6.0
"""Standard deviations by which rows and columns explain more of tiled scales than they would of shuffled ones."""
_PRUNED = 2.0
"""Zeros over codes of the smallest number, from which weights were set to zero, and did not round to it. Rounding gives
a half."""
_ROUNDINGS = {"mx": ("mx", "mx.ceil", "mx.even", "mx.rceil"), "nv": ("nv", "nv.up", "nv.4over6")}


def evidence(layer: QuantizedLayer, weight: QuantizedWeight, checkpoint: Checkpoint, among: int = 1) -> list[Evidence]:
    """Return what the numbers of `weight`, a sample of `layer`, say about each convention that they bear on.

    among : how many layers are asked; the more, the more each must say before it is a finding

    A weight that is all zeros says nothing.
    """
    if not bool((decode(weight.codes(), weight.scheme.format) != 0).any()):
        return []
    contradicts = _CONTRADICTS + math.log(max(1, among))
    tests = (_magnitude(layer, weight, checkpoint, contradicts), _fnuz(weight, contradicts),
             _nibble_order(weight, checkpoint, contradicts), _swizzle(weight, contradicts), _scale_rounding(weight))
    return [found for test in tests for found in test]


def _sureness(log_ratio: float) -> float:
    """Return the probability of the favoured of two readings, from the logarithm of their likelihoods' ratio."""
    return 1 / (1 + math.exp(-min(abs(log_ratio), 700.0)))


# Do scales multiply or divide?


def _magnitude(layer: QuantizedLayer, weight: QuantizedWeight, checkpoint: Checkpoint,
               contradicts: float) -> Iterator[Evidence]:
    scaling = weight.scheme.scaling
    if scaling.has_tensor_scale:
        block, _ = scaling.levels(Scales(weight.scales, weight.tensor_scale))
        spread = scaling.spread(block, *weight.shape)
        values = decode(weight.codes(), weight.scheme.format) * spread
        scale = weight.tensor_scale
        readings = {"multiplies": _rms(values * scale), "divides": _rms(values / scale)}
        read_as, what = "divides" if getattr(scaling, "divides", False) else "multiplies", "the global scale"
    elif not scaling.scale_format.coded:
        spread = scaling.spread(weight.scale_grid(), *weight.shape)
        values = decode(weight.codes(), weight.scheme.format)
        readings = {"multiplies": _rms(values * spread), "divides": _rms(values / spread)}
        read_as, what = "multiplies", "the scale"
    else:
        return
    typical, source = _typical_rms(layer, checkpoint)
    distances = {name: ((math.log10(rms) - math.log10(typical)) / DECADES) ** 2 / 2 if 0 < rms < math.inf else 1e4
                 for name, rms in readings.items()}
    other = next(name for name in readings if name != read_as)
    log_ratio = distances[other] - distances[read_as]
    better = other if log_ratio < -contradicts else ""
    message = (f"if {what} {read_as}, as {layer.dialect.name} has it, weights have an rms of {readings[read_as]:.3g}; "
               f"if it {other}, of {readings[other]:.3g}; {source} have {typical:.3g}")
    yield Evidence(convention=what, read_as=read_as, fits_better=better, sureness=_sureness(log_ratio), message=message)


def _rms(values: Tensor) -> float:
    finite = values[values.isfinite()].double()
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def _typical_rms(layer: QuantizedLayer, checkpoint: Checkpoint) -> tuple[float, str]:
    found = []
    for name in plain_matrices(checkpoint, layer.k)[:8]:
        try:
            found.append(_rms(read_plain(checkpoint.tensors[name])[:MOST_PLAIN_ROWS]))
        except CheckpointError:
            continue
    found = [rms for rms in found if rms > 0]
    if not found:
        return TYPICAL_RMS, "trained layers commonly"
    return math.exp(sum(map(math.log, found)) / len(found)), f"{len(found)} unquantized layers of this checkpoint"


# FN or FNUZ?


def _fnuz(weight: QuantizedWeight, contradicts: float) -> Iterator[Evidence]:
    fmt = weight.scheme.format
    if not isinstance(fmt, Format) or fmt.sibling is None or fmt.exponent_bits + fmt.mantissa_bits != 7:
        return
    sibling = fmt.sibling
    codes, (n, k) = weight.codes(), weight.shape
    scaling = weight.scheme.scaling
    blocks = torch.zeros(scaling.grid_shape(n, k), dtype=torch.int64).reshape(-1)
    blocks.scatter_reduce_(0, scaling.block_index(n, k).reshape(-1), (codes & 0x7f).reshape(-1).long(), "amax")
    fn, fnuz = (sibling, fmt) if fmt.specials == "fnuz" else (fmt, sibling)
    # A quantizer makes each block's largest weight its format's largest number. FN's are one code below FNUZ's.
    of_fn, of_fnuz = ((blocks == found.max_code).sum().item() for found in (fn, fnuz))
    # Small weights become 0 of either sign in FN, and 0 alone in FNUZ, where 0x80 is NaN. Pruned ones become 0 in both.
    zeros, negative_zeros, smallest = ((codes == code).sum().item() for code in (0, 0x80, 0x81))
    pruned = zeros > _PRUNED * 2 * smallest
    of_zeros = negative_zeros if negative_zeros else 0.0 if pruned else -zeros * math.log(2)
    for_fn = max(-50.0, min(50.0, of_fn - of_fnuz + of_zeros))
    log_ratio = for_fn if fmt is fn else -for_fn
    message = (
        f"the largest code is {fn.max_code:#04x} in {of_fn} of {len(blocks)} blocks, {fnuz.max_code:#04x} in {of_fnuz};"
        f" {zeros} codes are 0x00 and {negative_zeros} 0x80 (-0 in {fn.name}, NaN in {fnuz.name})"
    )
    yield Evidence(convention="the format", read_as=fmt.name,
                   fits_better=sibling.name if log_ratio < -contradicts else "",
                   sureness=_sureness(log_ratio), message=message)


# Which nibble comes first?


def _nibble_order(weight: QuantizedWeight, checkpoint: Checkpoint, contradicts: float) -> Iterator[Evidence]:
    """Compare how large each input channel's weights are with the same in unquantized layers that read these inputs."""
    if weight.scheme.format.bits != 4 or weight.layout == "bytes":
        return
    k = weight.shape[1]
    names = plain_matrices(checkpoint, k)
    if not names or k % 2:
        yield Evidence(convention="the nibble order", read_as=weight.layout, sureness=0.5,
                       message="no unquantized layer reads the same inputs: the numbers do not determine the order")
        return
    profile = torch.stack(
        [_channels(read_plain(checkpoint.tensors[name])[:MOST_PLAIN_ROWS]) for name in names[:8]]
    ).mean(0)
    channels = _channels(weight.dequantize())
    correlation, strength = _pairs_correlate(channels, profile)
    # The sign under one order is the opposite of that under the other. How large the correlation is in this model is
    # not known, and between layers of different kinds it is none: the odds are those of a sign test.
    log_ratio = math.log(math.erfc(-strength / math.sqrt(2))) - math.log(math.erfc(strength / math.sqrt(2)))
    other = {"nibbles_low_first": "nibbles_high_first", "nibbles_high_first": "nibbles_low_first"}.get(
        weight.layout, "another"
    )
    yield Evidence(
        convention="the nibble order",
        read_as=weight.layout,
        fits_better=other if log_ratio < -contradicts else "",
        sureness=_sureness(log_ratio),
        message=f"channel sizes agree with {len(names[:8])} unquantized layers' to r = "
        f"{correlation:+.3f} within pairs; the other order gives the opposite sign",
    )


def _pairs_correlate(channels: Tensor, profile: Tensor) -> tuple[float, float]:
    """Return how alike two profiles [K] are within pairs of neighbours, by ranks: the correlation, and that in standard
    deviations of chance.

    Of neighbours, only the difference matters: all that the order within a byte changes. Ranks make chance the same
    whatever the sizes are, those of dead and of outlier channels included: the variance of the correlation of N pairs
    is 1 / (N - 1), and its tails are no heavier than a normal distribution's.
    """
    seen, expected = (_ranks(values[0::2] - values[1::2]) for values in (channels, profile))
    correlation = (seen @ expected / (seen.norm() * expected.norm()).clamp(min=1e-30)).item()
    return correlation, max(-30.0, min(30.0, correlation * math.sqrt(max(1, len(seen) - 1))))


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each number [N], their mean taken off; equal numbers share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    mean = counts.cumsum(0) - (counts - 1) / 2
    return mean.double()[inverse] - (len(values) + 1) / 2


def _channels(values: Tensor) -> Tensor:
    """Return log rms of each column, fp64 ``[K]``."""
    return values.double().square().mean(dim=0).clamp(min=1e-30).log() / 2


# Are the scales in the tensor cores' tiled order?


def tiled_order(n: int, g: int) -> Tensor:
    """Return where the scale of row r and block c lies in the 128 x 4 tiles of NVIDIA's tensor cores, int64 ``[n, g]``.

    Source: cuBLAS, "1D block scaling factors layout".
    """
    r, c = torch.arange(n)[:, None], torch.arange(g)[None, :]
    tile = r // 128 * (-(-g // 4)) + c // 4
    return tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4


def _swizzle(weight: QuantizedWeight, contradicts: float) -> Iterator[Evidence]:
    """Compare how much of the scales' variation rows and columns explain, as read and as if tiled."""
    n, g = weight.scales.shape
    if not weight.scheme.scaling.scale_format.coded or n < 128 or g < 4 or n % 128 or g % 4:
        return
    logs = weight.scheme.scaling.scale_format.decode(weight.scales).double().clamp(min=1e-38).log2()
    unexplained = {"linear": _unexplained(logs), "128 x 4 tiles": _unexplained(logs.reshape(-1)[tiled_order(n, g)])}
    # Blocks of a row are not independent: the rows count. Scales without structure fit both readings by chance.
    by_chance, spread = (n + g - 2) / (n * g - 1), math.sqrt(2 * (n + g - 2)) / (n * g)
    structured = 1 - unexplained["128 x 4 tiles"] - by_chance > _STRUCTURED * spread
    log_ratio = n / 2 * math.log(max(unexplained["128 x 4 tiles"], 1e-12) / max(unexplained["linear"], 1e-12))
    yield Evidence(
        convention="the order of the scales",
        read_as="linear",
        fits_better="128 x 4 tiles" if log_ratio < -contradicts and structured else "",
        sureness=_sureness(log_ratio),
        message="rows and columns explain "
        + ", ".join(f"{1 - value:.0%} of the scales' variance read as {name}" for name, value in unexplained.items()),
    )


def _unexplained(field: Tensor) -> float:
    """Return the share of a field's variance that is left after row and column means."""
    centred = field - field.mean()
    total = centred.square().sum()
    rest = centred - centred.mean(dim=1, keepdim=True) - centred.mean(dim=0, keepdim=True)
    return (rest.square().sum() / total.clamp(min=1e-30)).item() if total > 0 else 1.0


# How were the scales rounded?


def _scale_rounding(weight: QuantizedWeight) -> Iterator[Evidence]:
    """Compare each block's largest code with what the roundings of its family give for a block of any size."""
    scaling, fmt = weight.scheme.scaling, weight.scheme.format
    names = _ROUNDINGS.get(scaling.kind, ())
    if not names or scaling.block_rows != 1:
        return
    n, k = weight.shape
    values = decode(weight.codes(), fmt).abs()[:, : k // scaling.block * scaling.block].reshape(-1, scaling.block)
    values = values[values.isfinite().all(dim=1)]
    largest = encode(values.amax(dim=1), fmt)
    counts = torch.bincount(largest[largest > 0].int(), minlength=1 << fmt.bits).double()
    if not counts.sum():
        return
    fits = {name: (counts * _largest_codes(name, fmt).log()).sum().item() for name in names}
    best, second = sorted(fits, key=fits.__getitem__, reverse=True)[:2]
    # Blocks of a layer are alike: a tenth of them count as independent.
    log_ratio = (fits[best] - fits[second]) / 10
    shares = ", ".join(
        f"{fmt.value(code):g} in {counts[code] / counts.sum():.0%}"
        for code in counts.argsort(descending=True)[:3].tolist()
    )
    # No fault either way: what is stored decodes alike. It tells which quantizer wrote the file.
    yield Evidence(
        convention="the scales' rounding",
        read_as=best,
        sureness=_sureness(log_ratio),
        message=f"the largest number of a block is {shares}; {second} is the next likely of {', '.join(names)}",
    )


@cache
def _largest_codes(name: str, fmt) -> Tensor:
    """Return the probability of each code to be a block's largest, if the block's amax may have any significand
    (log-uniform)."""
    scaling = scaling_named(name)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(4096, scaling.block, generator=generator)
    blocks = blocks / blocks.abs().amax(dim=1, keepdim=True) * 2.0 ** torch.rand(4096, 1, generator=generator)
    if scaling.has_tensor_scale:
        blocks[0] *= 64     # the tensor scale is of one block alone
    scales = scaling.choose(blocks, fmt)
    codes = encode(scaling.divide(blocks, scales), fmt)
    largest = encode(decode(codes, fmt).abs().amax(dim=1), fmt)
    counts = torch.bincount(largest.int(), minlength=1 << fmt.bits).double() + 0.5
    return counts / counts.sum()

