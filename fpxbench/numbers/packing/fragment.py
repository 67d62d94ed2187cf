"""Fragments: codes in the order in which the threads of a matrix instruction read a weight, for every width.

A tile is 8 rows of the weight by 128 columns, in 32 lanes, those of a warp. Lane ``4 * r + q`` has, of row r, the
columns ``32 * j + 8 * q + i`` for j in 0..3 and i in 0..7: 32 codes, in as many 32-bit words as a code has bits. Two
neighbours (i = 2 w, 2 w + 1) are a *pair*, number ``4 * j + w``, one in each half of a word, since one 32-bit operation
decodes both. Within a half, the bits are placed so that few shifts bring them to their position in a bfloat16. This
depends on the mantissa bits, so there is a layout for each number of mantissa bits, and one for integers.

In the layouts named ``fragment_quad``, the pairs with the same w share words (`quad_moves`). A lane then reads the
words with its w from all four lanes of a row, and decodes one pair of neighbouring columns from each. Together the four
lanes hold 8 columns in their order in memory, which is how `ldmatrix` distributes an activation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from fpxbench.numbers.packing import layout
from fpxbench.numbers.packing.layout import Layout, parts
from fpxbench.numbers.packing.quad_pieces import QUAD_PIECES

TILE_N, TILE_K, LANES, PAIRS = 8, 128, 32, 16
BF16_MANTISSA = 7
SIGN = 15
"""The sign's bit in a half."""
SEPARATE, QUAD = "fragment", "fragment_quad"
PIECE = re.compile(r"(\d)([+-]\d+):([0-9a-f]+)")
QUAD_PAIRS = 4
"""Number of pairs of a lane with the same w."""


@dataclass(frozen=True)
class Shared:
    """The part of a word that holds the pairs of one w: in word ``first + w // owners``, `bits` bits of each half from
    bit ``bits * (w % owners)`` up."""

    first: int
    owners: int

    @property
    def bits(self) -> int:
        return 16 // self.owners


@dataclass(frozen=True)
class Move:
    """Bits `mask` of a decoded half, which lie `shift` bits lower in a half of word `word` (higher where negative)."""

    word: int
    shift: int
    mask: int


Moves = tuple[tuple[Move, ...], ...]
"""The pieces that each pair is assembled from."""


def name_for(mantissa_bits: int | None) -> str:
    """Return the name of the layout that kernels take, for sign-magnitude codes of that many mantissa bits, or for
    integers (None)."""
    return f"{QUAD}_int" if mantissa_bits is None else f"{QUAD}_m{mantissa_bits}"


@cache
def fragment_named(name: str) -> Layout | None:
    """Return the layout ``fragment_int``, ``fragment_m0`` to ``fragment_m6``, or ``fragment_quad_int`` and so on; None
    for another name."""
    kind, _, numbers = name.rpartition("_")
    known = {"int": None, **{f"m{bits}": bits for bits in range(BF16_MANTISSA)}}
    if kind not in (SEPARATE, QUAD) or numbers not in known:
        return None
    mantissa_bits = known[numbers]
    lowest = 1 if mantissa_bits is None else mantissa_bits + 1
    laid_out = quad_moves if kind == QUAD else moves
    return Layout(
        name,
        "32 codes of a row per lane, in the order of a matrix instruction's threads; a pair is decoded at once",
        widths=tuple(range(lowest, 9)),
        row_bytes=lambda k, bits: -(-k // TILE_K) * TILE_K * bits // 8,
        write=lambda codes, bits, packed: _write(codes, placed_bits(bits, mantissa_bits), packed, laid_out),
        read=lambda packed, bits, codes: _read(packed, placed_bits(bits, mantissa_bits), codes, laid_out),
        tile=TILE_N,
        row_tile=TILE_N,
    )


def placed_bits(bits: int, mantissa_bits: int | None, float_mantissa: int = BF16_MANTISSA) -> tuple[int, ...]:
    """Return where each bit of a code, from the lowest up, lies in a decoded half: a 16-bit float's places, the sign
    on top; or the lowest bits, for integers (`mantissa_bits` None)."""
    if mantissa_bits is None:
        return tuple(range(bits))
    shift = float_mantissa - mantissa_bits
    return (*(bit + shift for bit in range(bits - 1)), SIGN)


def planes(bits: int) -> tuple[int, ...]:
    """Return the number of consecutive words of a lane in each plane, so that a lane loads 16, 8 or 4 bytes at once:
    ``6 -> (4, 2)``."""
    cut, left = [], bits
    for width in (4, 4, 2, 1):
        if left >= width:
            cut.append(width)
            left -= width
    return tuple(cut)


def shared_words(bits: int) -> tuple[Shared, ...]:
    """Return the words that hold the pairs of one w in a quad layout: one word of a plane of four, half a word of a
    plane of two, a quarter of a word of a plane of one."""
    starts = [sum(planes(bits)[:number]) for number in range(len(planes(bits)))]
    return tuple(Shared(start, 4 // count) for start, count in zip(starts, planes(bits), strict=True))


@cache
def moves(placed: tuple[int, ...]) -> Moves:
    """Return how each of the 16 pairs is assembled from the words, for codes whose bits go to `placed`.

    As many pairs as fit are whole: one shift and one mask. The others are assembled from the remaining bits.
    """
    free = [set(range(16)) for _ in placed]
    pairs: list[tuple[Move, ...]] = []
    mask = sum(1 << bit for bit in placed)
    for word in range(len(placed)):
        for shift in _whole(placed):
            if len(pairs) < PAIRS:
                pairs.append((Move(word, shift, mask),))
                free[word] -= {bit - shift for bit in placed}
    while len(pairs) < PAIRS:
        pairs.append(_pieced(placed, free))
    return tuple(pairs)


@cache
def own_moves(placed: tuple[int, ...]) -> Moves:
    """Return how the four pairs (j = 0..3) of one w are assembled in a quad layout; word i stands for the part of
    ``shared_words(bits)[i]`` that this w has, shifted down to bit 0."""
    bits = len(placed)
    return tuple(tuple(Move(int(word), int(shift), int(mask, 16)) for word, shift, mask in PIECE.findall(pair))
                 for pair in QUAD_PIECES[bits, _mantissa_bits(placed)].split(";"))


@cache
def quad_moves(placed: tuple[int, ...]) -> Moves:
    """Return how each of the 16 pairs is assembled from the words in a quad layout."""
    shared = shared_words(len(placed))
    return tuple(tuple(_of_lane(move, shared[move.word], w) for move in own_moves(placed)[j])
                 for j in range(QUAD_PAIRS) for w in range(QUAD_PAIRS))


def _of_lane(move: Move, shared: Shared, w: int) -> Move:
    """Return a move of pairs of `w` as one of the lane's words."""
    return Move(shared.first + w // shared.owners, move.shift - shared.bits * (w % shared.owners), move.mask)


def _mantissa_bits(placed: tuple[int, ...]) -> int | None:
    """Return the mantissa bits of the codes that `placed_bits` gives these places (None: integers)."""
    return next(mantissa for mantissa in (None, *range(BF16_MANTISSA)) if placed_bits(len(placed), mantissa) == placed)


def moves_for(placed: tuple[int, ...], stored: tuple[int, ...], laid_out: Moves) -> Moves:
    """Return the moves that bring pairs `laid_out` for the places `stored` to the places `placed` (fp16's instead of
    bf16's)."""
    if placed == stored:
        return laid_out
    pairs = []
    for pair in laid_out:
        pieces: dict[tuple[int, int], int] = {}
        for move in pair:
            for bit, place in enumerate(stored):
                if move.mask >> place & 1:
                    key = (move.word, placed[bit] - (place - move.shift))
                    pieces[key] = pieces.get(key, 0) | 1 << placed[bit]
        pairs.append(tuple(Move(word, shift, mask) for (word, shift), mask in pieces.items()))
    return tuple(pairs)


def _whole(placed: tuple[int, ...]) -> tuple[int, ...]:
    """Return the largest set of shifts, 0 included, under which copies of `placed` fit into 16 bits without overlap."""
    fitting = [shift for shift in range(-15, 16) if all(0 <= bit - shift < 16 for bit in placed)]
    for count in range(16 // len(placed), 0, -1):
        for chosen in combinations(fitting, count):
            places = {bit - shift for shift in chosen for bit in placed}
            if 0 in chosen and len(places) == count * len(placed):
                return chosen
    return ()


def _pieced(placed: tuple[int, ...], free: list[set[int]]) -> tuple[Move, ...]:
    """Assemble one pair from the `free` bits, the longest piece first, and remove them from `free`."""
    wanted, pieces = set(placed), []
    while wanted:
        covered, word, shift = max(
            ((frozenset(bit for bit in wanted if bit - shift in free[word]), word, shift)
             for word in range(len(free)) for shift in range(-15, 16)),
            key=lambda piece: (len(piece[0]), piece[2] == 0, -abs(piece[2]), -piece[1]),
        )
        pieces.append(Move(word, shift, sum(1 << bit for bit in covered)))
        free[word] -= {bit - shift for bit in covered}
        wanted -= covered
    return tuple(pieces)


def _write(codes: Tensor, placed: tuple[int, ...], packed: Tensor, laid_out: Callable[[tuple[int, ...]], Moves]
           ) -> None:
    for pairs, words in _parts(codes, placed, packed):
        lane_words = [torch.zeros(pairs.shape[2:], dtype=torch.int32, device=codes.device) for _ in placed]
        for number, pair in enumerate(laid_out(placed)):
            # An even column's code in the lower half, its neighbour's in the upper one.
            lanes = _spread(pairs[number // 4, number % 4], placed)
            for move in pair:
                stored = move.mask >> move.shift if move.shift >= 0 else move.mask << -move.shift
                lane_words[move.word] |= _shifted(lanes & _both(move.mask), -move.shift) & _both(stored)
        for word, filled in zip(words, lane_words, strict=True):
            word.copy_(filled)


def _read(packed: Tensor, placed: tuple[int, ...], codes: Tensor, laid_out: Callable[[tuple[int, ...]], Moves]
          ) -> None:
    for pairs, words in _parts(codes, placed, packed, read=True):
        for number, pair in enumerate(laid_out(placed)):
            lanes = torch.zeros(pairs.shape[2:], dtype=torch.int32, device=codes.device)
            for move in pair:
                lanes |= _shifted(words[move.word], move.shift) & _both(move.mask)
            gathered = torch.zeros_like(lanes)
            for bit, place in enumerate(placed):
                gathered |= ((lanes >> place) & 0x10001) << bit
            pairs[number // 4, number % 4] = (gathered | (gathered >> 8)).to(torch.int16)


def _parts(codes: Tensor, placed: tuple[int, ...], packed: Tensor, read: bool = False
           ) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield a few rows of tiles at a time: their codes, two neighbours to an int16 [4 j, 4 w, N/8, K/128, 8, 4], and
    the words of the lanes, int32 [N/8, K/128, 8, 4] each. With `read`, the caller fills in the codes, which are then
    copied to `codes`."""
    n, k = codes.shape
    k_tiles = -(-k // TILE_K)
    flat = packed.view(torch.int32).view(n // TILE_N, k_tiles, LANES * len(placed))
    for rows in parts(n // TILE_N, layout.CPU_GRAIN // (k_tiles * TILE_N * TILE_K), codes.device):
        own = slice(rows.start * TILE_N, rows.stop * TILE_N)
        whole = torch.nn.functional.pad(codes[own], (0, k_tiles * TILE_K - k)).contiguous()
        pairs = whole.view(torch.int16).view(-1, TILE_N, k_tiles, 4, 4, 4).permute(3, 5, 0, 2, 1, 4)
        words, start = [], 0
        for count in planes(len(placed)):
            plane = flat[rows, :, LANES * start:LANES * (start + count)].unflatten(2, (TILE_N, 4, count))
            words += plane.unbind(-1)
            start += count
        yield pairs, words
        if read:
            codes[own] = whole[:, :k]


def _both(mask: int) -> int:
    """Return a mask of both halves as a signed int32."""
    both = mask * 0x10001
    return both - (1 << 32) if both >> 31 else both


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Return int32 words shifted left; for a negative `shift` right, with sign extension, which the caller masks."""
    return words << shift if shift >= 0 else words >> -shift


def _spread(pairs: Tensor, placed: tuple[int, ...]) -> Tensor:
    """Return int32 lanes with the bits of both codes of int16 `pairs` at `placed`."""
    both = pairs.to(torch.int32) & 0xFFFF
    both = (both | (both << 8)) & 0xFF00FF
    lanes = torch.zeros_like(both)
    for bit, place in enumerate(placed):
        lanes |= ((both >> bit) & 0x10001) << place
    return lanes
