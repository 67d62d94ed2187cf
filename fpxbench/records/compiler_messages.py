"""Classify messages of compilers and frameworks, by one table from patterns to kinds.

The patterns match messages of Triton 3.0 to 3.9, LLVM, ptxas and PyTorch, as printed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fpxbench.records.kinds import Kind

LONGEST = 300

REFUSALS = frozenset({
    Kind.UNSUPPORTED_ROUNDING, Kind.UNSUPPORTED_CONVERSION, Kind.UNSUPPORTED_DTYPE, Kind.UNSUPPORTED_ARCH,
})
"""Kinds of message by which a compiler refuses; with any other kind it fails."""

# The most specific first. Group 1 is the cause: the part that all failures with one reason have in common.
_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = tuple((kind, re.compile(pattern)) for kind, pattern in (
    (Kind.UNSUPPORTED_DTYPE, r"(type (?:fp8|f8)\w+ not supported in this architecture)[^\"\n]*"),
    (Kind.UNSUPPORTED_DTYPE, r"(fp8\w+ data type is not supported on CUDA arch < \d+)"),
    (Kind.UNSUPPORTED_ARCH, r"(Conversion from/to f8\w+ is only supported on compute capability >= \d+)"),
    (Kind.UNSUPPORTED_ROUNDING, r"([Uu]nsupported conversion from \S+ to \S+ with rounding mode \w+)"),
    (Kind.UNSUPPORTED_CONVERSION, r"([Uu]nsupported conversion from \S+ to \S+)[^\n]*"),
    (Kind.UNSUPPORTED_ROUNDING, r"([Uu]nsupported rounding mode[^\n]*)"),
    (Kind.UNSUPPORTED_DTYPE, r"(Dot op does not support \w+ on CUDA arch < \d+)"),
    (Kind.UNSUPPORTED_DTYPE, r"(Only supports fp8\w+[^\n]*First operand \(\w+\))"),
    (Kind.UNSUPPORTED_CONVERSION, r"(target doesn't provide conversion for this type)"),
    (Kind.UNSUPPORTED_DTYPE, r"(\"?\w+\"? not implemented for '(?:Float8|BFloat16|Half|Byte|Char|UInt)\w*')"),
    (Kind.UNSUPPORTED_DTYPE, r"([Uu]nsupported (?:d?type|data type)[^\n]*)"),
    (Kind.UNSUPPORTED_DTYPE, r"(fail to convert fp8\w+ to ir type)"),
    (Kind.ASSEMBLER_ERROR, r"(instruction not supported on this GPU\s+v_\w+)"),
    (Kind.ASSEMBLER_ERROR, r"((?:invalid operand|invalid instruction|operands are not valid)[^\n]*\n\s*v_\w+)"),
    (Kind.COMPILER_ABORT, r"(size mismatch when packing elements for LLVM struct expected \d+ but got \d+)"),
    (Kind.UNSUPPORTED_ARCH,
     r"(ptxas [^\n;]*; (?:error|fatal)[^\n]*(?:requires|not supported on)[^\n]*(?:sm_|target)[^\n]*)"),
    (Kind.ASSEMBLER_ERROR, r"(ptxas [^\n;]*; (?:error|fatal)[^\n]*)"),
    (Kind.UNSUPPORTED_ARCH,
     r"((?:feature|instruction|modifier)[^\n]*(?:requires|not supported on)[^\n]*(?:sm_|gfx|target)[^\n]*)"),
    (Kind.UNSUPPORTED_ARCH, r"(no kernel image is available[^\n]*)"),
    (Kind.UNSUPPORTED_ARCH,
     r"((?:only supported|is supported only|requires)[^\n]*(?:compute capability|sm_?\d+|gfx\d+|MI300)[^\n]*)"),
    (Kind.UNSUPPORTED_CONVERSION, r"([Uu]nsupported conversion[^\n]*)"),
    (Kind.UNSUPPORTED_CONVERSION, r"([Cc]annot (?:bit)?cast[^\n]*)"),
    (Kind.COMPILER_ABORT, r"(LLVM ERROR:[^\n]*)"),
    (Kind.COMPILER_ABORT, r"[^\n]*(Assertion `[^\n]*' failed)[^\n]*"),
    (Kind.COMPILER_ABORT, r"([^\n]+)(?=\n+UNREACHABLE executed)"),
    (Kind.COMPILER_ABORT, r"(UNREACHABLE executed)"),
    (Kind.ASSEMBLER_ERROR, r"(ptxas (?:fatal|error)\s*:[^\n]*)"),
    (Kind.ASSEMBLER_ERROR, r"(PTXAS error[^\n]*|`ptxas` failed[^\n]*)"),
    (Kind.PASS_FAILED, r"(PassManager::run failed)[^\n]*"),
))


_PTXAS_PLACE = re.compile(r"ptxas [^\n;]*; (?:error|fatal)\s*:")    # a temporary file, and a line in it


class CompilerMessage(NamedTuple):
    """A failure that a compiler or framework reports."""

    kind: Kind
    text: str
    """As printed, at most 300 characters; without ptxas's temporary file."""
    cause: str
    """The part that does not vary between cases with one cause, as printed: paths, lines and sizes are still in it."""

    @property
    def by_assembler(self) -> bool:
        """Whether ptxas rejected the code, which the compiler had accepted."""
        return self.text.startswith("ptxas:")


def find_message(text: str) -> CompilerMessage | None:
    """Return the most specific known message in `text`, or None."""
    for kind, pattern in _PATTERNS:
        if match := pattern.search(text):
            return CompilerMessage(kind, _PTXAS_PLACE.sub("ptxas:", match[0]).strip()[:LONGEST], match[1])
    return None


_SOURCE = re.compile(r"\s*at \d+:\d+:\n.*\n[ \t]*\^[ \t]*(?:\n|$)", re.DOTALL)


def without_source(message: str) -> str:
    """Return a message of Triton's without its location (``at 4:26:``), source excerpt and caret."""
    return _SOURCE.sub("", message, count=1).strip()
