"""Infer from the size and the distribution of a layer's scales whether they multiply, divide, or belong elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fpxbench.checkpoint.checkpoint_folder import Checkpoint
from fpxbench.checkpoint.checkpoint_report import Evidence
from fpxbench.checkpoint.layer_examination import plain_matrices
from fpxbench.checkpoint.layers import QuantizedLayer
from fpxbench.checkpoint.readings import MOST_PLAIN_ROWS, judged, sureness
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_plain
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.tensor_codec import decode
from fpxbench.numbers.weight import QuantizedWeight

TYPICAL_RMS = 0.03
"""Typical rms of a trained linear layer's weights, for checkpoints without an unquantized layer to compare with."""
DECADES = 0.5
"""Standard deviation of log10(rms) between layers of one model."""
_OF_THIS = "unquantized layers of this checkpoint"
_FEWEST_SCALES = 256
_MOST_BY_SKEWNESS = 6.0
"""Most log odds that the distribution of the scales can give, since the weights' own distribution may be unusual."""


def scale_size(layer: QuantizedLayer, weight: QuantizedWeight, checkpoint: Checkpoint,
               contradicts: float) -> Iterator[Evidence]:
    """Yield the evidence on whether the scales of `weight`, a sample of `layer`, multiply or divide, or have a wrong
    size."""
    scaling = weight.scheme.scaling
    skewness = of_maxima = 0.0
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
        skewness, of_maxima = _skewness(weight.scale_grid())
    else:
        readings, read_as, what = {"multiplies": _rms(weight.dequantize())}, "multiplies", ""
    typical, source = _typical_rms(layer, checkpoint)
    distances = {name: ((math.log10(rms) - math.log10(typical)) / DECADES) ** 2 / 2 if 0 < rms < math.inf else 1e4
                 for name, rms in readings.items()}
    countable = all(0 < rms < math.inf for rms in readings.values())
    if countable and source.endswith(_OF_THIS) and min(distances.values()) > contradicts:
        yield Evidence(convention="the size of the scales", read_as="as stored", fits_better="another",
                       sureness=sureness(min(distances.values())),
                       message="weights have an rms of " + ", ".join(
                           f"{rms:.3g} if {what or 'the scale'} {name}" for name, rms in readings.items())
                       + f"; {source} have {typical:.3g}")
        return
    if not what:
        return
    other = next(name for name in readings if name != read_as)
    log_ratio = distances[other] - distances[read_as] + of_maxima
    message = (f"if {what} {read_as}, as in {layer.dialect.name}, weights have an rms of {readings[read_as]:.3g}; "
               f"if it {other}, of {readings[other]:.3g}; {source} have {typical:.3g}"
               + (f"; scales within a row are skewed by {skewness:+z.2f}" if of_maxima else ""))
    yield judged(what, read_as, other, log_ratio, message, contradicts)


def _skewness(scales: Tensor) -> tuple[float, float]:
    """Return the skewness of the logarithms of scales [R, G] within rows and columns, and the log odds that the scales
    follow the blocks' largest weights, and not the reciprocals of these.

    The logarithm of the largest of many weights is skewed to large values for normal and for heavier tails, that of a
    reciprocal to small ones. Uniformly distributed weights contradict this, so the log odds are limited.
    """
    if min(scales.shape) < 2 or scales.numel() < _FEWEST_SCALES or not bool((scales > 0).all()):
        return 0.0, 0.0
    logs = scales.double().log()
    rest = logs - logs.mean(dim=1, keepdim=True) - logs.mean(dim=0, keepdim=True) + logs.mean()
    deviation = rest.square().mean().sqrt()
    if not bool(deviation > 1e-9):
        return 0.0, 0.0
    skewness = ((rest / deviation) ** 3).mean().item()
    # Blocks of a layer are alike: a tenth of them count as independent.
    strength = max(-30.0, min(30.0, skewness / math.sqrt(60 / rest.numel())))
    odds = math.log(math.erfc(-strength / math.sqrt(2))) - math.log(math.erfc(strength / math.sqrt(2)))
    return skewness, max(-_MOST_BY_SKEWNESS, min(_MOST_BY_SKEWNESS, odds))


def _rms(values: Tensor) -> float:
    """Return the median rms of the nonzero rows of [N, K]: one wrong scale does not change it much."""
    rows = torch.where(values.isfinite(), values, 0.0).double().square().mean(dim=1).sqrt()
    rows = rows[(rows > 0) & rows.isfinite()]
    return rows.median().item() if rows.numel() else 0.0


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
    return math.exp(sum(map(math.log, found)) / len(found)), f"{len(found)} {_OF_THIS}"
