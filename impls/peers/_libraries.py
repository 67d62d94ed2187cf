"""Shared by the peers: whether a library is installed, its version, and the weights that were given to it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fpxbench.implementation import Support
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.weight import QuantizedWeight


def missing(module: str, package: str, device: str, needs_gpu: bool) -> Support | None:
    """Return why a peer cannot run here at all, with the command that installs it; None if it can."""
    if importlib.util.find_spec(module) is None:
        return Support.no(f"needs {package}: pip install 'fpxbench[peers]'", missing=True)
    if needs_gpu and device == "cpu":
        return Support.no(f"{package} multiplies on CUDA devices only", missing=True)
    return None


def library(package: str) -> str | None:
    """Return ``package version``, as records carry it; None if it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


class GivenWeights:
    """Codes and scales as given to a library, for one whose stored bytes cannot be read back.

    They are kept in host memory, outside PyTorch, so that they do not count as a copy of the weight on the device.
    """

    def __init__(self) -> None:
        self._given: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def keep(self, weight: QuantizedWeight, codes: Tensor, scales: Scales) -> None:
        self._given[weight.packed] = codes.cpu().numpy().copy(), scales      # not a view of a tensor

    def decoded(self, weight: QuantizedWeight) -> Tensor:
        """Return the weight that was given, fp32 [N, K]. Raise KeyError for a weight that was not kept."""
        codes, scales = self._given[weight.packed]
        return weight.scheme.dequantize(torch.from_numpy(np.asarray(codes)).to(weight.device), scales)
