"""The verdict on a case (status, kind, evidence), and how a failure's message or exit code determines it."""

from __future__ import annotations

import re
import signal as signals
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from fpxbench.records.compiler_messages import REFUSALS, find_message, without_source
from fpxbench.records.fields import Integer, Label, Log, Text, Tree
from fpxbench.records.kinds import Kind


class Status(StrEnum):
    """The outcome of a case, worst first, as reports are ordered.

    An entry gives its name in records, its sign, a predicate that follows an implementation's name in a sentence, and
    its meaning.
    """

    sign: str
    """A symbol, so that colour is never the only difference."""
    predicate: str
    meaning: str

    # With defaults, because type checkers treat `Status("ok")` as a call of this.
    def __new__(cls, name: str, sign: str = "", predicate: str = "", meaning: str = "") -> Status:
        status = str.__new__(cls, name)
        status._value_ = name
        status.sign, status.predicate, status.meaning = sign, predicate, meaning
        return status

    CRASH = ("crash", "☠", "crashes", "The process ended: by a signal, an exit, or an abort in LLVM.")
    WRONG = ("wrong", "✗", "gives wrong results", "Finite, but outside the tolerance.")
    NONFINITE = ("nonfinite", "∞", "gives NaN or infinity", "NaN or infinity where the exact product is finite.")
    TIMEOUT = ("timeout", "◔", "exceeds the time limit", "Still running at the time limit, however much it printed.")
    OOM = ("oom", "▲", "runs out of memory", "Used more memory than the limit, or an allocation failed.")
    ERROR = ("error", "!", "raises an error", "Raised an exception.")
    MISSING = ("missing", "?", "is missing something", "A dependency or a device is not available.")
    UNSUPPORTED = ("unsupported", "–", "refuses", "Refused with a reason, by `supports` or by the compiler.")
    OK = ("ok", "✓", "is right", "Within the tolerance on every check. Only such a case has a time.")


BY_SEVERITY = tuple(Status)
SEVERITY = {status: place for place, status in enumerate(BY_SEVERITY)}

BROKEN = frozenset({Status.CRASH, Status.WRONG, Status.NONFINITE, Status.TIMEOUT, Status.OOM, Status.ERROR})
"""Statuses of failures, as opposed to refusals and missing dependencies."""

SIGNS = {status: status.sign for status in Status}


class Verdict(BaseModel):
    """A status and the evidence for it."""

    model_config = ConfigDict(extra="ignore")

    status: Status
    kind: Kind | None = None
    summary: Text = ""
    """One sentence."""
    evidence: Tree = Field(default_factory=dict)
    signal: Label | None = None
    """``SIGSEGV``, … if a signal ended the process."""
    exit_code: Integer | None = None
    log_tail: Log = ""
    """The last 4 kB of stdout and stderr, including native code's."""

    @property
    def headline(self) -> str:
        return f"{self.status}" + (f" ({self.kind})" if self.kind else "")


_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError|std::bad_alloc")


def classify_exception(type_name: str, message: str, log_tail: str) -> Verdict:
    """Return the verdict on a case that raised."""
    full = f"{type_name}: {without_source(message)}".strip()
    first_line = next((line.strip() for line in full.splitlines() if line.strip()), type_name)[:400]
    if type_name in ("MemoryError", "OutOfMemoryError") or _OUT_OF_MEMORY.search(message):
        return Verdict(status=Status.OOM, summary=f"ran out of memory: {first_line}", log_tail=log_tail)
    if type_name in ("ModuleNotFoundError", "ImportError"):
        return Verdict(status=Status.MISSING, summary=first_line, log_tail=log_tail)
    known = find_message(message) or find_message(log_tail)
    if known is None and type_name == "NotImplementedError":
        return Verdict(status=Status.UNSUPPORTED, summary=first_line, log_tail=log_tail)
    if known is None:
        return Verdict(status=Status.ERROR, summary=f"raised {first_line}", log_tail=log_tail)
    if known.kind in REFUSALS:
        return Verdict(status=Status.UNSUPPORTED, kind=known.kind, summary=f"refused: {known.text}", log_tail=log_tail)
    return Verdict(status=Status.ERROR, kind=known.kind, summary=f"raised {type_name}: {known.text}", log_tail=log_tail)


def with_log(verdict: Verdict, log_tail: str) -> Verdict:
    """Return `verdict` with its log; an error without a known cause takes the cause that native code printed there."""
    open_question = verdict.status is Status.ERROR and verdict.kind in (None, Kind.PASS_FAILED)
    known = find_message(log_tail) if open_question else None
    if known is None:
        return verdict.model_copy(update={"log_tail": log_tail})
    refused = known.kind in REFUSALS
    return verdict.model_copy(update={
        "status": Status.UNSUPPORTED if refused else Status.ERROR, "kind": known.kind, "log_tail": log_tail,
        "summary": f"{'refused' if refused else 'raised, after saying'}: {known.text}",
        "evidence": {"raised": verdict.summary, **verdict.evidence},
    })


def classify_death(exit_code: int, log_tail: str) -> Verdict:
    """Return the verdict on a case whose process ended, by exiting or by a signal (negative, as in subprocess)."""
    signal = None
    if exit_code < 0:
        try:
            signal = signals.Signals(-exit_code).name
        except ValueError:
            signal = f"signal {-exit_code}"
    known = find_message(log_tail)
    if known is None and signal == "SIGABRT" and _OUT_OF_MEMORY.search(log_tail):
        return Verdict(status=Status.OOM, summary="ran out of memory and aborted", signal=signal, exit_code=exit_code,
                       log_tail=log_tail)
    how = f"died by {signal}" if signal else f"ended its process with exit code {exit_code}"
    return Verdict(status=Status.CRASH, kind=known.kind if known else None, signal=signal, exit_code=exit_code,
                   summary=f"{how}: {known.text}" if known else how, log_tail=log_tail)
