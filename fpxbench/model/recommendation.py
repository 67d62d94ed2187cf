"""Choose a scheme for each layer: the Pareto front, and mixed precision under a budget of bits. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import BaseModel, Field

from fpxbench.model.generate_record import Estimate, GenerationRecord, ModelDescription
from fpxbench.records.fields import Moment
from fpxbench.records.record import Build, Flag, Machine, StoredRecord, now
from fpxbench.records.verdict import Status


class Uniform(BaseModel):
    """A model whose quantized weights all have one scheme."""

    scheme: str
    bits: float
    """Stored bits per quantized weight, scales included."""
    kl: Estimate


class Mixed(BaseModel):
    """A measured mixed precision by layer, and uniform schemes on the same tokens."""

    budget_bits: float
    bits: float
    kl: Estimate
    schemes: dict[str, str]
    """Layer -> scheme."""
    uniform: list[Uniform]
    tokens: int

    @property
    def rival(self) -> Uniform | None:
        """The uniform scheme with the smallest KL divergence within the budget; None if none is within it."""
        return min((one for one in self.uniform if one.bits <= self.budget_bits), key=lambda one: one.kl.value,
                   default=None)


class MixedRecord(StoredRecord):
    """One mixed precision of a model, as stored."""

    FOLDER: ClassVar[str] = "mixed"

    started_at: Moment = Field(default_factory=now)
    model: ModelDescription
    mixed: Mixed
    build: Build
    machine: Machine

    @property
    def id(self) -> str:
        return f"{self.model.slug}/l{self.model.layers}/{self.mixed.budget_bits:g}"


def pareto_front(records: Sequence[GenerationRecord]) -> list[GenerationRecord]:
    """Return the right rows on the Pareto front of KL divergence, bytes per step and tokens per second.

    Sorted by KL divergence. A speed above the roofline counts as unmeasured.
    """
    right = [record for record in records if record.verdict.status is Status.OK and record.traffic is not None]
    costs = {record.id: _cost(record) for record in right}
    front = [record for record in right if not any(
        costs[other.id] != costs[record.id]
        and all(theirs <= own for theirs, own in zip(costs[other.id], costs[record.id], strict=True))
        for other in right)]
    return sorted(front, key=lambda record: costs[record.id])


def _cost(record: GenerationRecord) -> tuple[float, float, float]:
    """Return (KL divergence, bytes, seconds per token), each to be minimized; the unquantized model's KL is 0."""
    quality = record.quality[0] if record.quality else None
    kl = quality.kl.mean.value if quality and quality.kl else 0.0
    timed = record.speed is not None and Flag.OVER_ROOFLINE not in record.flags
    return kl, record.traffic.step_bytes, 1 / record.speed.tokens_per_s if timed else float("inf")


def check_budget(bits: Mapping[str, Mapping[str, float]], budget: float, weights: int = 1) -> None:
    """Raise ValueError for a budget below the fewest possible bits; the message divides both by `weights`."""
    fewest = sum(min(options.values()) for options in bits.values())
    if budget < fewest:
        raise ValueError(f"a budget of {budget / weights:.4g} bits is below the {fewest / weights:.4g} that the"
                         " smallest schemes take: raise it, or name smaller schemes")


def allocate(kl: Mapping[str, Mapping[str, float]], bits: Mapping[str, Mapping[str, float]], budget: float,
             ) -> dict[str, str]:
    """Return a scheme for each layer within a total `budget` of bits.

    kl : layer -> scheme -> the KL divergence with this layer alone quantized
    bits : layer -> scheme -> the layer's bits

    Greedy: every layer begins with its scheme of smallest KL divergence, and each step takes the change that adds the
    least KL per bit saved. Raise ValueError for a budget below the fewest possible bits.
    """
    check_budget(bits, budget)
    chosen = {layer: min(options, key=lambda scheme: (options[scheme], bits[layer][scheme]))
              for layer, options in kl.items()}
    total = sum(bits[layer][scheme] for layer, scheme in chosen.items())
    while total > budget:
        steps = [
            ((kl[layer][scheme] - kl[layer][now]) / (bits[layer][now] - bits[layer][scheme]), layer, scheme)
            for layer, now in chosen.items() for scheme in kl[layer] if bits[layer][scheme] < bits[layer][now]]
        _, layer, scheme = min(steps)
        total += bits[layer][scheme] - bits[layer][chosen[layer]]
        chosen[layer] = scheme
    return chosen
