"""Infer from the numbers which convention a layer follows, where metadata is missing or wrong.

Each test compares the dialect's reading with the others that bytes of this shape allow. None is a proof: the `sureness`
is the posterior probability of one of two readings with equal priors.
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
from fpxbench.checkpoint.readings import MOST_PLAIN_ROWS, judged, sureness
from fpxbench.checkpoint.scale_size import scale_size
from fpxbench.checkpoint.statistics import far_from_zero, histogram
from fpxbench.checkpoint.weights import read_plain
from fpxbench.numbers.formats import FORMATS, Format
from fpxbench.numbers.scaling import scaling_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.numbers.weight import QuantizedWeight

_CONTRADICTS = 10.0
"""Log odds from which the other reading of a layer is a finding; with several layers, the logarithm of their number is
added. By chance, one checkpoint in 20,000 has a finding (docs/checkpoints.md)."""
_STRUCTURED = 6.0
"""Standard deviations by which rows and columns must explain more of the variance of tiled scales than of shuffled
ones."""
_AROUND_ZERO = 0.45
"""Share of codes larger than half of the maximum, up to which the size of a channel's codes follows that of its
weights."""
_AT_LARGEST = 0.15
"""Share of blocks whose largest weight becomes the format's largest number; it is the smallest under power-of-two
scales."""
_PRUNED = 2.0
"""Ratio of zeros to codes of the smallest number, from which weights count as pruned; rounding alone gives a half."""
_ROUNDINGS = {"mx": ("mx", "mx.ceil", "mx.even", "mx.rceil"), "nv": ("nv", "nv.up", "nv.4over6")}


def evidence(layer: QuantizedLayer, weight: QuantizedWeight, checkpoint: Checkpoint, among: int = 1) -> list[Evidence]:
    """Return the evidence of the numbers of `weight`, a sample of `layer`, on each convention that affects them.

    among : number of layers examined; the log odds for a finding increase with it

    A weight of zeros gives no evidence.
    """
    if not bool((decode(weight.codes(), weight.scheme.format) != 0).any()):
        return []
    contradicts = _CONTRADICTS + math.log(max(1, among))
    tests = (scale_size(layer, weight, checkpoint, contradicts), _fnuz(weight, contradicts),
             _exponent_bits(weight, contradicts), _nibble_order(weight, checkpoint, contradicts),
             _swizzle(weight, contradicts), _scale_rounding(weight))
    return [found for test in tests for found in test]


# FN or FNUZ?


def _fnuz(weight: QuantizedWeight, contradicts: float) -> Iterator[Evidence]:
    fmt = weight.scheme.format
    if not isinstance(fmt, Format) or fmt.sibling is None or fmt.exponent_bits + fmt.mantissa_bits != 7:
        return
    sibling, codes, blocks = fmt.sibling, weight.codes(), _largest_magnitudes(weight)
    fn, fnuz = (sibling, fmt) if fmt.specials == "fnuz" else (fmt, sibling)
    # A quantizer makes each block's largest weight its format's largest number. FN's are one code below FNUZ's.
    of_fn, of_fnuz = ((blocks == found.max_code).sum().item() for found in (fn, fnuz))
    # Small weights become 0 of either sign in FN, but only +0 in FNUZ, where 0x80 is NaN. Pruned ones become +0 in
    # both.
    zeros, negative_zeros, smallest = ((codes == code).sum().item() for code in (0, 0x80, 0x81))
    pruned = zeros > _PRUNED * 2 * smallest
    of_zeros = negative_zeros if negative_zeros else 0.0 if pruned else -zeros * math.log(2)
    for_fn = max(-50.0, min(50.0, of_fn - of_fnuz + of_zeros))
    log_ratio = for_fn if fmt is fn else -for_fn
    message = (
        f"the largest code is {fn.max_code:#04x} in {of_fn} of {len(blocks)} blocks, {fnuz.max_code:#04x} in {of_fnuz};"
        f" {zeros} codes are 0x00 and {negative_zeros} 0x80 (-0 in {fn.name}, NaN in {fnuz.name})"
    )
    yield judged("the format", fmt.name, sibling.name, log_ratio, message, contradicts)


def _largest_magnitudes(weight: QuantizedWeight) -> Tensor:
    """Return the largest code of each block without its sign, int64 [blocks], of codes of 8 bits."""
    scaling, (n, k) = weight.scheme.scaling, weight.shape
    blocks = torch.zeros(scaling.grid_shape(n, k), dtype=torch.int64).reshape(-1)
    return blocks.scatter_reduce_(0, scaling.block_index(n, k).reshape(-1),
                                  (weight.codes() & 0x7f).reshape(-1).long(), "amax")


# Four bits of exponent, or five?


def _exponent_bits(weight: QuantizedWeight, contradicts: float) -> Iterator[Evidence]:
    """Compare E4M3 with E5M2, whose largest code is 0x7b: above it are infinity and NaN."""
    if weight.scheme.format.name != "e4m3fn":
        return
    largest = FORMATS["e5m2"].max_code
    blocks = _largest_magnitudes(weight)
    at, above, of_any = (int(found.sum()) for found in (blocks == largest, blocks > largest, blocks > 0))
    if above or at < _AT_LARGEST * of_any:
        return
    message = (f"the largest code is {largest:#04x}, E5M2's largest number, in {at} of {of_any} blocks, and none is"
               " above it")
    yield judged("the exponent of the format", "4 bits", "5 bits, as e5m2", -float(at), message, contradicts)


# Which nibble comes first?


def _nibble_order(weight: QuantizedWeight, checkpoint: Checkpoint, contradicts: float) -> Iterator[Evidence]:
    """Compare the sizes of the input channels' weights with those in unquantized layers that read the same inputs."""
    if weight.scheme.format.bits != 4 or weight.layout == "bytes":
        return
    k = weight.shape[1]
    names = plain_matrices(checkpoint, k)
    if far_from_zero(weight, histogram(weight)) > _AROUND_ZERO:
        yield Evidence(convention="the nibble order", read_as=weight.layout, sureness=0.5,
                       message="the codes do not lie around zero, whatever their order")
        return
    if not names or k % 2:
        yield Evidence(convention="the nibble order", read_as=weight.layout, sureness=0.5,
                       message="no unquantized layer reads the same inputs: the numbers do not determine the order")
        return
    profile = torch.stack(
        [_channels(read_plain(checkpoint.tensors[name])[:MOST_PLAIN_ROWS]) for name in names[:8]]
    ).mean(0)
    channels = _channels(weight.dequantize())
    correlation, strength = _pairs_correlate(channels, profile)
    # The other order inverts the sign. The size of the correlation in this model is unknown, and it is zero between
    # layers of different kinds: the odds are those of a sign test.
    log_ratio = math.log(math.erfc(-strength / math.sqrt(2))) - math.log(math.erfc(strength / math.sqrt(2)))
    other = {"nibbles_low_first": "nibbles_high_first", "nibbles_high_first": "nibbles_low_first"}.get(
        weight.layout, "another"
    )
    message = (f"channel sizes agree with {len(names[:8])} unquantized layers' to r = {correlation:+z.3f} within pairs;"
               " the other order gives the opposite sign")
    yield judged("the nibble order", weight.layout, other, log_ratio, message, contradicts)


def _pairs_correlate(channels: Tensor, profile: Tensor) -> tuple[float, float]:
    """Return the rank correlation of two profiles [K] within pairs of neighbours, and the same in standard deviations
    of chance.

    Only the difference of two neighbours matters, as the order within a byte changes nothing else. With ranks, chance
    does not depend on the sizes, those of dead and of outlier channels included: the variance of the correlation of N
    pairs is 1 / (N - 1), and its tails are no heavier than a normal distribution's.
    """
    seen, expected = (_ranks(values[0::2] - values[1::2]) for values in (channels, profile))
    correlation = (seen @ expected / (seen.norm() * expected.norm()).clamp(min=1e-30)).item()
    return correlation, max(-30.0, min(30.0, correlation * math.sqrt(max(1, len(seen) - 1))))


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each number [N] minus the mean rank; equal numbers share their mean rank."""
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
    # Blocks of a row are not independent, so n is the number of rows. Scales without structure fit both readings by
    # chance.
    by_chance, spread = (n + g - 2) / (n * g - 1), math.sqrt(2 * (n + g - 2)) / (n * g)
    structured = 1 - unexplained["128 x 4 tiles"] - by_chance > _STRUCTURED * spread
    log_ratio = n / 2 * math.log(max(unexplained["128 x 4 tiles"], 1e-12) / max(unexplained["linear"], 1e-12))
    message = "rows and columns explain " + ", ".join(
        f"{1 - value:.0%} of the scales' variance read as {name}" for name, value in unexplained.items())
    yield judged("the order of the scales", "linear", "128 x 4 tiles", log_ratio, message, contradicts, structured)


def _unexplained(field: Tensor) -> float:
    """Return the share of a field's variance that is left after row and column means."""
    centred = field - field.mean()
    total = centred.square().sum()
    rest = centred - centred.mean(dim=1, keepdim=True) - centred.mean(dim=0, keepdim=True)
    return (rest.square().sum() / total.clamp(min=1e-30)).item() if total > 0 else 1.0


# How were the scales rounded?


def _scale_rounding(weight: QuantizedWeight) -> Iterator[Evidence]:
    """Compare the blocks' largest codes with the distributions that the roundings of the scaling's family give."""
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
    # Not a fault either way, as the stored numbers decode the same. It shows which quantizer wrote the file.
    yield Evidence(
        convention="the scales' rounding",
        read_as=best,
        sureness=sureness(log_ratio),
        message=f"the largest number of a block is {shares}; {second} is the next most likely of {', '.join(names)}",
    )


@cache
def _largest_codes(name: str, fmt) -> Tensor:
    """Return the probability of each code to be a block's largest, for a log-uniform significand of the block's
    amax."""
    scaling = scaling_named(name)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(4096, scaling.block, generator=generator)
    blocks = blocks / blocks.abs().amax(dim=1, keepdim=True) * 2.0 ** torch.rand(4096, 1, generator=generator)
    if scaling.has_tensor_scale:
        blocks[0] *= 64     # the tensor scale depends on this block only
    scales = scaling.choose(blocks, fmt)
    codes = encode(scaling.divide(blocks, scales), fmt)
    largest = encode(decode(codes, fmt).abs().amax(dim=1), fmt)
    counts = torch.bincount(largest.int(), minlength=1 << fmt.bits).double() + 0.5
    return counts / counts.sum()

