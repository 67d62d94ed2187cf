"""The layouts' definitions, one bit at a time: where does bit t of the code at row n, column k lie?

Each function returns the byte, of all bytes, and the bit of it.
"""

from functools import partial

import torch

from fpxbench.numbers.packing import row_bytes


def planar(shape, bits, n, k, t):
    padded = (shape[1] + 31) // 32 * 32
    start = n * padded * bits // 8
    for width in (8, 4, 2, 1):
        if bits >= width:
            bits -= width
            if t < width:
                plane, byte = divmod(k, padded * width // 8)
                return start + byte, plane * width + t
            t, start = t - width, start + padded * width // 8
    raise AssertionError("a code has more bits than its pieces")


def bytes_(shape, bits, n, k, t):
    return n * shape[1] + k, t


def nibbles_low_first(shape, bits, n, k, t):
    return n * ((shape[1] + 1) // 2) + k // 2, t + (4 if k % 2 else 0)


def nibbles_high_first(shape, bits, n, k, t):
    return n * ((shape[1] + 1) // 2) + k // 2, t + (0 if k % 2 else 4)


def bitstream(shape, bits, n, k, t):
    codes = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}[bits]      # the fewest that fill whole bytes
    row = (shape[1] + codes - 1) // codes * codes * bits // 8
    byte, bit = divmod(k * bits + t, 8)
    return n * row + byte, bit


def torchao_fp6(shape, bits, n, k, t):
    start, which = n * ((shape[1] + 3) // 4 * 3) + k // 4 * 3, k % 4
    if t >= 2:
        return start + which // 2, t - 2 + (4 if which in (0, 3) else 0)
    return start + 2, t + 2 * {0: 3, 1: 2, 3: 1, 2: 0}[which]


# FP6-LLM's "pre-defined order for bit-interleaving": which field of a word is its first, second, … from the top,
# counted from one.
FP6_LLM_ORDER = {
    1: [2, 6, 10, 14, 18, 22, 26, 30, 4, 8, 12, 16, 20, 24, 28, 32, 1, 5, 9, 13, 17, 21, 25, 29, 3, 7, 11, 15, 19,
        23, 27, 31],
    2: [2, 6, 10, 14, 4, 8, 12, 16, 1, 5, 9, 13, 3, 7, 11, 15],
    4: [2, 6, 4, 8, 1, 5, 3, 7],
}


def fp6_llm(shape, bits, n, k, t):
    """Return (byte, bit) as the authors' prepacking places it: segments cut from the top bit down, dealt out to the 32
    threads tile by tile, four bytes of each thread in turn, and the fields of each word put in another order."""
    rows, columns = shape
    tile = n // 64 * (columns // 16) + k // 16
    thread = n % 8 * 4 + k % 8 // 2
    turn = (((tile * 4 + n % 64 // 16) * 2 + k % 16 // 8) * 2 + n % 16 // 8) * 2 + k % 2
    start, top = 0, bits
    for width in (1, 2, 4):
        if bits & width:
            top -= width
            if t >= top:
                word, field = divmod(turn, 32 // width)
                from_top = FP6_LLM_ORDER[width].index(field + 1)
                bit = 32 - width * (from_top + 1) + t - top
                return start + (word * 32 + thread) * 4 + bit // 8, bit % 8
            start += rows * columns * width // 8
    raise AssertionError("a code has more bits than its segments")


# A fragment's 16 pairs, number 4 j + w: of each of its pieces, the lowest bit of the code, how many, the word, and the
# bit of the word's half.
FRAGMENT_PAIRS = {
    ("fragment_m3", 8): (*([(0, 7, word, 4), (7, 1, word, 15)] for word in range(8)),
                         *([(0, 4, word, 0), (7, 1, word, 11), (4, 3, word + 1, 11)] for word in (0, 2, 4, 6)),
                         *([(0, 4, word + 1, 0), (7, 1, word + 1, 14), (4, 3, word, 12)] for word in (0, 2, 4, 6))),
    ("fragment_m2", 6): (
        *([(0, 5, word, 5 - shift), (5, 1, word, 15 - shift)] for word in range(6) for shift in (0, 5)),
        *([(1, 4, word, 11), (5, 1, word + 1, 14), (0, 1, word + 1, 11)] for word in (0, 2, 4)),
        [(3, 2, 1, 12), (1, 2, 3, 12), (5, 1, 5, 13), (0, 1, 5, 12)],
    ),
    ("fragment_m1", 4): (
        *([(0, 3, word, 6 - shift), (3, 1, word, 15 - shift)] for word in range(4) for shift in (0, 3, 6)),
        [(1, 2, 0, 10), (3, 1, 0, 14), (0, 1, 1, 10)], [(1, 2, 2, 10), (3, 1, 1, 14), (0, 1, 3, 10)],
        [(0, 1, 1, 11), (2, 1, 1, 13), (3, 1, 2, 14), (1, 1, 3, 11)], [(1, 2, 3, 13), (3, 1, 0, 13), (0, 1, 2, 13)]
    ),
    ("fragment_int", 8): tuple([(0, 8, pair // 2, 0 if pair % 2 else 8)] for pair in range(16)),
    ("fragment_quad_m3", 8): (
        *([(0, 7, word, 4), (7, 1, word, 15)] for word in range(8)),
        *([(0, 4, word, 0), (7, 1, word, 11), (4, 3, word, 12)] for word in range(8)),
    ),
    ("fragment_quad_m2", 6): (
        *([(0, 5, w, 5 - shift), (5, 1, w, 15 - shift)] for shift in (0, 5) for w in range(4)),
        *([(0, 5, 4 + w // 2, 2 + w % 2 * 8), (5, 1, w, 14)] for w in range(4)),
        *([(0, 3, w, 11), (3, 2, 4 + w // 2, w % 2 * 8), (5, 1, 4 + w // 2, 7 + w % 2 * 8)] for w in range(4)),
    ),
    ("fragment_quad_m1", 4): (
        *([(0, 3, w, 6 - shift), (3, 1, w, 15 - shift)] for shift in (0, 3, 6) for w in range(4)),
        *([(0, 1, w, 11), (1, 1, w, 10), (2, 1, w, 13), (3, 1, w, 14)] for w in range(4)),
    ),
    ("fragment_quad_int", 8): tuple([(0, 8, w + plane, bit)] for plane in (0, 4) for bit in (8, 0) for w in range(4)),
}
FRAGMENTS = list(FRAGMENT_PAIRS)


def fragment(layout, shape, bits, n, k, t):
    """Return tiles of 8 rows by 128 columns; lane 4 (n % 8) + k % 32 // 8 has 32 codes of a row in `bits` words, which
    lie by planes of 4, 2 and 1 words a lane."""
    tile, lane = n // 8 * ((shape[1] + 127) // 128) + k // 128, n % 8 * 4 + k % 32 // 8
    pair, half = k % 128 // 32 * 4 + k % 8 // 2, k % 2
    word, bit = next((word, bit + t - low) for low, count, word, bit in FRAGMENT_PAIRS[layout, bits][pair]
                     if low <= t < low + count)
    planes = {8: (4, 4), 6: (4, 2), 4: (4,)}[bits]
    before = 0 if word < planes[0] else planes[0]
    width = planes[0] if word < planes[0] else planes[1]
    number = tile * 32 * bits + before * 32 + lane * width + word - before
    return number * 4 + 2 * half + bit // 8, bit % 8


DEFINED = {
    "planar": planar,
    "bytes": bytes_,
    "nibbles_low_first": nibbles_low_first,
    "nibbles_high_first": nibbles_high_first,
    "bitstream": bitstream,
    "torchao_fp6": torchao_fp6,
    "fp6_llm": fp6_llm,
}


def places(layout, bits, shape):
    """Return (byte, bit) of every bit of every code, int64 [N, K, bits] each."""
    definition = DEFINED.get(layout) or partial(fragment, layout)
    where = [
        definition(shape, bits, n, k, t) for n in range(shape[0]) for k in range(shape[1]) for t in range(bits)
    ]
    byte, bit = torch.tensor(where).T
    return byte.reshape(*shape, bits), bit.reshape(*shape, bits)


def written_by_definition(layout, bits, codes):
    byte, bit = places(layout, bits, codes.shape)
    written = torch.zeros(codes.shape[0] * row_bytes(codes.shape[1], bits, layout), dtype=torch.int64)
    set_bits = (codes.long()[..., None] >> torch.arange(bits)) & 1
    written.index_add_(0, byte.reshape(-1), (set_bits << bit).reshape(-1))
    return written.to(torch.uint8).reshape(codes.shape[0], -1)


def read_by_definition(layout, bits, packed, k):
    byte, bit = places(layout, bits, (packed.shape[0], k))
    return (((packed.reshape(-1).long()[byte] >> bit) & 1) << torch.arange(bits)).sum(dim=2).to(torch.uint8)
