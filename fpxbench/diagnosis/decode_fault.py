"""A known fault in reading a stored weight: another choice in one of the steps of reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from fpxbench.records.kinds import Kind

STEPS = ("codes", "table", "scales", "places", "blocks")


@dataclass(frozen=True)
class DecodeFault:
    """One fault in one step of reading a weight.

    `apply` depends on the step: ``codes``: (codes [N, K_pad], columns [C]) -> the codes [N, C] that are read instead;
    ``table``: (table [2**bits]) -> the table read by instead; ``scales``: (block scales [N or 1, G], tensor scale [1])
    -> those that are multiplied by instead; ``places``: (scale grid [N or 1, G]) -> the grid that is read instead;
    ``blocks``: (scale grid [N or 1, G], columns [C], rows [R]) -> the factors [R or 1, C] that those weights meet
    instead.
    """

    step: str
    kind: Kind
    message: str
    apply: Callable
    replaces: bool = False
    """Ignores its input (another format's table), so it comes first in its step."""
    claim: Callable | None = None
    """(table) -> bool: whether the message is true of the table [2**bits] that results, other faults of this step
    included."""


def table_claims_hold(faults: Iterable[object], table: Tensor) -> bool:
    """Return whether the message of every decode fault among `faults` is true of `table` [2**bits]."""
    return all(fault.claim(table) for fault in faults if isinstance(fault, DecodeFault) and fault.claim is not None)
