"""A known fault in reading a stored weight: a wrong choice in one step of reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from fpxbench.records.kinds import Kind

STEPS = ("codes", "table", "scales", "places", "blocks")


@dataclass(frozen=True)
class DecodeFault:
    """One fault in one step of reading a weight.

    `apply` returns the wrong input of the step in place of the right one. ``codes``: (codes [N, K_pad], columns [C]) ->
    codes [N, C]; ``table``: table [2**bits] -> table; ``scales``: (block scales [N or 1, G], tensor scale [1]) -> both;
    ``places``: scale grid [N or 1, G] -> grid; ``blocks``: (scale grid [N or 1, G], columns [C], rows [R]) -> factors
    [R or 1, C] of those weights.
    """

    step: str
    kind: Kind
    message: str
    apply: Callable
    replaces: bool = False
    """Whether `apply` ignores its input (another format's table): the fault then comes first in its step."""
    claim: Callable | None = None
    """Table [2**bits] -> whether the message holds for it, after all faults of this step."""


def table_claims_hold(faults: Iterable[object], table: Tensor) -> bool:
    """Return whether the message of every decode fault among `faults` holds for `table` [2**bits]."""
    return all(fault.claim(table) for fault in faults if isinstance(fault, DecodeFault) and fault.claim is not None)
