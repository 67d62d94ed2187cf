"""Parse the PTX of one kernel into instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache


class Unmodelled(ValueError):
    """PTX that the interpreter does not model, or not completely."""


@dataclass(frozen=True)
class Instruction:
    text: str
    """As written."""
    name: str
    """``cvt``"""
    modifiers: tuple[str, ...]
    """``rn``, ``f16x2``, ``e4m3x2``"""
    operands: tuple[str | tuple[str, ...], ...]
    """Registers and constants by name; a vector is a tuple; ``[a + 4]`` is an address."""
    predicate: str = ""
    """``%p1`` or ``!%p1``."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The operands of an instruction that takes no vector. Raises Unmodelled for one with a vector."""
        names = tuple(operand for operand in self.operands if isinstance(operand, str))
        if len(names) != len(self.operands):
            raise Unmodelled(self.text)
        return names


@dataclass(frozen=True)
class Kernel:
    instructions: tuple[Instruction, ...]
    parameters: tuple[str, ...]
    local_arrays: tuple[str, ...]
    """Private to each thread."""
    shared_arrays: tuple[str, ...]
    labels: dict[str, int]
    """Position of the instruction behind each label."""


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file)\b[^\n]*", re.DOTALL | re.MULTILINE)
_LABEL = re.compile(r"(?:^|(?<=\n))[ \t]*(\$[$\w]+):\s")
_STATEMENT = re.compile(
    r"(?:@(?P<predicate>!?[%\w]+)\s+)?(?P<name>[a-z]\w*)(?P<modifiers>(?:[.:]+\w+)*)(?P<operands>.*)", re.DOTALL)
_OPERAND = re.compile(r"\{([^}]*)\}|(\[[^\]]*\])|([^,\s]+)")


@lru_cache(maxsize=64)
def parse(ptx: str) -> Kernel:
    """Return the one kernel in `ptx`. Raises Unmodelled for text that cannot be read."""
    text = _COMMENT.sub("", ptx)
    head, brace, body = text.partition("\n{")
    if not brace:
        raise Unmodelled("no kernel in this text")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        # A leading brace begins or ends a scope; a vector's braces stand inside a statement.
        statement = statement.lstrip("{} \t\n")
        while match := _LABEL.match(statement):
            labels[match[1]] = len(instructions)
            statement = statement[match.end():].lstrip("{} \t\n")
        if statement.startswith(".reg") and "%" in statement and instructions:
            raise Unmodelled(f"{statement}: a scope that hides outer registers")
        if not statement or statement.startswith("."):
            continue
        instructions.append(_instruction(statement))
    parameters = re.findall(r"\.param[^,)\n]*?(\w+)\s*(?=[,)\n])", head)
    arrays = {space: tuple(re.findall(rf"\.{space}\b[^;]*?(\w+)\[\d*\]", text)) for space in ("local", "shared")}
    return Kernel(tuple(instructions), tuple(parameters), arrays["local"], arrays["shared"], labels)


def _instruction(statement: str) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise Unmodelled(statement.splitlines()[0])
    operands = tuple(
        tuple(part.strip() for part in vector.split(",")) if vector else address or plain
        for vector, address, plain in _OPERAND.findall(match["operands"])
    )
    modifiers = tuple(re.split(r"[.:]+", match["modifiers"])[1:])
    return Instruction(" ".join(statement.split()), match["name"], modifiers, operands, match["predicate"] or "")
