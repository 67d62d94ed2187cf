"""Recover the maps of an activation's quantizer with the experiments that recover a weight's.

A quantized activation [M, K] is treated as a weight whose rows are tokens: it is "stored" by passing it to the
implementation, and read through a weight of ones.
"""

from __future__ import annotations

from torch import Tensor

from fpxbench.checking.activation_probe import ActivationProbe
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.maps import RecoveredMaps
from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.weight import QuantizedWeight

TOKENS, COLUMNS = 128, 512
"""Tiles of scales are 128 tokens high."""
FEW = 32, 256
"""The shape for a single scale: each value then takes a call."""
FEWEST_BLOCKS = 6
"""With fewer blocks along K, misplaced scales cannot be told apart."""


class QuantizerAsWeight(Implementation):
    """An activation's quantizer, as an implementation that stores weights in a private layout."""

    name = "activation"
    casts_weight = True

    def __init__(self, probe: ActivationProbe) -> None:
        self.probe = probe
        self._read: tuple[Tensor, Tensor] | None = None

    def supports(self, scheme: Scheme, device: str) -> Support:
        return Support.yes()

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        return QuantizedWeight.holding(weight.to(self.probe.dtype), scheme, (weight.shape[0], weight.shape[1]))

    def matmul(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        if self._read is None or self._read[0] is not weight.held:
            self._read = weight.held, self.probe.see(weight.held).seen
        read = self._read[1]
        if bool(((x != 0).sum(dim=1) <= 1).all()):      # one-hot: a product would spread an infinity as NaN
            return (read[:, x.abs().argmax(dim=1)].T * x.double().sum(dim=1, keepdim=True)).to(x.dtype)
        return (x.double() @ read.T).to(x.dtype)


def recover_activation(probe: ActivationProbe, rule: ActivationRule, seconds: float) -> RecoveredMaps | None:
    """Return the maps of codes, scales and positions by which activations are quantized under `rule`; None if they
    cannot be read. No experiment begins after `seconds`."""
    scaling = scheme_named(rule.scheme).scaling
    assert scaling is not None      # an activation's rule is quantized
    tokens, columns = FEW if scaling.block_rows is None else (TOKENS, COLUMNS)
    wide = probe.of_shape(tokens, max(columns, FEWEST_BLOCKS * (scaling.block or 0)))
    if wide is None:
        return None
    case = wide.case.model_copy(update={"scheme": rule.scheme, "n": wide.tokens, "m": wide.case.k})
    return RecoveredMaps(Bench(QuantizerAsWeight(wide), case, wide.device, wide.seed), seconds)
