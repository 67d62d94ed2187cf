"""Classify failed compilations: one sentence for each reason, the same in every cell that failed for it.

The sentence is the compiler's, without what differs from cell to cell: paths, addresses, line numbers, registers and
sizes of tiles. Status and kind are those of `fpxbench.records.verdict`.
"""

from __future__ import annotations

import re

from fpxbench.records.compiler_messages import REFUSALS, find_message
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict, classify_death, classify_exception
from fpxbench.targets.matrix import CellOutcome

_MESSAGE_LENGTH = 600

# Messages of the compiling child (`fpxbench.targets.child`), and a pattern that is an error only in a compiler's log.
_MISSING = re.compile(r"this build has no tl\.\w+|not observable on this build: [^\n]*")
_ERROR_LINE = re.compile(r"\berror\s*: (?!Failures have been)\S[^\n]*")


def failure(answer: dict) -> CellOutcome:
    """Return the outcome of a cell that did not compile: its process was killed or died, or it raised."""
    log = answer.get("log", "")
    if "timeout" in answer:
        return CellOutcome(status=Status.TIMEOUT, cause=f"was still compiling after {answer['timeout']:.0f} s",
                           message=excerpt(log))
    if "raised" in answer:
        type_, message = answer["raised"]
        verdict = classify_exception(type_, message, log)
        found = _known_message(f"{message}\n{log}")
    else:
        message = ""
        verdict = classify_death(-answer["signal"] if "signal" in answer else answer["exit"], log)
        found = _known_message(log)
    cause, kind = found or (_last_line(message or log) or verdict.summary, verdict.kind)
    if message.rstrip().endswith("^"):      # only the location in the source
        cause = f"{type_} without a reason"
    return CellOutcome(status=_status(verdict, kind, cause), kind=kind, cause=_scrubbed(cause), signal=verdict.signal,
                   message=excerpt(f"{log}\n{message}".strip() if not message or found
                                   and found[0] in log else message))


def native_errors(log: str) -> tuple[str, Kind] | None:
    """Return the error that native code printed although it produced an object, or None."""
    found = re.search(r"^(?:error: |LLVM ERROR|<unknown>:\d+:\d+: error).*", log, re.MULTILINE)
    if found is None:
        return None
    cause, kind = _known_message(log[found.start():]) or (found[0], None)
    return _scrubbed(cause), kind or Kind.ASSEMBLER_ERROR


def _known_message(text: str) -> tuple[str, Kind | None] | None:
    """Return the part of `text` that names the cause, and its kind; None if nothing known is in it."""
    if match := _MISSING.search(text):
        return match[0], None
    known = find_message(text)
    if (known is None or known.kind is Kind.PASS_FAILED) and (match := _ERROR_LINE.search(text)):
        return match[0], Kind.ASSEMBLER_ERROR
    if known is None:
        return None
    # No refusal: the compiler emitted an instruction that the target does not have.
    return known.cause, Kind.ASSEMBLER_ERROR if known.by_assembler else known.kind


def _status(verdict: Verdict, kind: Kind | None, cause: str) -> Status:
    if verdict.status is Status.ERROR and kind in REFUSALS:
        return Status.UNSUPPORTED
    if verdict.status is Status.UNSUPPORTED and kind is Kind.ASSEMBLER_ERROR:
        return Status.ERROR
    return Status.MISSING if _MISSING.match(cause) else verdict.status


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^\t")]
    return lines[-1] if lines else ""


def _scrubbed(cause: str) -> str:
    for pattern, replacement in (
        (r"\s+", " "), (r"ptxas [^;]*; (?:error|fatal)\s*:", "ptxas:"), (r"'([\w.]+)'", r"\1"),
        (r"(?:/[\w.+-]+){2,}/?", "…"), (r"\btmp\w{6,}\b", "…"), (r"0x[0-9a-fA-F]+", "…"), (r"%\w+", "%…"),
        (r"\bline \d+", "line …"), (r":\d+:\d+", ""), (r"(expected) \d+ (but got) \d+", r"\1 … \2 …"),
        (r"Required: \d+, Hardware limit: (\d+)", r"more than \1 bytes"), (r"^\w+\(['\"](.*)['\"]\)$", r"\1"),
    ):
        cause = re.sub(pattern, replacement, cause)
    return cause.strip()[:200]


def excerpt(text: str) -> str:
    """Return the end of the compiler's output, without this machine's paths."""
    text = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-]+)", "", text.strip())
    text = re.sub(r"\btmp\w{6,}", "…", text)
    return text if len(text) <= _MESSAGE_LENGTH else "…" + text[-_MESSAGE_LENGTH:]
