"""The operands of a case: its weight as given, as stored and as decoded, and fresh activations."""

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

    original : the weight before quantization, fp32 [N, K]
    weight : the stored weight
    decoded : the numbers of its codes and scales, fp32 [N, K]
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
    """Why `rule` could not be probed; only products are then judged by it."""
    activations: Tensor | None = None
    """Rows fp32 [R, K] to draw activations from; None: N(0, 1)."""

    def activation(self, purpose: object, m: int | None = None) -> Tensor:
        """Return the activation [M, K] for one purpose: the number of a checked call, or the name of another use.

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
        """Return the original weight, [N, K] in the activation's dtype."""
        return self.original.to(inputs.ACTIVATION_DTYPES[self.case.activation])

    def dense_product(self, x: Tensor, dense: Tensor) -> Tensor:
        """Return the 16-bit product, the baseline of timing."""
        return F.linear(x, dense)

    @property
    def weights_read(self) -> int:
        """Number of weights that one call has to read."""
        return self.case.n * self.case.k

    @property
    def bytes_read(self) -> int:
        """Number of stored bytes that one call has to read."""
        return self.weight.nbytes

    @property
    def output_bytes(self) -> int:
        """Bytes of the outputs that one call holds, including a partial output if it is computed in parts."""
        return 2 * self.case.rows * self.case.n

    @property
    def products(self) -> int:
        """Number of products in one call, each a single kernel if fused."""
        return 1
