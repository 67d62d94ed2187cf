"""Weights read and stored wrongly on purpose, written down apart from what looks for them: in numpy, bit by bit.

`read` and `store` are right unless told which faults to make; a fault is a keyword, and two at once are two keywords.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.weight import QuantizedWeight

# Numbers.


@cache
def numbers(fmt, *, bias=0, specials=None, flush=False, implicit_one=False, halved=False, unsigned=False,
            minus_zero_nan=False, nan_zero=False, dropped=0, complement=False):
    """Return what each code means, float64 [2**bits], not to be changed; `bias` is added to the format's."""
    if isinstance(fmt, Codebook):
        return np.array([fmt.value(code) for code in range(1 << fmt.bits)])
    specials = specials or fmt.specials
    out = np.zeros(1 << fmt.bits)
    for code in range(1 << fmt.bits):
        bits, mantissa_bits = code & ~((1 << dropped) - 1), fmt.mantissa_bits
        if fmt.twos_complement:
            out[code] = bits if unsigned or bits < 1 << (fmt.bits - 1) else bits - (1 << fmt.bits)
            continue
        sign_bit = bits >> (fmt.bits - 1) & 1
        if complement and sign_bit and bits != 1 << (fmt.bits - 1):     # two's, where the format has a sign bit
            bits = (1 << fmt.bits) - bits
        exponent = bits >> mantissa_bits & ((1 << fmt.exponent_bits) - 1)
        fraction = (bits & ((1 << mantissa_bits) - 1)) / 2**mantissa_bits
        e0 = fmt.bias + bias
        if exponent:
            number = (1 + fraction) * 2.0 ** (exponent - e0)
        elif flush:
            number = 0.0
        elif implicit_one and fraction:
            number = (1 + fraction) * 2.0 ** (1 - e0)
        else:
            number = fraction * 2.0 ** (1 - e0) / (2 if halved else 1)
        top, ones = (
            exponent == (1 << fmt.exponent_bits) - 1,
            bits & ((1 << (fmt.bits - 1)) - 1) == (1 << (fmt.bits - 1)) - 1,
        )
        if specials == "ieee" and top:
            number = np.nan if fraction else np.inf
        if (specials == "fn" and ones) or (specials == "fnuz" and sign_bit and not exponent and not fraction) \
                or (minus_zero_nan and sign_bit and not exponent and not fraction):
            number = np.nan
        if nan_zero and np.isnan(number):
            number = 0.0
        out[code] = -number if sign_bit and not unsigned else number
    return out


# Bytes.


def bits_of_planar(k, bits):
    """Return byte and bit, [K, bits] each, of every bit of a row of planar codes."""
    k_pad = -(-k // 32) * 32
    byte, bit = np.zeros((k, bits), int), np.zeros((k, bits), int)
    at, start = 0, 0
    for width in (8, 4, 2, 1):
        if bits - at < width:
            continue
        size = k_pad * width // 8
        for j in range(width):
            byte[:, at + j] = start + np.arange(k) % size
            bit[:, at + j] = np.arange(k) // size * width + j
        at, start = at + width, start + size
    return byte, bit


def codes_in(
    packed,
    fmt,
    layout,
    k,
    *,
    nibbles=False,
    planes=False,
    neighbours=False,
    pairs=False,
    code_nibbles=False,
    pieces=False,
    column_map=None,
    code_row_map=None,
    weight_transposed=False,
    bit_order=None,
    inverted=0,
):
    """Return uint8 codes [N, K] from bytes."""
    bits = fmt.bits
    if layout == "bytes":
        codes = packed[:, :k].astype(np.int64)
    else:
        byte, bit = bits_of_planar(k, bits)
        widths = [w for i, w in enumerate((8, 4, 2, 1)) if bits & (8, 4, 2, 1)[i]]
        if nibbles:                     # the other half of each byte
            wide = np.arange(bits) < 4
            bit = np.where(wide, bit ^ 4, bit)
        if planes:                      # fields of the narrowest piece from the top of the byte down
            width = widths[-1]
            narrow = np.arange(bits) >= bits - width
            bit = np.where(narrow, (8 - width - bit // width * width) + bit % width, bit)
        if neighbours:                  # weight after weight goes through one byte, low field first, or high
            at, start, k_pad = 0, 0, -(-k // 32) * 32
            for width in widths:
                for j in range(width):
                    byte[:, at + j] = start + np.arange(k) * width // 8
                    field = np.arange(k) * width % 8
                    bit[:, at + j] = (8 - width - field if neighbours == "high" else field) + j
                at, start = at + width, start + k_pad * width // 8
        codes, bit = np.zeros((len(packed), k), np.uint8), bit.astype(np.uint8)
        for j in range(bits):
            codes |= (packed[:, byte[:, j]] >> bit[:, j] & 1) << j
        codes = codes.astype(np.int64)
        if pieces:                      # the upper piece below the lower
            codes = (codes & 0xF) << (bits - 4) | codes >> 4
    if pairs:                           # k ^ 1; beyond the end is padding
        padded = np.pad(codes, ((0, 0), (0, k % 2)))
        codes = padded.reshape(len(packed), -1, 2)[:, :, ::-1].reshape(len(packed), -1)[:, :k]
    if code_nibbles:
        codes = (codes & 0xF) << 4 | codes >> 4
    if bit_order is not None:
        codes = sum((codes >> bit_order[j] & 1) << j for j in range(bits))
    codes = codes ^ inverted
    if column_map is not None:
        codes = codes[:, column_map]
    if code_row_map is not None:
        codes = codes[code_row_map]
    if weight_transposed and codes.shape[0] == codes.shape[1]:
        codes = codes.T
    return codes


# Scales.


def scale_numbers(
    weight,
    *,
    exponent=0,
    ratio=1.0,
    e4m3_bias=0,
    e4m3_flush=False,
    as_integer=False,
    by_shift=False,
    scale_dtype=None,
    power=1.0,
    clamp_scale=None,
    function=None,
):
    """Return what each stored block scale stands for, float64 [N or 1, G], the second level left out."""
    from fpxbench.numbers.formats import FORMATS
    scaling, stored = weight.scheme.scaling, weight.scales
    stored = (stored if scaling.scale_format.coded else stored.float()).numpy()
    if scaling.scale_format.powers_of_two:
        table = np.array([2.0 ** (code - 127) for code in range(255)] + [np.inf if by_shift else np.nan])
        if by_shift:
            table[0] = 0
        values = (np.arange(256.0) if as_integer else table)[stored] * 2.0**exponent
    elif scaling.has_tensor_scale:
        table = np.arange(256.0) if as_integer else numbers(FORMATS["e4m3fn"], bias=e4m3_bias, flush=e4m3_flush)
        if e4m3_bias == 1:      # as E4M3FNUZ, where 0x7f is 240 and no NaN
            table = np.where(np.isnan(table) & (np.arange(256) < 128), 240.0, table)
        values = table[stored]
    else:
        values = stored.astype(np.float64) * ratio
    if function is not None:        # any map of the stored bits, or of fp32 scales
        values = function(stored)
    if scale_dtype is not None:
        values = torch.from_numpy(values).float().to(scale_dtype).double().numpy()
    if clamp_scale is not None:
        values = np.clip(values, *clamp_scale)
    with np.errstate(all="ignore"):
        return values**power


def tiled(row, block, blocks):
    """Return the position of a block scale in the 128 x 4 tiles of tensor cores."""
    return (row // 128 * -(-blocks // 4) + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def factors_of(
    weight,
    *,
    no_scale=False,
    no_tensor_scale=False,
    no_block_scale=False,
    tensor_power=1.0,
    tensor_dtype=None,
    transposed=False,
    next_block=0,
    late=0,
    along_k=False,
    swizzled=False,
    shared_blocks=1,
    shared_rows=1,
    block_size=None,
    row_map=None,
    block_map=None,
    constant=None,
    **how,
):
    """Return what each weight is multiplied by, [N, K], by strides in memory as a kernel would."""
    (n, k), scaling = weight.shape, weight.scheme.scaling
    if no_scale:
        return np.ones((n, k))
    values = scale_numbers(weight, **how)
    if no_block_scale:
        values = np.ones(values.shape)
    if scaling.has_tensor_scale and not no_tensor_scale:
        stored = weight.tensor_scale if tensor_dtype is None else weight.tensor_scale.to(tensor_dtype)
        values = values * float(stored) ** (-tensor_power if scaling.divides else tensor_power)
    memory, blocks = values.reshape(-1), values.shape[1]
    # The row of the grid of scales, of which blocks that are several rows high have fewer.
    row = np.arange(n)[:, None] // (scaling.block_rows or n)
    column = np.clip(np.arange(k)[None, :] - late, 0, None)
    block = block_size or scaling.block
    group = np.minimum(column // block, blocks - 1) if block else np.zeros((1, k), int)
    group = group // shared_blocks * shared_blocks
    row = row // shared_rows * shared_rows
    if row_map is not None:
        row = row_map[row]
    if block_map is not None:
        group = block_map[group]
    if swizzled:
        memory = np.concatenate([memory, np.zeros(-(-n // 128) * 128 * (-(-blocks // 4) * 4))])
        at = tiled(row, group, blocks)
    elif along_k:
        at = np.broadcast_to(np.arange(k)[None, :], (n, k)) % len(memory)
    elif transposed:
        at = group * values.shape[0] + row
    else:
        at = (row * blocks + group + next_block) % memory.size
    factors = np.broadcast_to(memory[at % len(memory)], (n, k))
    if constant is not None:            # (rows, columns, number) in the place of their scales
        factors = factors.copy()
        factors[constant[:2]] = constant[2]
    return factors


_TABLE = ("bias", "specials", "flush", "implicit_one", "halved", "unsigned", "minus_zero_nan", "nan_zero", "dropped",
          "complement")
_CODES = ("nibbles", "planes", "neighbours", "pairs", "code_nibbles", "pieces", "column_map", "code_row_map",
          "weight_transposed", "bit_order", "inverted")


def read(weight: QuantizedWeight, **faults: Any) -> torch.Tensor:
    """Return float64 [N, K]: the stored weight as a reader sees it that makes `faults`."""
    fmt = weight.scheme.format
    output_roll, other = faults.pop("output_roll", 0), faults.pop("other_format", None)
    if other is not None:
        from fpxbench.numbers.formats import FORMATS
        table = numbers(FORMATS[other])
    else:
        table = numbers(fmt, **{key: faults.pop(key) for key in _TABLE if key in faults})
    codes = codes_in(weight.packed.numpy(), fmt, weight.layout, weight.shape[1],
                     **{key: faults.pop(key) for key in _CODES if key in faults})
    absolute = faults.pop("sign_lost", False)
    values = np.abs(table) if absolute else table
    return torch.from_numpy(np.roll(values[codes] * factors_of(weight, **faults), output_roll, axis=0))


# Encoders.


def nearest(values, fmt, *, rounding="even", overflow="saturate", table=None):
    """Return uint8 codes by looking for the neighbours of each float64 value among the format's numbers, ordered."""
    table = numbers(fmt) if table is None else table
    codes = np.array(
        [
            code
            for code in range(len(table))
            if np.isfinite(table[code]) and not (table[code] == 0 and np.signbit(table[code]))
        ]
    )
    codes = codes[np.argsort(table[codes], kind="stable")]
    grid = table[codes]
    top = grid[-1]
    if fmt.twos_complement:
        codes, grid = codes[1:], grid[1:]       # symmetric
    above = np.clip(np.searchsorted(grid, values, side="left"), 0, len(grid) - 1)
    below = np.clip(np.where(grid[above] == values, above, above - 1), 0, len(grid) - 1)
    up, down = grid[above] - values, values - grid[below]
    even = codes[above] % 2 == 0
    if rounding == "even":
        take = (up < down) | ((up == down) & even)
    elif rounding == "away":
        take = (up < down) | ((up == down) & (values > 0))
    elif rounding == "zero":
        take = values < 0
    elif rounding == "down":
        take = np.zeros(values.shape, bool)
    elif rounding == "half_zero":
        take = (up < down) | ((up == down) & (values < 0))
    elif rounding == "half_up":
        take = up <= down
    else:
        take = np.ones(values.shape, bool)
    chosen = np.where(take, codes[above], codes[below])
    chosen = np.where(values >= top, codes[-1], np.where(values <= grid[0], codes[0], chosen))
    if overflow != "saturate":
        limit = top + (top - grid[-2]) / 2
        sign = 1 << (fmt.bits - 1)
        nan = {"fn": fmt.magnitude_mask, "ieee": fmt.magnitude_mask, "fnuz": sign}[fmt.specials]
        special = nan if overflow == "nan" else ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits
        past = np.abs(values) >= limit          # the even neighbour of the highest midpoint lies beyond
        chosen = np.where(past, special | (sign if fmt.specials != "fnuz" else 0) * (values < 0), chosen)
    if fmt.specials != "fnuz" and not fmt.twos_complement:
        chosen = np.where((chosen == 0) & np.signbit(values), 1 << (fmt.bits - 1), chosen)
    return chosen.astype(np.uint8)


def store(
    weight: torch.Tensor,
    scheme,
    layout="planar",
    *,
    maximum=None,
    exponent_up=0,
    once="",
    twice="",
    rounding="even",
    overflow="saturate",
    clamp=None,
    positive=False,
    flushed=False,
    target=None,
    minus_zero=False,
    late_scale=False,
) -> QuantizedWeight:
    """Return a float [N, K] as stored by an encoder that makes these faults; fp32 quotients."""
    from fpxbench.numbers.formats import FORMATS
    fmt = scheme.format
    scales = scheme.quantize(weight)[1]
    if maximum:
        scales = Scales((scales.stored.double() * fmt.max / maximum).float())
    if exponent_up:
        scales = Scales((scales.stored.int() + exponent_up).to(torch.uint8))
    narrow = {"": lambda x: x, "bf16": lambda x: x.bfloat16().float(), "fp16": lambda x: x.half().float()}
    given = narrow[once](weight.float())
    held = QuantizedWeight(scheme, tuple(weight.shape), "bytes", torch.empty(0), scales.stored, scales.tensor_scale)
    factor = torch.from_numpy(factors_of(held).copy()).float()
    if late_scale:
        block = scheme.scaling.block
        padded = torch.nn.functional.pad(given, (0, -given.shape[1] % block)).reshape(len(given), -1, block)
        amax, height = padded.abs().amax(2), scheme.scaling.block_rows
        if height > 1:
            amax = torch.cat([rows.amax(0, keepdim=True).expand(len(rows), -1) for rows in amax.split(height)])
        amax = amax.repeat_interleave(block, 1)[:, : given.shape[1]]
        factor = amax / fmt.max
    values = narrow[twice](torch.where(factor > 0, given / torch.where(factor > 0, factor, 1.0), 0.0)).double().numpy()
    if positive:
        values = np.abs(values)
    if clamp:
        values = np.clip(values, -clamp, clamp)
    other = FORMATS[target] if target else fmt
    codes = nearest(values, other, rounding=rounding, overflow=overflow)
    if flushed:
        codes = np.where(np.abs(numbers(fmt)[codes]) < fmt.min_normal, 0, codes).astype(np.uint8)
    if minus_zero:
        codes = np.where((codes == 0) & np.signbit(values), 1 << (fmt.bits - 1), codes).astype(np.uint8)
    return QuantizedWeight.from_codes(torch.from_numpy(codes), scales, scheme, layout)


# Implementations.


def over_rows(multiply):
    """Return `multiply` of activations [M, K], for activations of any rank."""
    return lambda x, w: multiply(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[0])


class Faulty(Implementation):
    """Reads and stores with faults. `opaque`: keeps the numbers only, so that what was stored cannot be seen."""

    name = "injected"

    def __init__(
        self, reading: dict | None = None, storing: dict | None = None, *, layout="planar", opaque=False, multiply=None
    ):
        self.reading, self.storing, self.layout, self.opaque = reading or {}, storing, layout, opaque
        self.multiply = over_rows(multiply or (lambda x, w: (x.float() @ w.float().T).to(x.dtype)))
        self._kept: tuple = (None, None)

    def supports(self, scheme, device):
        return Support.yes()

    def quantize(self, weight, scheme):
        stored = (
            super().quantize(weight, scheme)
            if self.storing is None
            else store(weight, scheme, self.layout, **self.storing)
        )
        if not self.opaque:
            return stored
        return QuantizedWeight(scheme, stored.shape, "own", read(stored, **self.reading).float())

    def dequantize(self, weight):
        return weight.packed if self.opaque else super().dequantize(weight)

    def matmul(self, x, weight):
        if self.opaque:
            return self.multiply(x, weight.packed)
        key = (weight.packed.data_ptr(), id(weight), weight.scales.data_ptr())
        if self._kept[0] != key:      # decoded once a weight, as numpy takes its time
            self._kept = (key, read(weight, **self.reading), weight)
        return self.multiply(x, self._kept[1])
