"""Diagnose a wrong grouped product: which expert's weight multiplied each row?

Each row is compared with its products by every expert's weight. If every wrong row is right for another expert, known
rules are tried: shifted boundaries, exchanged experts, experts without rows not counted. Otherwise one expert's product
is diagnosed like a product of a single weight (`fpxbench.diagnosis.products`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fpxbench.checking import contract
from fpxbench.checking.examination import Examination
from fpxbench.checking.expert_calls import routed_to_all, wrong_with_none_empty
from fpxbench.checking.expert_operands import ExpertOperands, OneOfExperts
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.diagnosis import Diagnosis
from fpxbench.diagnosis.products import diagnose_product
from fpxbench.implementation import Implementation
from fpxbench.records.kinds import Kind

MOST_OUTPUTS = 64
"""Number of output columns to compare rows in: more than enough to tell experts apart."""
MOST_ROWS_OFF = 8
_ROUTINGS = 4
"""Number of further routings to draw if several rules explain one routing."""


def diagnose_experts(examination: Examination, inner: Implementation,
                     prepare_one: Callable[[Implementation, int], Operands], expert: int | None = None,
                     columns: Iterable[int] = ()) -> Diagnosis:
    """Diagnose the grouped product of the operands' last draw.

    inner : the implementation whose grouped product is `examination.implementation`
    prepare_one : (implementation, expert) -> operands of that expert's weight [N, K] alone
    expert, columns : where a single weight is known to be misread
    """
    operands = examination.operands
    assert isinstance(operands, ExpertOperands)
    for rows in (routed_to_all, ExpertOperands.drawn_again):
        seen = _Seen(examination, rows(operands))
        found = seen.by_a_rule(examination) if seen.explained else seen.partly_by_a_rule()
        if found is not None:
            return found
        if bool(seen.wrong.any()):
            break
    empty = operands.empty
    if empty and wrong_with_none_empty(examination) is None:
        return Diagnosis(
            Kind.EMPTY_EXPERT,
            f"{int(seen.wrong.sum())} of {len(seen.rows)} rows are wrong where {len(empty)} of"
            f" {operands.case.experts} experts have no rows (expert {empty[0]} the first), and every row is right where"
            " all have some", {"empty_experts": empty[:32], "rows_wrong": int(seen.wrong.sum())})
    if (found := _wrong_in_large_numbers(examination, seen)) is not None:
        return found
    if expert is None:
        expert = int(seen.own[seen.wrong][0]) if bool(seen.wrong.any()) else 0
    alone = OneOfExperts(inner, operands.case.experts, expert)
    found = diagnose_product(alone, prepare_one(alone, expert), columns)
    return replace(found, message=f"with all rows at expert {expert}: {found.message}",
                   evidence=found.evidence | {"expert": expert})


def _wrong_in_large_numbers(examination: Examination, seen: _Seen) -> Diagnosis | None:
    """Return the diagnosis if rows of an expert are wrong, but right if it has only two of them; else None."""
    operands = examination.operands
    assert isinstance(operands, ExpertOperands)
    if not bool(seen.wrong.any()):
        return None
    expert = int(seen.own[seen.wrong][0])
    of_expert = seen.own == expert
    count, two = int(of_expert.sum()), seen.x[seen.wrong & of_expert][:2]
    if count <= 2:
        return None
    counts = [2] * operands.case.experts
    counts[expert] = len(two)
    x, at = routed_to_all(operands, counts), 2 * expert
    x[at:at + len(two)] = two
    if bool(_Seen(examination, x).wrong.any()):
        return None
    return Diagnosis(
        Kind.M_DEPENDENT, f"rows of expert {expert} are wrong where it has {count} rows, and right where it has"
        f" {len(two)} of them", seen.evidence | {"expert": expert, "rows_of_expert": count})


class _Seen:
    """The experts whose weights explain each row of one grouped product.

    x : the rows, [T, K]
    own : the expert of each row, int64 [T]
    met : whether a row is right for an expert's weight, bool [E, T]; a row of zeros is right for all
    wrong : rows that are not right for their own expert, bool [T]
    """

    def __init__(self, examination: Examination, x: Tensor) -> None:
        operands, product = examination.operands, examination.implementation
        assert isinstance(operands, ExpertOperands)
        self.operands = operands
        y = contract.checked_matmul(product, x, operands.weight, operands.device)
        self.x = x
        self.rows = torch.arange(len(x), device=y.device)
        self.own = self._owners(operands.ends)
        n = operands.case.n
        outputs = torch.linspace(0, n - 1, min(n, MOST_OUTPUTS)).round().long().unique().to(y.device)
        references = [operands.expert_reference(x, expert, product, outputs) for expert in range(operands.case.experts)]
        self.met = torch.stack([((y[:, outputs].double() - each.product).abs() <= each.tolerance).all(dim=1)
                                for each in references])
        self.wrong = ~self.met[self.own, self.rows]
        self.others = self.met[:, self.wrong].any(dim=0)
        self.evidence = {"rows_wrong": int(self.wrong.sum()), "rows": len(x)}

    def _owners(self, ends: list[int] | Tensor) -> Tensor:
        """Return each row's expert, int64 [T], if the experts' rows have these ends."""
        ends = torch.as_tensor(ends, device=self.rows.device).clamp(0, len(self.rows))
        return torch.searchsorted(ends, self.rows, right=True).clamp(max=len(ends) - 1)

    def _explains(self, taken: Tensor) -> bool:
        """Return whether every row is right for the weight of its expert in `taken` [T]."""
        return bool(self.met[taken, self.rows].all())

    @property
    def explained(self) -> bool:
        """Whether some rows are wrong, and each of them is right for another expert."""
        return bool(self.wrong.any()) and bool(self.others.all())

    def by_a_rule(self, examination: Examination) -> Diagnosis:
        """Return the rule by which rows meet other experts' weights, given that each row meets one.

        Two rules may explain one routing, such as uncounted experts and rows that begin one late; other routings tell
        them apart.
        """
        found = self.rules()
        _, m, routing = self.operands.drawn
        for number in range(_ROUTINGS if len(found) > 1 else 0):
            other = _Seen(examination, self.operands.activation(("rule", number), m + number // 2, routing))
            kinds = {each.kind for each in other.rules()} if other.explained else set()
            found = [each for each in found if each.kind in kinds] or found
        if len(found) > 1:
            return Diagnosis(Kind.EXPERT_MISTAKEN, "cannot tell: " + "; or ".join(each.message for each in found),
                             self.evidence | {"fitting": [str(each.kind) for each in found]})
        message = self._exchanged() or (f"{int(self.wrong.sum())} of {len(self.rows)} rows meet the weight of another"
                                        " expert, by no rule that is known")
        return found[0] if found else Diagnosis(Kind.EXPERT_MISTAKEN, message, self.evidence)

    def rules(self) -> list[Diagnosis]:
        """Return each known rule that explains every row."""
        known = (self._boundaries(), self._earlier_routing(), self._empty_not_counted())
        return [found for found in known if found is not None]

    def partly_by_a_rule(self) -> Diagnosis | None:
        """Return which experts are exchanged while other rows meet no expert's weight; None if none are."""
        exchanged = self._exchanged() if bool(self.others.any()) else None
        if exchanged is None:
            return None
        return Diagnosis(Kind.EXPERT_MISTAKEN,
                         f"{exchanged}; {int((~self.others).sum())} rows are those of no expert", self.evidence)

    def _boundaries(self) -> Diagnosis | None:
        for off in (sign * size for size in range(1, MOST_ROWS_OFF + 1) for sign in (1, -1)):
            taken = self._owners(torch.tensor(self.operands.ends[:-1] + [len(self.rows) - off]) + off)
            if self._explains(taken):
                row = int(self.wrong.nonzero()[0])
                return Diagnosis(
                    Kind.EXPERT_BOUNDARY,
                    f"each expert's rows begin and end {abs(off)} row{'s' if abs(off) > 1 else ''}"
                    f" {'late' if off > 0 else 'early'}: row {row}, which is expert {int(self.own[row])}'s, meets the"
                    f" weight of expert {int(taken[row])}", self.evidence | {"rows_off": off})
        return None

    def _earlier_routing(self) -> Diagnosis | None:
        for ends in self.operands.routed_before:
            if ends[-1] == len(self.rows) and self._explains(self._owners(ends)):
                return Diagnosis(
                    Kind.FROZEN_INPUT,
                    f"rows are spread over experts as in an earlier call: {int(self.wrong.sum())} of {len(self.rows)}"
                    " meet the weight of the expert that they belonged to then", self.evidence)
        return None

    def _empty_not_counted(self) -> Diagnosis | None:
        busy, count = [expert for expert, _, _ in self.operands.groups], self.operands.case.experts
        for name, first in (("first", 0), ("last", count - len(busy))):
            taken = self.own.clone()
            for number, expert in enumerate(busy):
                taken[self.own == expert] = first + number
            if len(busy) < count and self._explains(taken):
                return Diagnosis(
                    Kind.EMPTY_EXPERT,
                    f"experts without rows are not counted: the {len(busy)} with rows meet the weights of the {name}"
                    f" {len(busy)} experts, in order", self.evidence | {"empty_experts": self.operands.empty[:32]})
        return None

    def _exchanged(self) -> str | None:
        """Return which experts are exchanged, if all rows of an expert meet the same other one; else None."""
        pairs = []
        for expert in self.own[self.wrong].unique().tolist():
            if bool((self.met[expert] & (self.own == expert)).any()):
                return None         # some of its rows are right
            alike = self.met[:, self.own == expert].all(dim=1)
            if bool(alike.any()):
                pairs.append((expert, int(alike.nonzero()[0])))
        if not pairs:
            return None
        count = self.operands.case.experts
        off = {(taken - expert) % count for expert, taken in pairs}
        if len(off) == 1 and len(pairs) > 2:
            return f"the rows of expert e meet the weight of expert e + {off.pop()} (of {count}, around the end)"
        told = [f"the rows of expert {expert} meet the weight of expert {taken}" for expert, taken in pairs[:4]]
        return "; ".join(told + [f"and {len(pairs) - 4} more"] * (len(pairs) > 4))
