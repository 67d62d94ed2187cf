"""What a case turned out to be: statuses, the closed list of mistakes, and how a failure's own words are classified."""

from __future__ import annotations

import re
import signal as signals
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

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
    summary: str = ""
    """One sentence for people."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    signal: str | None = None
    """``SIGSEGV``, … if the process was ended by one."""
    exit_code: int | None = None
    log_tail: str = ""
    """The last 4 kB that the case wrote to stdout and stderr, native code included."""

    @property
    def headline(self) -> str:
        return f"{self.status}" + (f" ({self.kind})" if self.kind else "")


# The compilers' own words. Order matters: the most specific first.
_WORDS: tuple[tuple[Kind, str], ...] = (
    (Kind.UNSUPPORTED_ROUNDING, r"[Uu]nsupported conversion from \S+ to \S+ with rounding mode \w+"),
    (Kind.UNSUPPORTED_ROUNDING, r"[Uu]nsupported rounding mode.*"),
    (Kind.UNSUPPORTED_DTYPE, r"type fp8\w+ not supported in this architecture[^\"\n]*"),
    (Kind.UNSUPPORTED_DTYPE, r"\"?\w+\"? not implemented for '(?:Float8|BFloat16|Half|Byte|Char|UInt)\w*'"),
    (Kind.UNSUPPORTED_DTYPE, r"[Uu]nsupported (?:d?type|data type)[^\n]*"),
    (Kind.UNSUPPORTED_DTYPE, r"fail to convert fp8\w+ to ir type"),
    (Kind.UNSUPPORTED_ARCH, r"(?:feature|instruction|modifier)[^\n]*(?:requires|not supported on)[^\n]*(?:sm_|gfx|target)[^\n]*"),
    (Kind.UNSUPPORTED_ARCH, r"no kernel image is available[^\n]*"),
    (Kind.UNSUPPORTED_ARCH, r"(?:only supported|is supported only|requires)[^\n]*(?:compute capability|sm_?\d+|gfx\d+|MI300)[^\n]*"),
    (Kind.UNSUPPORTED_CONVERSION, r"[Uu]nsupported conversion[^\n]*"),
    (Kind.UNSUPPORTED_CONVERSION, r"[Cc]annot (?:bit)?cast[^\n]*"),
    (Kind.ASSEMBLER_ERROR, r"ptxas (?:fatal|error)[^\n]*|PTXAS error[^\n]*|`ptxas` failed[^\n]*"),
    (Kind.PASS_FAILED, r"PassManager::run failed[^\n]*"),
    (Kind.COMPILER_ABORT, r"size mismatch when packing elements for LLVM struct[^\n]*"),
    (Kind.COMPILER_ABORT, r"LLVM ERROR:[^\n]*"),
    (Kind.COMPILER_ABORT, r"[^\n]*Assertion `[^\n]*' failed[^\n]*"),
)

_REFUSALS = frozenset({
    Kind.UNSUPPORTED_ROUNDING, Kind.UNSUPPORTED_CONVERSION, Kind.UNSUPPORTED_DTYPE, Kind.UNSUPPORTED_ARCH,
})

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError|std::bad_alloc")


def kind_in(text: str) -> tuple[Kind, str] | None:
    """The failure that a compiler or framework speaks of in `text`, with its own words; None if nothing is known."""
    for kind, pattern in _WORDS:
        match = re.search(pattern, text)
        if match:
            return kind, match[0].strip()[:300]
    return None


_PLACE = re.compile(r"\s*at \d+:\d+:\n.*\n[ \t]*\^[ \t]*(?:\n|$)", re.DOTALL)


def without_source(message: str) -> str:
    """A message of Triton's without its ``at 4:26:``, the source that follows and the caret under it: what is said after them, which
    may be nothing."""
    return _PLACE.sub("", message, count=1).strip()


def classify_exception(type_name: str, message: str, log_tail: str) -> Verdict:
    """The verdict on a case that raised."""
    said = f"{type_name}: {without_source(message)}".strip()
    first_line = next((line.strip() for line in said.splitlines() if line.strip()), type_name)[:400]
    if type_name in ("MemoryError", "OutOfMemoryError") or _OUT_OF_MEMORY.search(message):
        return Verdict(status=Status.OOM, summary=f"ran out of memory: {first_line}", log_tail=log_tail)
    if type_name in ("ModuleNotFoundError", "ImportError"):
        return Verdict(status=Status.MISSING, summary=first_line, log_tail=log_tail)
    known = kind_in(message) or kind_in(log_tail)
    if known and known[0] in _REFUSALS:
        return Verdict(status=Status.UNSUPPORTED, kind=known[0], summary=f"refused: {known[1]}", log_tail=log_tail)
    if type_name == "NotImplementedError" and known is None:
        return Verdict(status=Status.UNSUPPORTED, summary=first_line, log_tail=log_tail)
    return Verdict(status=Status.ERROR, kind=known[0] if known else None, log_tail=log_tail,
                   summary=f"raised {first_line}" if known is None else f"raised {type_name}: {known[1]}")


def with_log(verdict: Verdict, log_tail: str) -> Verdict:
    """`verdict` with its log, and where that names the cause (native code prints it, and raises something vaguer), with that."""
    known = kind_in(log_tail) if verdict.status is Status.ERROR and verdict.kind in (None, Kind.PASS_FAILED) else None
    if known is None:
        return verdict.model_copy(update={"log_tail": log_tail})
    status, said = (Status.UNSUPPORTED, "refused") if known[0] in _REFUSALS else (Status.ERROR, "raised, after saying")
    return verdict.model_copy(update={"status": status, "kind": known[0], "summary": f"{said}: {known[1]}", "log_tail": log_tail,
                                      "evidence": {"raised": verdict.summary, **verdict.evidence}})


def classify_death(exit_code: int, log_tail: str) -> Verdict:
    """The verdict on a case whose process ended: by a signal (negative `exit_code`, as in subprocess) or by exiting."""
    name = None
    if exit_code < 0:
        try:
            name = signals.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"
    known = kind_in(log_tail)
    how = f"died by {name}" if name else f"ended its process with exit code {exit_code}"
    said = f": {known[1]}" if known else ""
    if known is None and name == "SIGABRT" and _OUT_OF_MEMORY.search(log_tail):
        return Verdict(status=Status.OOM, summary="ran out of memory and aborted", signal=name, exit_code=exit_code,
                       log_tail=log_tail)
    return Verdict(status=Status.CRASH, kind=known[0] if known else None, summary=how + said, signal=name,
                   exit_code=exit_code, log_tail=log_tail)
