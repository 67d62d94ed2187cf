"""The record of one scheme in an encoder's ranking (`fpxbench rank`). Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, Field

from fpxbench.model.generate_record import Estimate, ModelDescription
from fpxbench.records.case import SchemePart
from fpxbench.records.fields import Count, Finite, Label, Moment, Rate, Text
from fpxbench.records.record import Build, Machine, RecordPart, StoredRecord, now

SHIPPED_SENTENCES = Path(__file__).parent / "texts" / "sentences.txt"


class RankingSettings(BaseModel):
    """The encoder, the schemes and the sentences of a ranking."""

    model: str
    schemes: list[str] = Field(default_factory=list)
    sentences: Path = SHIPPED_SENTENCES


class SchemeRank(RecordPart):
    """The distance of an encoder's embeddings from the unquantized ones under one scheme, weights decoded exactly."""

    scheme: SchemePart
    bits_per_weight: Rate
    """Of the quantized weights, scales included."""
    distance: Estimate
    """Mean of 1 - cosine between a sentence's embedding and the unquantized model's."""
    worst: Finite
    """The largest of these distances."""
    worst_sentence: Text
    neighbours_kept: Estimate
    """Share of each sentence's 10 nearest other sentences that stay among them."""
    ahead: bool = False
    """Whether the next scheme's mean distance is larger with 97.5% confidence, paired by sentence."""


class Ranking(BaseModel):
    """A whole ranking, nearest scheme first."""

    model: ModelDescription
    sentences: Count
    text: Label
    weights: Count
    """How many weights each scheme quantizes."""
    schemes: list[SchemeRank]


class RankingRecord(StoredRecord):
    """One scheme of one ranking."""

    FOLDER: ClassVar[str] = "rankings"

    started_at: Moment = Field(default_factory=now)
    model: ModelDescription
    text: Label
    """The name of the sentences' file."""
    sentences: Count
    weights: Count
    rank: SchemeRank
    build: Build
    machine: Machine

    @property
    def id(self) -> str:
        return f"{self.model.slug}/{self.text}/{self.rank.scheme}"
