"""Draw each expert's number of rows, according to a case's routing."""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.records.case import Case, Routing


def rows_per_expert(case: Case, seed: int, purpose: object) -> Tensor:
    """Return each expert's number of rows for one purpose, int64 [E]; they add up to ``case.rows``.

    A token goes to `experts_per_token` different experts; under `Routing.ONE`, one expert has all rows. Each purpose
    has its own routing.
    """
    rng = inputs.generator(seed, "routing", purpose, case.m, case.experts, case.routing)
    likelihood = torch.ones(case.experts)
    if case.routing is Routing.ONE:
        chosen = int(torch.randint(case.experts, (1,), generator=rng))
        return torch.nn.functional.one_hot(torch.tensor(chosen), case.experts) * case.rows
    if case.routing is Routing.SKEWED:
        likelihood = 1 / (torch.randperm(case.experts, generator=rng) + 1.0)
    if case.routing is Routing.EMPTY:
        likelihood[empty_experts(case)] = 0
    if not case.m:
        return torch.zeros(case.experts, dtype=torch.int64)
    chosen_experts = torch.multinomial(likelihood.expand(case.m, -1), case.experts_per_token, generator=rng)
    return torch.bincount(chosen_experts.reshape(-1), minlength=case.experts)


def empty_experts(case: Case) -> list[int]:
    """Return the experts without tokens under `Routing.EMPTY`: the first, the last and the middle one, but only as many
    as leave `experts_per_token` others."""
    candidates = dict.fromkeys((0, case.experts - 1, case.experts // 2))
    return list(candidates)[:case.experts - case.experts_per_token]
