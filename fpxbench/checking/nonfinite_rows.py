"""Check that NaN and infinity in one row of the activation stay in that row of the output."""

from __future__ import annotations

import math
from functools import partial

import torch

from fpxbench.checking import contract, poison
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import Reference, compare
from fpxbench.checking.wrong_output import judge
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

TOKENS = 4
_ROW = 1


def check_nonfinite_rows(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Return the verdict if NaN or infinity in one token changes the output of another; else None.

    Not checked if the activation has one scale for all tokens, which is then NaN for all.
    """
    if not bool(operands.decoded.isfinite().all()):
        return None
    rule = operands.rule
    scaling = None if rule is None else scheme_named(rule.scheme).scaling
    if scaling is not None and (scaling.block_rows is None or scaling.has_tensor_scale):
        return None
    for value in (math.nan, math.inf):
        x = operands.activation(f"a row with {value}", TOKENS)
        clean = x.clone()
        clean[_ROW] = 0
        expected = operands.reference(clean, implementation)
        again = partial(contract.watched_matmul, implementation, clean, operands.weight, operands.device, None)
        without = again(poison.NAN)
        comparison = compare(without.seen, expected)
        if not comparison.within:       # then it is not the NaN's doing
            return judge(again, without, comparison, expected, pattern=poison.NAN)
        x[_ROW, x.shape[1] // 3] = value
        y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
        others = torch.arange(TOKENS, device=y.device) != _ROW
        comparison = compare(y[others], Reference(expected.product[others], expected.tolerance[others]))
        if not comparison.within:
            return Verdict(status=Status.WRONG if comparison.finite else Status.NONFINITE, kind=Kind.NONFINITE_SPREADS,
                           evidence={"row": _ROW, "value": repr(value), "outside": comparison.outside},
                           summary=f"{value} in row {_ROW} of the activation changes other rows of the output: "
                                   f"{comparison.message()}")
    return None
