"""What a case turned out to be: statuses, the closed list of mistakes, and how a failure's own words are classified."""

from __future__ import annotations

import re
import signal as signals
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from fpxbench.records.compiler_messages import REFUSALS, find_message, without_source
from fpxbench.records.fields import Integer, Label, Log, Text, Tree
from fpxbench.records.kinds import Kind


class Status(StrEnum):
    """Worst first: the order in which reports speak of them."""

    CRASH = "crash"              # a signal or an abort
    WRONG = "wrong"              # finite, outside the bound
    NONFINITE = "nonfinite"      # NaN or infinity where the reference is finite
    TIMEOUT = "timeout"
    OOM = "oom"
    ERROR = "error"              # raised
    MISSING = "missing"          # a dependency or a device is not there
    UNSUPPORTED = "unsupported"  # refused, with a reason
    OK = "ok"


BY_SEVERITY = tuple(Status)
SEVERITY = {status: place for place, status in enumerate(BY_SEVERITY)}

BROKEN = frozenset({Status.CRASH, Status.WRONG, Status.NONFINITE, Status.TIMEOUT, Status.OOM, Status.ERROR})
"""Statuses that say something is wrong, as against refused or not there."""

SIGNS = {
    Status.OK: "✓", Status.WRONG: "✗", Status.NONFINITE: "∞", Status.CRASH: "☠", Status.TIMEOUT: "◔",
    Status.OOM: "▲", Status.ERROR: "!", Status.UNSUPPORTED: "–", Status.MISSING: "?",
}
"""A sign for each status, so that no verdict is told by colour alone."""


class Verdict(BaseModel):
    """A status and the evidence for it."""

    model_config = ConfigDict(extra="ignore")

    status: Status
    kind: Kind | None = None
    summary: Text = ""
    """One sentence for people."""
    evidence: Tree = Field(default_factory=dict)
    signal: Label | None = None
    """``SIGSEGV``, … if the process was ended by one."""
    exit_code: Integer | None = None
    log_tail: Log = ""
    """The last 4 kB that the case wrote to stdout and stderr, native code included."""

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
    """Return `verdict` with its log; an error without a cause takes the cause that native code printed there."""
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
