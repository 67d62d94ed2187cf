"""The record of one conversion on one build and machine: one JSON line, with a schema version of its own."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from fpxbench.casts.conversion import Conversion
from fpxbench.records.fields import LARGEST_INTEGER, Count, Label, Moment, Seconds
from fpxbench.records.record import Build, Machine, RecordPart, StoredRecord, now
from fpxbench.records.verdict import Status, Verdict

RULES = 3
"""Incremented when inputs are added or the rules of conformance change: a run does not resume from records of other
rules."""
EXAMPLES = 3
"""How many examples a difference carries at most."""
EXACT_PRODUCT = "exact product"
"""`Behaviour.taken_as` of a conversion that casts the product before it is rounded to its dtype."""


class InputKind(StrEnum):
    """What is special about inputs that differ: the first that fits."""

    NAN = "nan"                             # NaN in, no NaN out
    NAN_PAYLOAD = "nan_payload"             # NaN in, another of the target's NaN codes out
    INFINITY = "infinity"
    OVERFLOW = "overflow"                   # finite, rounds past the largest finite number
    NEGATIVE_ZERO = "negative_zero"         # zero of the wrong sign
    UNROUNDED_PRODUCT = "unrounded_product"     # right for the exact product, which the source dtype would have rounded
    DOUBLE_ROUNDING = "double_rounding"     # what rounding to an intermediate dtype first gives
    TIE = "tie"                             # midway between two codes
    SUBNORMAL = "subnormal"                 # below the target's smallest normal number, the result not a neighbour
    ROUNDING = "rounding"                   # not a tie, and the result is the neighbour on the wrong side
    NO_SUCH_NUMBER = "no_such_number"       # zero or negative, which the target does not have
    CONSTANT = "constant"                   # of torch.finfo
    OTHER = "other"


class Example(RecordPart):
    """One input whose result differs: bits in hexadecimal, and the number that they stand for."""

    input: Annotated[str, Field(max_length=80)]
    input_value: Annotated[str, Field(max_length=80)]
    got: Annotated[str, Field(max_length=40)]
    got_value: Annotated[str, Field(max_length=40)]
    expected: Annotated[str, Field(max_length=40)]
    expected_value: Annotated[str, Field(max_length=40)]


class DifferingInputs(RecordPart):
    """Inputs of one kind whose result is not the fixed reference's."""

    kind: InputKind
    count: Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
    permitted: bool
    """Whether the target's standard leaves it open (docs/numerics.md)."""
    examples: Annotated[list[Example], Field(min_length=1, max_length=EXAMPLES)]


class Behaviour(RecordPart):
    """The behaviour of a conversion, recovered from its outputs. None: no input shows it."""

    rounding: Label | None = None
    """``nearest_even``, ``nearest_away``, ``toward_zero``, ``nearest_even via fp32``, …, or ``mixture``."""
    overflow: Label | None = None
    """Of finite values past the maximum: ``saturate``, ``infinity``, ``nan``, or ``mixture``."""
    infinity: Label | None = None
    """Of ±infinity: the same values."""
    nan: Label | None = None
    """``nan``, or what comes instead."""
    nan_codes: Annotated[list[Label], Field(max_length=16)] = Field(default_factory=list)
    """The NaN codes among the results, in hexadecimal; eight at most."""
    negative_zero: Label | None = None
    """``kept``, ``positive`` (the sign is dropped) or ``nan``."""
    subnormals: Label | None = None
    """``kept`` or ``flushed``."""
    taken_as: Label | None = None
    """Another reading of the inputs that explains every result: ``exact product`` (not rounded to its dtype before the
    cast), ``e4m3fn`` (read as another format)."""

    def aspects(self) -> dict[str, str]:
        """Return what is known, as text by aspect."""
        known = self.model_dump(exclude={"nan_codes"}, exclude_none=True)
        return known | ({"nan_codes": " ".join(self.nan_codes)} if self.nan_codes else {})


def unrounded_summary(inputs: int, differences: list[DifferingInputs]) -> str:
    """Return ``all 196,608 inputs; 390 of them only if the product is not rounded to its dtype``."""
    count = sum(one.count for one in differences if one.kind is InputKind.UNROUNDED_PRODUCT)
    return f"all {inputs:,} inputs" + (
        f"; {count:,} of them only if the product is not rounded to its dtype" if count else ""
    )


class CastResult(RecordPart):
    """The outcome of one conversion in a child process: its part of a record."""

    conversion: Conversion
    verdict: Verdict
    inputs: int = 0
    inputs_digest: str = ""
    differing: int | None = None
    behaviour: Behaviour = Behaviour()
    differences: list[DifferingInputs] = []


class CastRecord(StoredRecord):
    """One conversion on one build and one machine.

    The fixed reference is the exact value rounded to nearest even once (toward zero where that is asked for),
    saturated, NaN to NaN.
    """

    FOLDER: ClassVar[str] = "numerics"

    started_at: Moment = Field(default_factory=now)
    elapsed_s: Seconds | None = None
    rules: Annotated[int, Field(ge=0, le=10_000)] = RULES
    conversion: Conversion
    build: Build
    machine: Machine
    verdict: Verdict
    inputs: Count = 0
    """How many inputs were converted."""
    inputs_digest: Label = ""
    """SHA-256 of their bits, shortened; for all 2**32 of fp32, ``every fp32``."""
    differing: Count | None = None
    """Inputs whose result is not the fixed reference's, permitted ones included; two NaN codes do not differ. None: no
    result."""
    behaviour: Behaviour = Behaviour()
    differences: Annotated[list[DifferingInputs], Field(max_length=100)] = Field(default_factory=list)

    @property
    def id(self) -> str:
        return self.conversion.id

    @property
    def wrong(self) -> list[DifferingInputs]:
        """The differences that the target's standard does not permit."""
        return [difference for difference in self.differences if not difference.permitted]

    @model_validator(mode="wrap")
    @classmethod
    def _a_product_that_was_not_rounded_is_permitted(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """Read a record of the rules before version 3, under which it was wrong, by the current rules: inputs and
        outputs are the same."""
        record = read(data)
        if record.rules >= 3 or all(one.kind is not InputKind.UNROUNDED_PRODUCT for one in record.wrong):
            return record
        current = record.model_copy(update={"differences": [
            one.model_copy(update={"permitted": True}) if one.kind is InputKind.UNROUNDED_PRODUCT else one
            for one in record.differences]})
        if current.wrong or current.verdict.status is not Status.WRONG:
            return current
        summary = unrounded_summary(current.inputs, current.differences)
        return current.model_copy(update={"verdict": Verdict(status=Status.OK, summary=summary)})

    @model_validator(mode="after")
    def _verdict_follows_from_differences(self) -> Self:
        if self.verdict.status is Status.OK and (self.wrong or self.differing is None):
            raise ValueError("a conversion with differences that are not permitted, or without a result, is not ok")
        if self.verdict.status is Status.WRONG and not self.wrong:
            raise ValueError("a wrong conversion must have differences that are not permitted")
        return self
