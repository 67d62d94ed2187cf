"""The effect of a PTX instruction on a thread: registers, local, shared and global memory.

Source of the semantics: NVIDIA's PTX ISA, version 8.8. An instruction, a modifier or a rounding that is not modelled
raises `Unmodelled`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fpxbench.numbers.formats import BF16, FORMATS, FP16, FP32, Format
from fpxbench.targets.floats import flushed, greatest, least, nearest, product, total, toward_zero
from fpxbench.targets.ptx_parser import Instruction, Unmodelled

_REGISTER = re.compile(r"%(?:p|rs|r|rd|f|fd|h|hh|rq)\d+")
SHARED, GLOBAL = 1 << 30, 1 << 32
"""From where on memory is shared, and global; below is a thread's local memory."""


class Miscompiled(RuntimeError):
    """The kernel is wrong for every input; the message says how."""


@dataclass
class Memory:
    """Bytes by address; an unwritten byte cannot be read."""

    bytes_: dict[int, int] = field(default_factory=dict)

    def write(self, address: int, value: int, size: int) -> None:
        for at in range(size):
            self.bytes_[address + at] = value >> (8 * at) & 0xFF

    def read(self, address: int, size: int) -> int:
        try:
            return sum(self.bytes_[address + at] << (8 * at) for at in range(size))
        except KeyError:
            raise Unmodelled(f"a load of {size} bytes from address {address:#x}, where nothing is") from None


@dataclass
class SharedMemory(Memory):
    """Memory of a block. Notices races: an access by one warp to what another wrote, with no barrier between."""

    _writers: dict[int, int] = field(default_factory=dict)
    _readers: dict[int, set[int]] = field(default_factory=dict)
    """Warps by address, since the last barrier."""

    def synchronise(self) -> None:
        self._writers.clear()
        self._readers.clear()

    def access(self, address: int, size: int, warp: int, writes: bool) -> None:
        """Note an access of a warp. Raises Miscompiled for a race."""
        for at in range(address, address + size):
            others = {self._writers.get(at, warp), *(self._readers.get(at, ()) if writes else ())} - {warp}
            if others:
                raise Miscompiled(f"warps {warp} and {min(others)} use byte {at - SHARED} of shared memory without a "
                                  "barrier")
            if writes:
                self._writers[at] = warp
            else:
                self._readers.setdefault(at, set()).add(warp)


@dataclass
class ThreadState:
    registers: dict[str, int]
    parameters: dict[str, int]
    global_memory: Memory
    shared_memory: SharedMemory
    local_memory: Memory
    warp: int
    undefined: int = 0
    """What a register or a byte of shared memory reads as that was never written: LLVM may discard it later."""
    read_undefined: bool = False

    def load(self, address: int, size: int) -> int:
        memory = self._memory(address, size, False)
        if memory is self.shared_memory:
            missing = [at for at in range(address, address + size) if at not in memory.bytes_]
            if missing:
                self.read_undefined = True
                known = Memory(memory.bytes_ | dict.fromkeys(missing, self.undefined & 0xFF))
                return known.read(address, size)
        return memory.read(address, size)

    def store(self, address: int, value: int, size: int) -> None:
        self._memory(address, size, True).write(address, value, size)

    def _memory(self, address: int, size: int, writes: bool) -> Memory:
        if address >= GLOBAL:
            return self.global_memory
        if address < SHARED:
            return self.local_memory
        self.shared_memory.access(address, size, self.warp, writes)
        return self.shared_memory

    def read(self, operand: str, bits: int) -> int:
        """Return a register or a constant, as that many bits."""
        if operand in self.registers:
            value = self.registers[operand]
        elif _REGISTER.fullmatch(operand):
            value, self.read_undefined = self.undefined, True
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
    """Return the bits of an integer type: ``u16``, ``b64``, ``pred``."""
    return 1 if type_ == "pred" else int(type_[1:])


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _only(instruction: Instruction, allowed: str, last: int = 1) -> None:
    """Raise Unmodelled unless the modifiers before the `last` types are among the `allowed` ones."""
    for modifier in instruction.modifiers[:-last]:
        if modifier not in allowed.split():
            raise Unmodelled(instruction.text)


def _parts(operand: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a vector, or the one name."""
    return operand if isinstance(operand, tuple) else (operand,)


# Moves and memory.


def _mov(state: ThreadState, i: Instruction) -> None:
    bits = _width(i.modifiers[-1])
    to, source = map(_parts, i.operands)
    if state.parameters.keys() & {*source}:
        raise Unmodelled(i.text)
    part = bits // len(source)
    value = sum(state.read(name, part) << (part * at) for at, name in enumerate(source))
    part = bits // len(to)
    for at, name in enumerate(to):
        state.write(name, value >> (part * at), part)


_CACHE_HINTS = "L1 L2 evict_first evict_last no_allocate cache_hint"


def _ld(state: ThreadState, i: Instruction) -> None:
    bits = _width(i.modifiers[-1])
    to, address, *_ = map(_parts, i.operands)       # a third one is a cache policy
    if i.modifiers[0] == "param":
        state.write(to[0], state.parameters[address[0].strip("[] ")], bits)
        return
    _only(i, f"global local shared v2 v4 {_CACHE_HINTS}")
    start = state.address(*address)
    for at, name in enumerate(to):
        value = state.load(start + at * bits // 8, bits // 8)
        state.write(name, _signed(value, bits) if i.modifiers[-1][0] == "s" else value, 64)


def _st(state: ThreadState, i: Instruction) -> None:
    _only(i, "global local shared v2 v4")
    bits = _width(i.modifiers[-1])
    address, source = map(_parts, i.operands)
    start = state.address(*address)
    for at, name in enumerate(source):
        state.store(start + at * bits // 8, state.read(name, bits), bits // 8)


# Integers and bits.


def _bitwise(operation: Callable[..., int]) -> Callable[[ThreadState, Instruction], None]:
    def handler(state: ThreadState, i: Instruction) -> None:
        bits = _width(i.modifiers[-1])
        state.write(i.names[0], operation(*(state.read(name, bits) for name in i.names[1:])), bits)
    return handler


def _shift(state: ThreadState, i: Instruction) -> None:
    bits = _width(i.modifiers[-1])
    value, by = state.read(i.names[1], bits), min(state.read(i.names[2], 32), bits)
    if i.name == "shl":
        value <<= by
    else:
        value = (_signed(value, bits) if i.modifiers[-1][0] == "s" else value) >> by
    state.write(i.names[0], value, bits)


def _lop3(state: ThreadState, i: Instruction) -> None:
    to, *sources, immediate = i.names
    a, b, c = (state.read(name, 32) for name in sources)
    table = state.read(immediate, 8)
    state.write(to, sum((table >> ((a >> at & 1) << 2 | (b >> at & 1) << 1 | (c >> at & 1)) & 1) << at
                        for at in range(32)), 32)


def _prmt(state: ThreadState, i: Instruction) -> None:
    _only(i, "")
    to, low, high, selector = i.names
    eight = state.read(low, 32) | state.read(high, 32) << 32
    chosen, value = state.read(selector, 32), 0
    for at in range(4):
        nibble = chosen >> (4 * at) & 0xF
        byte = eight >> (8 * (nibble & 7)) & 0xFF
        value |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << (8 * at)
    state.write(to, value, 32)


def _bfe(state: ThreadState, i: Instruction) -> None:
    """Extract a bit field; of a signed one the top bit is repeated."""
    if i.modifiers not in (("u32",), ("s32",)):
        raise Unmodelled(i.text)
    value, start, length = (state.read(name, 32) for name in i.names[1:])
    start, length = start & 0xFF, length & 0xFF
    if i.modifiers == ("s32",):
        if not 0 < length <= 32 - start:
            raise Unmodelled(i.text)
        state.write(i.names[0], _signed(value >> start & ((1 << length) - 1), length), 32)
    else:
        state.write(i.names[0], value >> start & ((1 << length) - 1), 32)


def _bfi(state: ThreadState, i: Instruction) -> None:
    """Insert a bit field."""
    if i.modifiers != ("b32",):
        raise Unmodelled(i.text)
    field_, into, start, length = (state.read(name, 32) for name in i.names[1:])
    mask = ((1 << (length & 0xFF)) - 1) << (start & 0xFF) & 0xFFFFFFFF
    state.write(i.names[0], into & ~mask | field_ << (start & 0xFF) & mask, 32)


def _selp(state: ThreadState, i: Instruction) -> None:
    to, yes, no, predicate = i.names
    type_ = i.modifiers[-1]
    bits = _width(type_) if type_ not in _FLOATS else _FLOATS[type_].bits
    state.write(to, state.read(yes if state.read(predicate, 1) else no, bits), bits)


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b and not (math.isnan(a) or math.isnan(b)),
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b, "equ": lambda a, b: not (a < b or a > b), "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b, "gtu": lambda a, b: not a <= b, "geu": lambda a, b: not a < b,
    "num": lambda a, b: not (math.isnan(a) or math.isnan(b)), "nan": lambda a, b: math.isnan(a) or math.isnan(b),
}


def _setp(state: ThreadState, i: Instruction) -> None:
    comparison, type_ = i.modifiers[0], i.modifiers[-1]
    if len(i.modifiers) != 2 or "|" in i.names[0]:
        raise Unmodelled(i.text)
    a, b = (_number(state, name, type_) for name in i.names[1:])
    state.write(i.names[0], _COMPARISONS[comparison](a, b), 1)


def _set(state: ThreadState, i: Instruction) -> None:
    """Execute ``set``: write 1.0 or 0.0 in each lane."""
    comparison, to_type, from_type = i.modifiers
    if (to_type, from_type) != ("f16x2", "f16x2"):
        raise Unmodelled(i.text)
    a, b = (state.read(name, 32) for name in i.names[1:])
    holds = (_COMPARISONS[comparison](FP16.value(a >> shift & 0xFFFF), FP16.value(b >> shift & 0xFFFF))
             for shift in (0, 16))
    low, high = (nearest(FP16, float(true)) for true in holds)
    state.write(i.names[0], low | high << 16, 32)


def _number(state: ThreadState, name: str, type_: str) -> float:
    if type_ in _FLOATS:
        return _FLOATS[type_].value(state.read(name, _FLOATS[type_].bits))
    value = state.read(name, _width(type_))
    return _signed(value, _width(type_)) if type_[0] == "s" else value


# Arithmetic, on integers and on floats by their type.


def _arithmetic(state: ThreadState, i: Instruction) -> None:
    type_ = i.modifiers[-1]
    base, lanes = (type_[:-2], 2) if type_.endswith("x2") else (type_, 1)
    if base not in _FLOATS:
        _integer(state, i)
        return
    propagates = "NaN" in i.modifiers and i.name in ("min", "max")
    _only(i, "rn ftz NaN" if propagates else "rn ftz")
    kind, ftz = _FLOATS[base], "ftz" in i.modifiers
    to, *sources = i.names
    result = 0
    for lane in range(lanes):
        numbers = []
        for name in sources:
            bits = state.read(name, kind.bits * lanes) >> (kind.bits * lane) & ((1 << kind.bits) - 1)
            numbers.append(kind.value(flushed(kind, bits) if ftz else bits))
        nan = propagates and any(map(math.isnan, numbers))
        bits = nearest(kind, math.nan if nan else _FLOAT_OPERATIONS[i.name](*numbers))
        result |= (flushed(kind, bits) if ftz else bits) << (kind.bits * lane)
    state.write(to, result, kind.bits * lanes)


_FLOAT_OPERATIONS: dict[str, Callable] = {
    "mul": product, "add": total, "sub": lambda a, b: total(a, -b), "fma": lambda a, b, c: total(product(a, b), c),
    "min": least, "max": greatest, "neg": lambda a: -a, "abs": abs,
}


_INTEGER_OPERATIONS: dict[str, Callable] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "min": min, "max": max, "neg": lambda a: -a, "abs": abs,
}


def _integer(state: ThreadState, i: Instruction) -> None:
    type_ = i.modifiers[-1]
    bits = _width(type_)
    _only(i, "lo wide")
    wide = "wide" in i.modifiers
    if i.name in ("mul", "mad") and "lo" not in i.modifiers and not wide:
        raise Unmodelled(i.text)
    to, *sources = i.names
    numbers = [_number(state, name, type_) for name in sources[:2]]
    if i.name in ("mul", "mad"):
        value = numbers[0] * numbers[1]
        if i.name == "mad":
            value += state.read(sources[2], 2 * bits if wide else bits)
    else:
        value = _INTEGER_OPERATIONS[i.name](*numbers)
    state.write(to, int(value), 2 * bits if wide else bits)


def _cvt(state: ThreadState, i: Instruction) -> None:
    to_type, from_type = i.modifiers[-2:]
    to, *sources = i.names
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
            upper, lower = (FP32.value(state.read(name, 32)) for name in sources)
        else:
            kind, lanes = _FLOATS[from_type.removesuffix("x2")], state.read(sources[0], 32)
            lower, upper = kind.value(lanes & 0xFFFF), kind.value(lanes >> 16)
        state.write(to, _CODED[to_type].round(lower) | _CODED[to_type].round(upper) << 8, 16)
    elif to_type in _FLOATS and from_type in _FLOATS:
        _between_floats(state, i, options)
    elif to_type in _FLOATS and options <= {"rn"}:
        state.write(to, nearest(_FLOATS[to_type], float(_number(state, sources[0], from_type))), _FLOATS[to_type].bits)
    elif not options and from_type not in _FLOATS and to_type not in _FLOATS:
        state.write(to, int(_number(state, sources[0], from_type)), _width(to_type))
    else:
        raise Unmodelled(i.text)


def _between_floats(state: ThreadState, i: Instruction, options: set[str]) -> None:
    if not (options <= {"rn", "ftz"} or options == {"rz"}):
        raise Unmodelled(i.text)
    target, source = (_FLOATS[type_] for type_ in i.modifiers[-2:])
    bits = state.read(i.names[1], source.bits)
    number = source.value(flushed(source, bits) if "ftz" in options and source is FP32 else bits)
    result = (toward_zero if "rz" in options else nearest)(target, number)
    if not options & {"rn", "rz"} and not math.isnan(number) and target.value(result) != number:
        raise Unmodelled(f"{i.text}: {number} has to be rounded, and the instruction does not say how")
    state.write(i.names[0], result, target.bits)


INSTRUCTIONS: dict[str, Callable[[ThreadState, Instruction], None]] = {
    "createpolicy": lambda state, i: state.write(i.names[0], 0, 64), "mov": _mov, "ld": _ld, "st": _st, "cvt": _cvt,
    "cvta": lambda state, i: state.write(i.names[0], state.read(i.names[1], 64), 64),
    "and": _bitwise(lambda a, b: a & b), "or": _bitwise(lambda a, b: a | b), "xor": _bitwise(lambda a, b: a ^ b),
    "not": _bitwise(lambda a: ~a),
    "shl": _shift, "shr": _shift, "lop3": _lop3, "prmt": _prmt, "bfe": _bfe, "bfi": _bfi, "selp": _selp, "setp": _setp,
    "set": _set,
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs"), _arithmetic),
}
