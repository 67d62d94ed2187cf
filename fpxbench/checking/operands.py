"""Hold what a case is checked on: its weight as given, as stored and as decoded, and fresh activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.reference import Reference, matmul_reference
from fpxbench.implementation import Implementation
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case


@dataclass
class Operands:
    """The operands of one case, on its device.

    original : the weight that was quantized, fp32 [N, K]
    weight : what the implementation stores
    decoded : what its codes and scales stand for, fp32 [N, K]
    rule : how the implementation quantizes its activation, as declared or found; None if it does not
    """

    case: Case
    device: str
    seed: int
    original: Tensor
    weight: QuantizedWeight
    decoded: Tensor
    rule: ActivationRule | None = None
    rule_not_probed: str | None = None
    """Why no probe showed that the implementation follows `rule`; its products alone are judged by it then."""
    activations: Tensor | None = None
    """Rows fp32 [R, K] from which activations are drawn; None: they are N(0, 1)."""

    def activation(self, purpose: object, m: int | None = None) -> Tensor:
        """Return the activation [M, K] of one purpose: the number of a checked call, or another use's name.

        `m` replaces the case's own number of tokens.
        """
        case = self.case if m is None else self.case.model_copy(update={"m": m})
        if self.activations is not None and case.k == self.activations.shape[1]:
            return inputs.drawn_activation(case, self.seed, purpose, self.activations)
        return inputs.make_activation(case, self.seed, purpose, self.device)

    def reference(self, x: Tensor, implementation: Implementation, bias: Tensor | None = None) -> Reference:
        """Return the exact product of x [M, K] with the decoded weight, and its tolerance."""
        return matmul_reference(
            x, self.decoded, quantized=scheme_named(self.case.scheme).quantized,
            rule=self.rule or implementation.activation_rule, accumulator=implementation.accumulator, bias=bias,
        )

    def dense(self) -> Tensor:
        """Return the weight before it was quantized, [N, K] in the activation's dtype."""
        return self.original.to(inputs.ACTIVATION_DTYPES[self.case.activation])

    def dense_product(self, x: Tensor, dense: Tensor) -> Tensor:
        """Return the 16-bit product that a time is compared with."""
        return F.linear(x, dense)

    @property
    def weights_read(self) -> int:
        """How many weights one call has to read."""
        return self.case.n * self.case.k

    @property
    def bytes_read(self) -> int:
        """How many stored bytes one call has to read."""
        return self.weight.nbytes

    @property
    def output_bytes(self) -> int:
        """Bytes of the outputs that one call holds, that of a part included where it is made by parts."""
        return 2 * self.case.rows * self.case.n

    @property
    def products(self) -> int:
        """How many products one call consists of, each a kernel if nothing goes to memory in between."""
        return 1
