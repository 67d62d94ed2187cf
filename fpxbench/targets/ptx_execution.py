"""Execute a parsed PTX kernel: all threads of all blocks, with shared memory, barriers, shuffles and branches.

What is not modelled raises `Unmodelled`, and is never guessed. Source of the semantics: NVIDIA's PTX ISA, version 8.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fpxbench.numbers.formats import Format
from fpxbench.targets.ptx_instructions import (
    GLOBAL,
    INSTRUCTIONS,
    SHARED,
    Memory,
    Miscompiled,
    SharedMemory,
    ThreadState,
)
from fpxbench.targets.ptx_parser import Instruction, Kernel, Unmodelled, parse

WARP = 32
MAX_STEPS = 200_000
"""Instructions of one thread; a loop that runs longer is not modelled."""
_LOCAL, _LOCAL_SIZE = 1 << 20, 1 << 12


Block = tuple[int, int, int]
FIRST_BLOCK: tuple[Block, ...] = ((0, 0, 0),)


def run(
    kernel: Kernel, arguments: Sequence[int], memory: Memory, threads: int, blocks: Sequence[Block] = FIRST_BLOCK,
) -> None:
    """Run those blocks of a grid on global `memory`; parameters beyond `arguments` are 0.

    Raises Unmodelled, and Miscompiled for a race in shared memory and for a result that depends on an undefined value.
    """
    before = replace(memory, bytes_=dict(memory.bytes_))
    if _run_blocks(kernel, arguments, memory, threads, blocks, 0):
        _run_blocks(kernel, arguments, before, threads, blocks, -1)
        if before.bytes_ != memory.bytes_:
            raise Miscompiled("a result depends on a register or on shared memory that was never written")


def _run_blocks(
    kernel: Kernel, arguments: Sequence[int], memory: Memory, threads: int, blocks: Sequence[Block], undefined: int,
) -> bool:
    """Run every block; return whether an undefined value was read."""
    return any([_run_block(kernel, arguments, memory, threads, block, undefined) for block in blocks])


def _run_block(
    kernel: Kernel, arguments: Sequence[int], memory: Memory, threads: int, block: Block, undefined: int,
) -> bool:
    parameters = dict.fromkeys(kernel.parameters, 0) | dict(zip(kernel.parameters, arguments, strict=False))
    symbols = {name: _LOCAL + at * _LOCAL_SIZE for at, name in enumerate(kernel.local_arrays)}
    if len(kernel.shared_arrays) > 1:
        raise Unmodelled(f"{len(kernel.shared_arrays)} arrays in shared memory")
    symbols |= dict.fromkeys(kernel.shared_arrays, SHARED)
    symbols |= {f"%ctaid.{axis}": at for axis, at in zip("xyz", block, strict=True)}
    shared = SharedMemory()
    states = [
        ThreadState(symbols | {"%tid.x": thread, "%laneid": thread % WARP}, parameters, memory, shared, Memory(),
                    thread // WARP, undefined)
        for thread in range(threads)
    ]
    running = {thread: _steps(kernel, state) for thread, state in enumerate(states)}
    waiting: dict[int, Instruction] = {}
    while running:
        for thread in [thread for thread in running if thread not in waiting]:
            instruction = next(running[thread], None)
            if instruction is None:
                del running[thread]
            else:
                waiting[thread] = instruction
        if running and not _release(states, running.keys(), waiting, shared):
            raise Unmodelled(f"threads that wait for each other, one at {next(iter(waiting.values())).text}")
    return any(state.read_undefined for state in states)


def _release(states: list[ThreadState], running, waiting: dict[int, Instruction], shared: SharedMemory) -> bool:
    """Perform the collective instructions at which all their threads wait; return whether there was any."""
    released = False
    for warp in {thread // WARP for thread in waiting}:
        lanes = [thread for thread in running if thread // WARP == warp]
        at = {waiting.get(lane) for lane in lanes}
        instruction = next(iter(at))
        if len(at) == 1 and instruction is not None and not _is_barrier(instruction):
            _WARP_INSTRUCTIONS[instruction.name](instruction, [states[lane] for lane in lanes])
            for lane in lanes:
                del waiting[lane]
            released = True
    if not released and running and set(running) == set(waiting) and all(map(_is_barrier, waiting.values())):
        waiting.clear()
        shared.synchronise()
        released = True
    return released


def _is_barrier(instruction: Instruction) -> bool:
    return instruction.name in ("bar", "barrier") and "warp" not in instruction.modifiers


def _warp_barrier(i: Instruction, lanes: list[ThreadState]) -> None:
    """Do nothing: all lanes are executed in step."""


def _shuffle(i: Instruction, lanes: list[ThreadState]) -> None:
    """Execute ``shfl.sync.bfly`` or ``.idx`` over a whole warp: each lane receives another lane's value."""
    to, source, by, clamp, _ = i.names
    modes = {"bfly": lambda lane, by: lane ^ by, "idx": lambda lane, by: by}
    if len(i.modifiers) != 3 or i.modifiers[1] not in modes or len(lanes) != WARP:
        raise Unmodelled(i.text)
    values = [state.read(source, 32) for state in lanes]
    for lane, state in enumerate(lanes):
        if state.read(clamp, 32) != WARP - 1:
            raise Unmodelled(i.text)
        state.write(to.split("|")[0], values[modes[i.modifiers[1]](lane, state.read(by, 32)) % WARP], 32)


def _matrices(i: Instruction, lanes: list[ThreadState]) -> None:
    """Execute ``ldmatrix`` and ``stmatrix``: move 8 × 8 matrices of 16-bit elements between shared memory and a warp's
    registers.

    Lane 8 j + r has the address of row r of matrix j. Of each matrix lane l has elements 2 (l mod 4) and the next of
    row l div 4; with ``.trans`` row and column change places.
    """
    shape = tuple(modifier for modifier in i.modifiers if modifier not in ("trans", "x1", "x2", "x4"))
    count = next((int(modifier[1]) for modifier in i.modifiers if modifier in ("x1", "x2", "x4")), 1)
    loads = i.name == "ldmatrix"
    registers, address = i.operands if loads else reversed(i.operands)
    registers = registers if isinstance(registers, tuple) else (registers,)
    if shape != ("sync", "aligned", "m8n8", "shared", "b16") or len(lanes) != WARP or len(registers) != count \
            or isinstance(address, tuple):
        raise Unmodelled(i.text)
    addresses = [state.address(address) for state in lanes]     # a loaded register may be the address's own
    for number, register in enumerate(registers):
        rows = addresses[8 * number:8 * number + 8]
        for lane, state in enumerate(lanes):
            for half in (0, 1):
                row, column = lane // 4, 2 * (lane % 4) + half
                if "trans" in i.modifiers:
                    row, column = column, row
                if loads:
                    kept = state.read(register, 32) & 0xFFFF if half else 0
                    state.write(register, kept | state.load(rows[row] + 2 * column, 2) << (16 * half), 32)
                else:
                    state.store(rows[row] + 2 * column, state.read(register, 32) >> (16 * half), 2)


_WARP_INSTRUCTIONS = {"bar": _warp_barrier, "shfl": _shuffle, "ldmatrix": _matrices, "stmatrix": _matrices}


def _steps(kernel: Kernel, state: ThreadState) -> Iterator[Instruction]:
    """Run one thread to its end, yielding each instruction at which it has to wait for others."""
    position = steps = 0
    while position < len(kernel.instructions):
        i = kernel.instructions[position]
        position, steps = position + 1, steps + 1
        if steps > MAX_STEPS:
            raise Unmodelled(f"a thread of more than {MAX_STEPS} instructions")
        try:
            if i.predicate and bool(state.read(i.predicate.lstrip("!"), 1)) == i.predicate.startswith("!"):
                continue
            if i.name in ("ret", "exit"):
                return
            if i.name == "bra":
                position = kernel.labels[i.names[-1]]
            elif i.name in _WARP_INSTRUCTIONS or _is_barrier(i):
                if i.name in ("bar", "barrier") and ("sync" not in i.modifiers or i.modifiers[0] != "warp"
                                                     and i.operands != ("0",)):
                    raise Unmodelled(i.text)
                yield i
            else:
                INSTRUCTIONS[i.name](state, i)
        except Unmodelled:
            raise
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise Unmodelled(i.text) from error


# Conversions.


def converted(
    ptx: str, numbers: Sequence[int], source_bytes: int, out_bytes: int, elements_a_thread: int, threads: int = 32,
) -> list[int]:
    """Return what a kernel ``(source, out)`` converts the elements of `source` to; both are bits.

    As many blocks of `threads` run as necessary; the last is padded with zeros. Raises Unmodelled, also if a result was
    not written.
    """
    source, out = GLOBAL, 2 * GLOBAL
    in_a_block = elements_a_thread * threads
    blocks = -(-len(numbers) // in_a_block)
    memory = Memory()
    for at in range(blocks * in_a_block):
        memory.write(source + at * source_bytes, numbers[at] if at < len(numbers) else 0, source_bytes)
    run(parse(ptx), (source, out), memory, threads, [(block, 0, 0) for block in range(blocks)])
    return [memory.read(out + at * out_bytes, out_bytes) for at in range(len(numbers))]


def decoded_table(ptx: str, out: Format, codes_a_thread: int, threads: int = 32) -> list[float]:
    """Return what each of the 256 codes becomes in a kernel that converts bytes to `out`. Raises Unmodelled."""
    return [out.value(bits) for bits in converted(ptx, range(256), 1, out.bits // 8, codes_a_thread, threads)]
