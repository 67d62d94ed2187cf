"""Layouts that pack a few neighbours along K into a few bytes, as data: which bits of which code go where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.packing import layout
from fpxbench.numbers.packing.layout import Layout, by_rows, moved, padded, with_padding

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Field:
    """`width` bits of the group's code number `code`, from the code's bit `offset` up, at bit `at` of the group's bytes
    as one little-endian number."""

    code: int
    offset: int
    width: int
    at: int


@dataclass(frozen=True)
class BitGroup:
    """The places of `codes` neighbours (1, 2, 4 or 8) in `size` bytes."""

    codes: int
    size: int
    fields: tuple[Field, ...]


def stream(bits: int) -> BitGroup:
    """Return the group of codes one after the other, each from its low bit up."""
    codes = next(codes for codes in (1, 2, 4, 8) if codes * bits % 8 == 0)
    return BitGroup(codes, codes * bits // 8, tuple(Field(i, 0, bits, i * bits) for i in range(codes)))


_HIGH_NIBBLE_FIRST = BitGroup(2, 1, (Field(0, 0, 4, 4), Field(1, 0, 4, 0)))

_TORCHAO_FP6 = BitGroup(4, 3, (
    Field(1, 2, 4, 0), Field(0, 2, 4, 4), Field(2, 2, 4, 8), Field(3, 2, 4, 12),
    Field(2, 0, 2, 16), Field(3, 0, 2, 18), Field(1, 0, 2, 20), Field(0, 0, 2, 22),
))


# A group's codes are processed as one integer, a code in each of its bytes. This needs a little-endian machine, as are
# all that PyTorch has wheels for. No code of less than 8 bits reaches the sign.


def _write(codes: Tensor, group: BitGroup, packed: Tensor) -> None:
    count = packed.shape[1] // group.size
    words = padded(codes, count * group.codes).view(_WORDS[group.codes])
    number = torch.zeros_like(words)
    for field in group.fields:
        number |= moved(words, 8 * field.code + field.offset, field.at, field.width)
    if group.size == 1:
        packed.copy_(number)    # the lowest byte
    else:
        grouped = number.view(torch.uint8).view(-1, count, group.codes)
        packed.view(-1, count, group.size).copy_(grouped[:, :, :group.size])


def _read(packed: Tensor, group: BitGroup, codes: Tensor) -> None:
    count = packed.shape[1] // group.size
    whole = with_padding(codes, count * group.codes)
    words = whole.view(_WORDS[group.codes])
    if group.size == 1:
        number = packed.to(words.dtype)
    else:
        number = torch.zeros_like(words)
        grouped = number.view(torch.uint8).view(-1, count, group.codes)
        grouped[:, :, :group.size] = packed.view(-1, count, group.size)
    words.zero_()
    for field in group.fields:
        words |= moved(number, field.at, 8 * field.code + field.offset, field.width)
    if whole is not codes:
        codes.copy_(whole[:, :codes.shape[1]])


def _layout(name: str, description: str, widths: tuple[int, ...], group_of: Callable[[int], BitGroup]) -> Layout:
    """Return a layout whose rows are padded with zero codes to whole groups."""

    def row_bytes(k: int, bits: int) -> int:
        group = group_of(bits)
        return -(-k // group.codes) * group.size

    def codes_at_once(bits: int) -> int:
        """Return the number of codes per pass: that of `CPU_GRAIN` bytes of groups."""
        group = group_of(bits)
        return layout.CPU_GRAIN * group.codes // group.size

    return Layout(name, description, widths, row_bytes,
                  write=by_rows(lambda codes, bits, packed: _write(codes, group_of(bits), packed), codes_at_once),
                  read=by_rows(lambda packed, bits, codes: _read(packed, group_of(bits), codes), codes_at_once))


NIBBLES_LOW_FIRST = _layout(
    "nibbles_low_first", "two neighbours per byte, first in the low nibble", (4,), stream)
NIBBLES_HIGH_FIRST = _layout(
    "nibbles_high_first", "two neighbours per byte, first in the high nibble", (4,), lambda bits: _HIGH_NIBBLE_FIRST)
BITSTREAM = _layout(
    "bitstream", "code after code without a gap, each from its low bit up", tuple(range(1, 9)), stream)
TORCHAO_FP6 = _layout(
    "torchao_fp6", "four neighbours in three bytes: two bytes of their upper four bits, one of their lower two", (6,),
    lambda bits: _TORCHAO_FP6)
