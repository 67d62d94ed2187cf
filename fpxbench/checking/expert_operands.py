"""The operands of a case of experts: stacked weights, and activation rows with their routing.

`GroupedProduct` adapts a grouped product to `matmul`, so that every check of a call applies to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpxbench.checking import grouped_product, inputs, routing
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import Reference, matmul_reference
from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.experts import QuantizedExperts, rows_of_experts
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case, Routing
from fpxbench.records.kinds import Kind

_KEPT_DRAWS = 4


def expert_weight(case: Case, seed: int, expert: int, device: str) -> Tensor:
    """Return the weight of one expert of `case` before it is quantized, fp32 [N, K]."""
    return inputs.make_weight(case.of_one_expert, inputs.derived_seed(seed, "expert", expert), device)


@dataclass
class ExpertOperands(Operands):
    """The operands of one case of experts, on its device.

    original, decoded : those of expert 0, [N, K]; others are made on demand, since all may be many GB
    weight : the stored weights, [E, N, K]
    decode : an expert's stored weight -> its numbers, fp32 [N, K]
    from_file : whether there are only stored weights, without originals
    offsets : the end of each expert's rows, int32 [E], on the device: a buffer that `activation` fills
    ends : the same numbers on the host, as drawn
    drawn : the last arguments of `activation`: the purpose, M and the routing
    routed_before : the ends of experts' rows in the first and the latest earlier draws
    """

    weight: QuantizedExperts
    decode: Callable[[QuantizedWeight], Tensor] = QuantizedWeight.dequantize
    from_file: bool = False
    offsets: Tensor = field(init=False)
    ends: list[int] = field(init=False)
    drawn: tuple[object, int, Routing] = field(init=False)
    routed_before: list[list[int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.offsets = torch.zeros(self.case.experts, dtype=torch.int32, device=self.device)
        self.drawn = ("", 0, self.case.routing)
        self.ends = [0] * self.case.experts

    def original_of(self, expert: int) -> Tensor:
        """Return one expert's original weight, fp32 [N, K]; from a file, its decoded weight."""
        if self.from_file:
            return self.decode(self.weight.experts[expert]).float()
        return expert_weight(self.case, self.seed, expert, self.device)

    def activation(self, purpose: object, m: int | None = None, routing_: Routing | None = None) -> Tensor:
        """Return the rows [T, K] of M tokens for one purpose, and route them: fills `offsets` with a new draw."""
        self.drawn = (purpose, self.case.m if m is None else m, routing_ or self.case.routing)
        case = self.case.model_copy(update={"m": self.drawn[1], "routing": self.drawn[2]})
        self._route(routing.rows_per_expert(case, self.seed, purpose))
        return inputs.make_activation(case.of_one_expert.model_copy(update={"m": case.rows}), self.seed, purpose,
                                      self.device)

    def drawn_again(self) -> Tensor:
        """Return the rows of the last draw again, with the same routing."""
        return self.activation(*self.drawn)

    def route(self, counts: list[int]) -> None:
        """Give each expert its number of rows in `counts`."""
        self._route(torch.tensor(counts))

    def _route(self, counts: Tensor) -> None:
        if self.ends not in self.routed_before:
            self.routed_before = [*self.routed_before[:_KEPT_DRAWS], *self.routed_before[_KEPT_DRAWS:][-_KEPT_DRAWS:],
                                  self.ends]
        self.offsets.copy_(counts.cumsum(0))
        self.ends = self.offsets.tolist()

    @property
    def groups(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of each expert that has rows."""
        return rows_of_experts(self.ends)

    @property
    def empty(self) -> list[int]:
        """Experts without rows."""
        busy = {expert for expert, _, _ in self.groups}
        return [expert for expert in range(self.case.experts) if expert not in busy]

    def check_offsets(self) -> None:
        """Raise ContractViolation if a call changed the offsets."""
        if self.offsets.tolist() != self.ends:
            raise ContractViolation(Kind.INPUT_MODIFIED, "grouped_matmul changed its offsets in place")

    def reference(self, x: Tensor, implementation: Implementation, bias: Tensor | None = None) -> Reference:
        """Return the exact product of each row of x [T, K] with its expert's decoded weight, and its tolerance."""
        parts = [self.expert_reference(x[first:last], expert, implementation) for expert, first, last in self.groups]
        if not parts:
            empty = torch.zeros(0, self.case.n, dtype=torch.float64, device=self.device)
            return Reference(empty, empty, empty)
        return Reference(*(torch.cat([getattr(part, name) for part in parts])
                           for name in ("product", "tolerance", "variance")))

    def expert_reference(self, x: Tensor, expert: int, implementation: Implementation,
                         outputs: Tensor | None = None) -> Reference:
        """Return the exact product of x [T, K] with one expert's decoded weight, or with its rows `outputs`."""
        decoded = self.decode(self.weight.experts[expert]).float()
        return matmul_reference(
            x, decoded if outputs is None else decoded[outputs], quantized=scheme_named(self.case.scheme).quantized,
            rule=self.rule or implementation.activation_rule, accumulator=implementation.accumulator)

    def dense(self) -> Tensor:
        """Return the original weights, [E, N, K] in the activation's dtype."""
        dtype = inputs.ACTIVATION_DTYPES[self.case.activation]
        return torch.stack([self.original_of(expert).to(dtype) for expert in range(self.case.experts)])

    def dense_product(self, x: Tensor, dense: Tensor) -> Tensor:
        """Return the 16-bit grouped product of the same rows."""
        return grouped_product.grouped_product(x, dense, self.offsets)

    @property
    def weights_read(self) -> int:
        """Number of weights of the experts that have rows."""
        return len(self.groups) * self.case.n * self.case.k

    @property
    def bytes_read(self) -> int:
        """Stored bytes of the experts that have rows."""
        return self.weight.nbytes * len(self.groups) // self.case.experts

    @property
    def output_bytes(self) -> int:
        largest = max((last - first for _, first, last in self.groups), default=0)
        return 2 * (self.case.rows + largest) * self.case.n

    @property
    def products(self) -> int:
        return max(1, len(self.groups))


class GroupedProduct(Implementation):
    """An implementation's grouped product under the routing of `operands`, as a `matmul` of all rows."""

    def __init__(self, implementation: Implementation, operands: ExpertOperands) -> None:
        _judged_as(self, implementation)
        self.inner, self._operands = implementation, operands

    def matmul(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        assert isinstance(weight, QuantizedExperts)
        return self.inner.grouped_matmul(x, weight, self._operands.offsets)

    def slow(self, device: str) -> bool:
        return self.inner.slow(device)


class OneOfExperts(Implementation):
    """An implementation's grouped product as a `matmul` by one weight: all of `experts` have it, and all rows go to
    `expert`."""

    def __init__(self, implementation: Implementation, experts: int, expert: int) -> None:
        _judged_as(self, implementation)
        self.inner, self.count, self.expert = implementation, experts, expert
        self._stacked: tuple[QuantizedWeight | None, QuantizedExperts | None] = (None, None)

    def supports(self, scheme: Scheme, device: str) -> Support:
        return self.inner.supports(scheme, device)

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        return self.inner.quantize(weight, scheme)

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        return self.inner.dequantize(weight)

    def matmul(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ends = [0] * self.expert + [len(rows)] * (self.count - self.expert)
        if self._stacked[0] is not weight:
            self._stacked = weight, QuantizedExperts.stack([weight] * self.count)
        offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
        return self.inner.grouped_matmul(rows, self._stacked[1], offsets).reshape(*x.shape[:-1], weight.shape[0])

    def slow(self, device: str) -> bool:
        return self.inner.slow(device)


def _judged_as(one: Implementation, other: Implementation) -> None:
    """Make `one` be judged like `other`: by the same activation rule, scale rule and accumulator."""
    for name in ("activation_format", "activation_rule", "quantizes_activations", "scale_rule", "accumulator"):
        setattr(one, name, getattr(other, name))
    one.name, one.layout = other.name, other.layout
