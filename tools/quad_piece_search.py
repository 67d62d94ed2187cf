"""Search for the pieces of `fpxbench/numbers/packing/quad_pieces.py` and print the table; a minute or two.

    python tools/quad_piece_search.py [BITS MANTISSA_BITS]

Stored bytes depend on that table: it is not to be replaced by another that this search might find.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from fpxbench.numbers.packing.fragment import (
    BF16_MANTISSA,
    QUAD_PAIRS,
    Move,
    Moves,
    Shared,
    _of_lane,
    _whole,
    placed_bits,
    shared_words,
)

Free = tuple[frozenset[int], ...]
MOST_PIECES = 4
KEPT = 40
"""States with the fewest operations that are looked at further, after each pair."""


def operations(move: Move, shared: Shared) -> int:
    """Return the shifts and masks of a move for the four w's: in the kernel in which all are alike, and at their places
    in a lane's words."""
    lanes = [_of_lane(move, shared, w) for w in range(QUAD_PAIRS)]
    return QUAD_PAIRS * (1 + (move.shift != 0)) + sum(1 + (lane.shift != 0) for lane in lanes)


def cuts(wanted: frozenset[int], free: Free, moves: tuple[Move, ...] = ()) -> Iterator[tuple[tuple[Move, ...], Free]]:
    """Yield every way to put a pair's bits `wanted` together from at most MOST_PIECES pieces, each as long as it can
    be, and what is left of the words."""
    if not wanted:
        yield moves, free
    elif len(moves) < MOST_PIECES:
        top = max(wanted)
        for word, bits in enumerate(free):
            for shift in (top - bit for bit in sorted(bits, reverse=True)):
                covered = frozenset(bit for bit in wanted if bit - shift in bits)
                left = (*free[:word], bits - {bit - shift for bit in covered}, *free[word + 1:])
                yield from cuts(wanted - covered, left, (*moves, Move(word, shift, sum(1 << bit for bit in covered))))


def search(placed: tuple[int, ...]) -> Moves:
    """Return the four pairs of one w, for codes whose bits go to `placed`, with the fewest operations found."""
    words = shared_words(len(placed))
    free = tuple(frozenset(range(shared.bits)) for shared in words)
    pairs: Moves = ()
    for word, shared in enumerate(words):
        for shift in _whole(placed) if shared.owners == 1 else ():
            if len(pairs) < QUAD_PAIRS:
                pairs += ((Move(word, shift, sum(1 << bit for bit in placed)),),)
                left = free[word] - {bit - shift for bit in placed}
                free = (*free[:word], left, *free[word + 1:])
    states = {free: (0, pairs)}
    for _ in range(QUAD_PAIRS - len(pairs)):
        found: dict[Free, tuple[int, Moves]] = {}
        for before, (cost, made) in states.items():
            for cut, left in cuts(frozenset(placed), before):
                total = cost + sum(operations(move, words[move.word]) for move in cut)
                candidate = (total, (*made, cut))
                if left not in found or _order(candidate) < _order(found[left]):
                    found[left] = candidate
        states = dict(sorted(found.items(), key=lambda item: _order(item[1]))[:KEPT])
    return min(states.values(), key=_order)[1]


def _order(state: tuple[int, Moves]) -> tuple[int, list[tuple[int, int, int]]]:
    """Return what states are sorted by: their operations, then their moves."""
    return state[0], [(move.word, move.shift, move.mask) for pair in state[1] for move in pair]


def written(pairs: Moves) -> str:
    """Return the pairs as the table has them."""
    return "; ".join(" ".join(f"{move.word}{move.shift:+d}:{move.mask:x}" for move in pair) for pair in pairs)


if __name__ == "__main__":
    every: list[tuple[int, int | None]] = [
        (bits, mantissa) for bits in range(1, 9) for mantissa in (None, *range(min(BF16_MANTISSA, bits)))]
    for key in [(int(sys.argv[1]), int(sys.argv[2]))] if len(sys.argv) > 1 else every:
        print(f'    {key}: "{written(search(placed_bits(*key)))}",', flush=True)
