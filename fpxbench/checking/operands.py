"""Hold what a case is checked on: its weight as given, as stored and as decoded, and fresh activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.reference import Reference, matmul_reference
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case


@dataclass
class Operands:
    """The operands of one case, on its device.

    original : the weight that was quantized, fp32 [N, K]
    weight : what the implementation stores
    decoded : what its codes and scales stand for, fp32 [N, K]
    """

    case: Case
    device: str
    seed: int
    original: Tensor
    weight: QuantizedWeight
    decoded: Tensor

    def activation(self, purpose: object) -> Tensor:
        """Return the activation [M, K] of one purpose: the number of a checked call, or another use's name."""
        return inputs.make_activation(self.case, self.seed, purpose, self.device)

    def reference(self, x: Tensor, implementation: Implementation) -> Reference:
        """Return the exact product of x [M, K] with the decoded weight, and its tolerance."""
        return matmul_reference(
            x, self.decoded, quantized=scheme_named(self.case.scheme).quantized,
            activation_format=implementation.activation_format,
        )
