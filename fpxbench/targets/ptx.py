"""Runs the PTX of a small kernel, a thread at a time: the handful of instructions that conversions are made of.

What is not modelled is said so (`Unmodelled`), never guessed: control flow, shared memory, anything across threads, and any
rounding that the instruction leaves open. Source of the semantics: NVIDIA's PTX ISA, version 8.8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fpxbench.numbers.formats import BF16, FORMATS, FP16, FP32, Format
from fpxbench.targets.floats import flushed, greatest, least, nearest, product, total, toward_zero


class Unmodelled(ValueError):
    """An instruction that this interpreter does not know, or knows too little of."""


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


@dataclass(frozen=True)
class Kernel:
    instructions: tuple[Instruction, ...]
    parameters: tuple[str, ...]
    local_arrays: tuple[str, ...]
    """Each thread's own."""


_LOCAL, _LOCAL_SIZE, GLOBAL = 1 << 20, 1 << 12, 1 << 32
"""Where local arrays begin, how far they lie apart, and from where on memory is global."""


@dataclass
class Memory:
    """Bytes by address; what was never written cannot be read."""

    bytes_: dict[int, int] = field(default_factory=dict)

    def write(self, address: int, value: int, size: int) -> None:
        for at in range(size):
            self.bytes_[address + at] = value >> (8 * at) & 0xFF

    def read(self, address: int, size: int) -> int:
        try:
            return sum(self.bytes_[address + at] << (8 * at) for at in range(size))
        except KeyError:
            raise Unmodelled(f"a load of {size} bytes from address {address:#x}, where nothing is") from None


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STATEMENT = re.compile(r"(?:@(?P<predicate>!?[%\w]+)\s+)?(?P<name>[a-z]\w*)(?P<modifiers>(?:[.:]+\w+)*)(?P<operands>.*)", re.DOTALL)
_OPERAND = re.compile(r"\{([^}]*)\}|(\[[^\]]*\])|([^,\s]+)")


def parse(ptx: str) -> Kernel:
    """The one kernel in `ptx`. Raises Unmodelled for text that cannot be read."""
    text = _COMMENT.sub("", ptx)
    head, brace, body = text.partition("\n{")
    if not brace:
        raise Unmodelled("no kernel in this text")
    instructions = []
    for statement in re.sub(r"^\s*[$\w]+:\s", "\n", body, flags=re.MULTILINE).split(";"):
        # What begins with a brace begins or ends a scope; the braces of a vector stand inside.
        statement = statement.lstrip("{} \t\n")
        if statement.startswith(".reg") and "%" in statement and instructions:
            raise Unmodelled(f"{statement}: a scope that hides outer registers")
        if not statement or statement.startswith("."):
            continue
        match = _STATEMENT.fullmatch(statement)
        if match is None:
            raise Unmodelled(statement.splitlines()[0])
        operands = tuple(
            tuple(part.strip() for part in vector.split(",")) if vector else address or plain
            for vector, address, plain in _OPERAND.findall(match["operands"])
        )
        instructions.append(Instruction(" ".join(statement.split()), match["name"], tuple(re.split(r"[.:]+", match["modifiers"])[1:]),
                                        operands, match["predicate"] or ""))
    parameters = re.findall(r"\.param[^,)\n]*?(\w+)\s*(?=[,)\n])", head)
    return Kernel(tuple(instructions), tuple(parameters), tuple(re.findall(r"\.local\b[^;]*?(\w+)\[\d+\]", body)))


def run_thread(kernel: Kernel, arguments: Sequence[int], memory: Memory, thread: int, block: int) -> None:
    """Run one thread to its end on global `memory`; parameters past the `arguments` are 0. Raises Unmodelled."""
    parameters = dict.fromkeys(kernel.parameters, 0) | dict(zip(kernel.parameters, arguments, strict=False))
    registers = {"%tid.x": thread, "%ctaid.x": block} | {name: _LOCAL + at * _LOCAL_SIZE for at, name in enumerate(kernel.local_arrays)}
    state = _State(registers, parameters, memory, Memory())
    for instruction in kernel.instructions:
        if instruction.predicate and bool(state.read(instruction.predicate.lstrip("!"), 1)) == instruction.predicate.startswith("!"):
            continue
        if instruction.name in ("ret", "exit"):
            return
        handler = _HANDLERS.get(instruction.name)
        if handler is None:
            raise Unmodelled(instruction.text)
        try:
            handler(state, instruction)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise error if isinstance(error, Unmodelled) else Unmodelled(instruction.text) from error


@dataclass
class _State:
    registers: dict[str, int]
    parameters: dict[str, int]
    global_memory: Memory
    local_memory: Memory

    def memory_at(self, address: int) -> Memory:
        return self.global_memory if address >= GLOBAL else self.local_memory

    def read(self, operand: str, bits: int) -> int:
        """A register or a constant, as that many bits."""
        if operand in self.registers:
            value = self.registers[operand]
        elif operand.startswith("0f"):
            value = int(operand[2:], 16)
        else:
            value = int(operand.rstrip("U"), 0)
        return value & ((1 << bits) - 1)

    def write(self, operand: str, value: int, bits: int) -> None:
        self.registers[operand] = value & ((1 << bits) - 1)

    def address(self, operand: str) -> int:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        return self.read(base, 64) + (int(offset, 0) if offset else 0)


_FLOATS: dict[str, Format] = {"f32": FP32, "f16": FP16, "bf16": BF16}
_CODED: dict[str, Format] = {"e4m3x2": FORMATS["e4m3fn"], "e5m2x2": FORMATS["e5m2"]}


def _width(type_: str) -> int:
    """Bits of an integer type: ``u16``, ``b64``, ``pred``."""
    return 1 if type_ == "pred" else int(type_[1:])


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _only(instruction: Instruction, allowed: str, last: int = 1) -> None:
    """The modifiers before the `last` types must be known to change nothing here."""
    for modifier in instruction.modifiers[:-last]:
        if modifier not in allowed.split():
            raise Unmodelled(instruction.text)


# Moves and memory.


def _mov(state: _State, i: Instruction) -> None:
    bits = _width(i.modifiers[-1])
    to, source = i.operands
    if isinstance(source, tuple):
        part = bits // len(source)
        value = sum(state.read(name, part) << (part * at) for at, name in enumerate(source))
    elif source in state.parameters:
        raise Unmodelled(i.text)
    else:
        value = state.read(source, bits)
    if isinstance(to, tuple):
        part = bits // len(to)
        for at, name in enumerate(to):
            state.write(name, value >> (part * at), part)
    else:
        state.write(to, value, bits)


def _ld(state: _State, i: Instruction) -> None:
    bits = _width(i.modifiers[-1])
    to, address = i.operands
    if i.modifiers[0] == "param":
        state.write(to, state.parameters[address.strip("[] ")], bits)
        return
    _only(i, "global local v2 v4")
    start = state.address(address)
    memory = state.memory_at(start)
    for at, name in enumerate(to if isinstance(to, tuple) else (to,)):
        value = memory.read(start + at * bits // 8, bits // 8)
        state.write(name, _signed(value, bits) if i.modifiers[-1][0] == "s" else value, 64)


def _st(state: _State, i: Instruction) -> None:
    _only(i, "global local v2 v4")
    bits = _width(i.modifiers[-1])
    address, source = i.operands
    start = state.address(address)
    memory = state.memory_at(start)
    for at, name in enumerate(source if isinstance(source, tuple) else (source,)):
        memory.write(start + at * bits // 8, state.read(name, bits), bits // 8)


# Integers and bits.


def _bitwise(operation: Callable[..., int]) -> Callable[[_State, Instruction], None]:
    def handler(state: _State, i: Instruction) -> None:
        bits = _width(i.modifiers[-1])
        state.write(i.operands[0], operation(*(state.read(name, bits) for name in i.operands[1:])), bits)
    return handler


def _shift(state: _State, i: Instruction) -> None:
    bits = _width(i.modifiers[-1])
    value, by = state.read(i.operands[1], bits), min(state.read(i.operands[2], 32), bits)
    if i.name == "shl":
        value <<= by
    else:
        value = (_signed(value, bits) if i.modifiers[-1][0] == "s" else value) >> by
    state.write(i.operands[0], value, bits)


def _lop3(state: _State, i: Instruction) -> None:
    to, *sources, table = i.operands
    a, b, c = (state.read(name, 32) for name in sources)
    table = state.read(table, 8)
    state.write(to, sum((table >> ((a >> at & 1) << 2 | (b >> at & 1) << 1 | (c >> at & 1)) & 1) << at for at in range(32)), 32)


def _prmt(state: _State, i: Instruction) -> None:
    _only(i, "")
    to, low, high, selector = i.operands
    eight = state.read(low, 32) | state.read(high, 32) << 32
    chosen, value = state.read(selector, 32), 0
    for at in range(4):
        nibble = chosen >> (4 * at) & 0xF
        byte = eight >> (8 * (nibble & 7)) & 0xFF
        value |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << (8 * at)
    state.write(to, value, 32)


def _bfe(state: _State, i: Instruction) -> None:
    if i.modifiers != ("u32",):
        raise Unmodelled(i.text)
    value, start, length = (state.read(name, 32) for name in i.operands[1:])
    state.write(i.operands[0], value >> (start & 0xFF) & ((1 << (length & 0xFF)) - 1), 32)


def _selp(state: _State, i: Instruction) -> None:
    to, yes, no, predicate = i.operands
    type_ = i.modifiers[-1]
    bits = _width(type_) if type_ not in _FLOATS else _FLOATS[type_].bits
    state.write(to, state.read(yes if state.read(predicate, 1) else no, bits), bits)


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b and not (math.isnan(a) or math.isnan(b)), "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b, "equ": lambda a, b: not (a < b or a > b), "ltu": lambda a, b: not a >= b, "leu": lambda a, b: not a > b,
    "gtu": lambda a, b: not a <= b, "geu": lambda a, b: not a < b, "num": lambda a, b: not (math.isnan(a) or math.isnan(b)),
    "nan": lambda a, b: math.isnan(a) or math.isnan(b),
}


def _setp(state: _State, i: Instruction) -> None:
    comparison, type_ = i.modifiers[0], i.modifiers[-1]
    if len(i.modifiers) != 2 or "|" in i.operands[0]:
        raise Unmodelled(i.text)
    a, b = (_number(state, name, type_) for name in i.operands[1:])
    state.write(i.operands[0], _COMPARISONS[comparison](a, b), 1)


def _set(state: _State, i: Instruction) -> None:
    """1.0 or 0.0 in each lane."""
    comparison, to_type, from_type = i.modifiers
    if (to_type, from_type) != ("f16x2", "f16x2"):
        raise Unmodelled(i.text)
    a, b = (state.read(name, 32) for name in i.operands[1:])
    holds = (_COMPARISONS[comparison](FP16.value(a >> shift & 0xFFFF), FP16.value(b >> shift & 0xFFFF)) for shift in (0, 16))
    low, high = (nearest(FP16, float(held)) for held in holds)
    state.write(i.operands[0], low | high << 16, 32)


def _number(state: _State, name: str, type_: str) -> float:
    if type_ in _FLOATS:
        return _FLOATS[type_].value(state.read(name, _FLOATS[type_].bits))
    value = state.read(name, _width(type_))
    return _signed(value, _width(type_)) if type_[0] == "s" else value


# Arithmetic, on integers and on floats by their type.


def _arithmetic(state: _State, i: Instruction) -> None:
    type_ = i.modifiers[-1]
    base, lanes = (type_[:-2], 2) if type_.endswith("x2") else (type_, 1)
    if base not in _FLOATS:
        _integer(state, i)
        return
    _only(i, "rn ftz")
    kind, ftz = _FLOATS[base], "ftz" in i.modifiers
    to, *sources = i.operands
    result = 0
    for lane in range(lanes):
        numbers = []
        for name in sources:
            bits = state.read(name, kind.bits * lanes) >> (kind.bits * lane) & ((1 << kind.bits) - 1)
            numbers.append(kind.value(flushed(kind, bits) if ftz else bits))
        bits = nearest(kind, _FLOAT_OPERATIONS[i.name](*numbers))
        result |= (flushed(kind, bits) if ftz else bits) << (kind.bits * lane)
    state.write(to, result, kind.bits * lanes)


_FLOAT_OPERATIONS: dict[str, Callable] = {
    "mul": product, "add": total, "sub": lambda a, b: total(a, -b), "fma": lambda a, b, c: total(product(a, b), c),
    "min": least, "max": greatest, "neg": lambda a: -a, "abs": abs,
}


def _integer(state: _State, i: Instruction) -> None:
    type_ = i.modifiers[-1]
    bits = _width(type_)
    _only(i, "lo wide")
    wide = "wide" in i.modifiers
    if i.name in ("mul", "mad") and "lo" not in i.modifiers and not wide:
        raise Unmodelled(i.text)
    to, *sources = i.operands
    numbers = [_number(state, name, type_) for name in sources[:2]]
    if i.name in ("mul", "mad"):
        value = numbers[0] * numbers[1]
        if i.name == "mad":
            value += state.read(sources[2], 2 * bits if wide else bits)
    else:
        value = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "min": min, "max": max, "neg": lambda a: -a,
                 "abs": abs}[i.name](*numbers)
    state.write(to, int(value), 2 * bits if wide else bits)


def _cvt(state: _State, i: Instruction) -> None:
    to_type, from_type = i.modifiers[-2:]
    to, *sources = i.operands
    options = set(i.modifiers[:-2])
    if from_type in _CODED and to_type in ("f16x2", "bf16x2") and options == {"rn"}:
        kind, codes = _FLOATS[to_type[:-2]], state.read(sources[0], 16)
        low, high = (nearest(kind, _CODED[from_type].value(codes >> shift & 0xFF)) for shift in (0, 8))
        state.write(to, low | high << 16, 32)
    elif to_type in ("f16x2", "bf16x2") and from_type == "f32" and options in ({"rn"}, {"rz"}):
        kind = _FLOATS[to_type[:-2]]
        rounded = nearest if options == {"rn"} else toward_zero
        high, low = (rounded(kind, FP32.value(state.read(name, 32))) for name in sources)
        state.write(to, low | high << 16, 32)
    elif to_type in _CODED and options == {"rn", "satfinite"}:
        if from_type == "f32":
            high, low = (FP32.value(state.read(name, 32)) for name in sources)
        else:
            kind, lanes = _FLOATS[from_type.removesuffix("x2")], state.read(sources[0], 32)
            low, high = kind.value(lanes & 0xFFFF), kind.value(lanes >> 16)
        state.write(to, _CODED[to_type].round(low) | _CODED[to_type].round(high) << 8, 16)
    elif to_type in _FLOATS and from_type in _FLOATS:
        _between_floats(state, i, options)
    elif to_type in _FLOATS and options <= {"rn"}:
        state.write(to, nearest(_FLOATS[to_type], float(_number(state, sources[0], from_type))), _FLOATS[to_type].bits)
    elif not options and from_type not in _FLOATS and to_type not in _FLOATS:
        state.write(to, int(_number(state, sources[0], from_type)), _width(to_type))
    else:
        raise Unmodelled(i.text)


def _between_floats(state: _State, i: Instruction, options: set[str]) -> None:
    if not (options <= {"rn", "ftz"} or options == {"rz"}):
        raise Unmodelled(i.text)
    target, source = (_FLOATS[type_] for type_ in i.modifiers[-2:])
    bits = state.read(i.operands[1], source.bits)
    number = source.value(flushed(source, bits) if "ftz" in options and source is FP32 else bits)
    result = (toward_zero if "rz" in options else nearest)(target, number)
    if not options & {"rn", "rz"} and not math.isnan(number) and target.value(result) != number:
        raise Unmodelled(f"{i.text}: {number} has to be rounded, and how is not said")
    state.write(i.operands[0], result, target.bits)


_HANDLERS: dict[str, Callable[[_State, Instruction], None]] = {
    "mov": _mov, "ld": _ld, "st": _st, "cvt": _cvt, "cvta": lambda state, i: state.write(i.operands[0], state.read(i.operands[1], 64), 64),
    "and": _bitwise(lambda a, b: a & b), "or": _bitwise(lambda a, b: a | b), "xor": _bitwise(lambda a, b: a ^ b), "not": _bitwise(lambda a: ~a),
    "shl": _shift, "shr": _shift, "lop3": _lop3, "prmt": _prmt, "bfe": _bfe, "selp": _selp, "setp": _setp, "set": _set,
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs"), _arithmetic),
}


# The whole of a conversion.


def converted(ptx: str, numbers: Sequence[int], source_bytes: int, out_bytes: int, elements_a_thread: int, threads: int = 32) -> list[int]:
    """What a kernel ``(source, out)`` makes of the elements of `source`, given and returned as bits.

    Every thread of as many blocks of `threads` as it takes is run; the last is filled up with zeros. Raises Unmodelled, also where a
    result was not written.
    """
    kernel = parse(ptx)
    source, target = GLOBAL, 2 * GLOBAL
    in_a_block = elements_a_thread * threads
    blocks = -(-len(numbers) // in_a_block)
    memory = Memory()
    for at in range(blocks * in_a_block):
        memory.write(source + at * source_bytes, numbers[at] if at < len(numbers) else 0, source_bytes)
    for block in range(blocks):
        for thread in range(threads):
            run_thread(kernel, (source, target), memory, thread, block)
    return [memory.read(target + at * out_bytes, out_bytes) for at in range(len(numbers))]


def decoded_table(ptx: str, out: Format, codes_a_thread: int, threads: int = 32) -> list[float]:
    """What each of the 256 codes becomes in a kernel that converts a byte each to `out`, in blocks of so many threads. Raises Unmodelled."""
    return [out.value(bits) for bits in converted(ptx, range(256), 1, out.bits // 8, codes_a_thread, threads)]
