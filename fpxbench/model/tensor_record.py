"""The record of one operation on one quantized tensor class (`fpxbench tensor-check`). Imports no torch."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from fpxbench.records.fields import Label, Moment, Text
from fpxbench.records.record import Build, Machine, RecordPart, StoredRecord, now


class OperationOutcome(StrEnum):
    """The outcome of an operation: its name in records, its sign, its meaning."""

    sign: str
    meaning: str

    def __new__(cls, name: str, sign: str = "", meaning: str = "") -> OperationOutcome:
        outcome = str.__new__(cls, name)
        outcome._value_ = name
        outcome.sign, outcome.meaning = sign, meaning
        return outcome

    OK = ("ok", "✓", "right")
    WRONG = ("wrong", "✗", "differs from the same on the dequantized tensor")
    PLAIN = ("plain", "≈", "right, but the result is a plain tensor: the quantization is lost")
    REFUSED = ("refused", "–", "raises, and says that it is unsupported")
    ERROR = ("error", "!", "raises something else")
    CRASH = ("crash", "☠", "the process dies")
    MISSING = ("missing", "?", "the class's library is not installed")


class OperationResult(RecordPart):
    """One operation on one class."""

    tensor: Label
    library: Label | None = None
    """``torchao 0.18.0``; None: fpxbench's own, or not installed."""
    operation: Label
    needed_by: Label = ""
    outcome: OperationOutcome
    message: Text = ""


class TensorOperationRecord(StoredRecord):
    """One operation on one class, on one build."""

    FOLDER: ClassVar[str] = "tensors"

    started_at: Moment = Field(default_factory=now)
    result: OperationResult
    build: Build
    machine: Machine

    @property
    def id(self) -> str:
        return f"{self.result.tensor}/{self.result.operation}"
