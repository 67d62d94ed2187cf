"""Two experiments on places: which block's scale each weight meets, and which bits of which code it is made of.

Both give every place a sequence of numbers that no other place has, over several weights, and look for it in what is read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.diagnosis.blackbox.inspection import Difference, Experiment
from fpxbench.diagnosis.blackbox.probing import Bench
from fpxbench.diagnosis.blackbox.recovered_values import known_code, plain_weights
from fpxbench.diagnosis.decode_faults import block_of, scale_faults
from fpxbench.diagnosis.hypotheses import in_pairs, kinds_of, singly

DIGITS = 12
"""Scales of as many powers of two, from 2**-6: all are normal numbers of E4M3 and, by a code near 1, of fp16."""
LOWEST = -6
WEIGHTS = 3, 48
"""Weights of random codes: enough to see whether the order is right; and to find where each bit comes from."""
ROWS = 8
"""Rows in which each bit is looked for."""
SURE = 24
"""Bits of a sequence that must agree: by chance one place in 2**24 does, of a few thousand that are looked at."""
SHOWN = 64


def recover_blocks(bench: Bench, table: Tensor) -> Experiment:
    """The scale that each weight is multiplied by, as the row and block that it is stored for."""
    if bench.scaling.block_rows is None:
        return Experiment(name="blocks", right=True, tried=1, message="there is one scale for all")
    code, number = known_code(bench, table)
    if code is None:
        return Experiment(name="blocks", right=None, message="no code is read as a number that scales could be seen by")
    rows, blocks = bench.grid_shape
    count = rows * blocks
    digits = max(1, math.ceil(math.log(count, DIGITS)))
    rng = inputs.generator(bench.seed, "blocks")
    shuffled = torch.randperm(DIGITS**digits, generator=rng)[:count]      # neighbours then differ in every digit, not only the last
    place_of = torch.full((DIGITS**digits,), -1)
    place_of[shuffled] = torch.arange(count)
    read = torch.zeros(bench.n, bench.k, dtype=torch.long)
    free = plain_weights(bench, code, number).cpu()
    known = free.clone()
    same = torch.ones(bench.n, bench.k, dtype=torch.bool)
    first = None
    for digit in range(digits + 1):     # the last one is a check
        held = shuffled // DIGITS**digit % DIGITS if digit < digits else shuffled % 7
        scales = bench.scales(torch.ldexp(torch.ones(count), held + LOWEST).reshape(rows, blocks))
        factor = (bench.read(bench.hold(torch.full((1, 1), code), scales)) / number).cpu()
        first = factor if first is None else first
        same &= (factor - first).abs() <= 0.02 * first.abs()
        exponent = factor.abs().log2()
        at = (exponent.round() - LOWEST).nan_to_num(-1, -1, -1).long()
        known &= ((exponent - exponent.round()).abs() < 0.1) & (at >= 0) & (at < DIGITS)
        if digit < digits:
            read += at.clamp(0, DIGITS - 1) * DIGITS**digit
        else:
            place = place_of[read]
            known &= (place >= 0) & (at == shuffled[place.clamp(min=0)] % 7)
    own = bench.scaling.block_index(bench.n, bench.k)
    if bool(known.logical_or(~free).all()) and bool((place == own)[free].all()):
        return Experiment(name="blocks", right=True, tried=count, message=f"each of {count} scales meets its own block")
    if bool(same[free].all()) and count > 1:
        return Experiment(name="blocks", right=None, tried=count, message="no scale makes a difference, so where they are read from cannot be seen")
    wrong = free & known & (place != own)
    unknown = int((free & ~known).sum())
    if not bool(wrong.any()):
        return Experiment(name="blocks", right=None, tried=count,
                       message=f"{unknown} of {int(free.sum())} weights are multiplied by what is no block's scale")
    named = _name_blocks(bench, place, known)
    differences, seen = [], set()
    for n, k in wrong.nonzero().tolist():
        here, there = divmod(int(own[n, k]), blocks), divmod(int(place[n, k]), blocks)
        if (here, there) not in seen and len(seen) < SHOWN:
            seen.add((here, there))
            differences.append(Difference(entry=f"row {n}, column {k}", definition=_block(bench, *here), effective=_block(bench, *there)))
    example = differences[0]
    return Experiment(name="blocks", right=False, tried=count, kinds=named[0], differences=differences,
                   message=f"{int(wrong.sum())} of {int(free.sum())} weights meet another block's scale: "
                            + (named[1] or f"at {example.entry} it is that of {example.effective} in place of {example.definition}")
                            + (f" ({unknown} more meet what is no block's scale)" if unknown else ""))


def _block(bench: Bench, row: int, block: int) -> str:
    return f"row {row}" if bench.scaling.block is None else f"block {block} of row {row}"


def _name_blocks(bench: Bench, place: Tensor, known: Tensor) -> tuple[list, str]:
    """The known fault, or two, that takes scales from there: made on a grid of their numbers."""
    columns, (rows, blocks) = torch.arange(bench.k), bench.grid_shape
    numbers = torch.arange(rows * blocks, dtype=torch.float64).reshape(rows, blocks)
    candidates = [one for one in scale_faults(bench.scaling, bench.fmt, bench.n, bench.k) if one.step in ("places", "blocks")]

    def gives(faults: tuple) -> bool:
        grid, met = numbers, None
        for one in sorted(faults, key=lambda one: one.step == "blocks"):
            if one.step == "places":
                grid = one.apply(grid)
            else:
                met = one.apply(grid, columns, torch.arange(len(grid)))
        met = grid[:, block_of(columns, bench.scaling)] if met is None else met
        return bool((met.expand(bench.n, bench.k) == place)[known].all())

    for tried in (singly(candidates), in_pairs(candidates)):
        fitting = [faults for faults in tried if gives(faults)]
        if len(kinds_of(fitting)) == 1:
            return sorted({one.kind for one in fitting[0]}), "; and ".join(one.message for one in fitting[0])
    return [], ""


def recover_order(bench: Bench, table: Tensor) -> Experiment:
    """Which bit of which stored code each bit of a weight's code is, from codes that are random, one weight after another."""
    alphabet = _distinct_codes(bench, table)
    if len(alphabet) < 2:
        return Experiment(name="order", right=None, message="codes cannot be distinguished by the numbers that they are read as")
    rng = inputs.generator(bench.seed, "order")
    one = bench.scales(torch.ones(1, 1))
    free = bench.free
    held, seen, right = [], [], True
    for weight in range(WEIGHTS[1]):
        codes = alphabet[torch.randint(len(alphabet), (bench.n, bench.k), generator=rng).to(alphabet.device)]
        codes = torch.where(bench.forced, bench.fmt.max_code, codes)
        read = bench.read(bench.hold(codes, one))
        right &= bool(bench.near(read, table[codes])[free].all())
        if right and weight + 1 == WEIGHTS[0]:
            return Experiment(name="order", right=True, tried=bench.n * bench.k, message=f"all {bench.n * bench.k} codes are read in their own places")
        rows = torch.linspace(0, bench.n - 1, min(bench.n, ROWS)).round().long().unique().to(codes.device)
        held.append(_bits(codes[rows], bench.fmt.bits))
        seen.append(_read_bits(bench, table, read[rows]))
    return _sources(bench, torch.stack(held, dim=-1), torch.stack(seen, dim=-1))


def _sources(bench: Bench, held: Tensor, seen: Tensor) -> Experiment:
    """From sequences of bits, +1 or -1 (0: not known), [rows, K, bits, weights]: the place whose sequence each one is."""
    rows, k, bits, _ = held.shape
    agreed: Tensor | None = None
    for row in range(rows):
        source, wanted = held[row].reshape(k * bits, -1), seen[row].reshape(k * bits, -1)
        counted = wanted.abs().sum(dim=1)
        agree = (wanted @ source.T) == counted[:, None]
        # A bit that never changes has no place; a place that is not found in one row may be in another.
        found = torch.where((counted >= SURE) & (agree.sum(dim=1) == 1), agree.float().argmax(dim=1), -1)
        agreed = found if agreed is None else torch.where((found >= 0) & (agreed >= 0) & (found != agreed), -2, torch.maximum(found, agreed))
    source = agreed.cpu().reshape(k, bits)
    own = torch.arange(k * bits).reshape(k, bits)
    free = bench.free.any(dim=0).cpu()[:, None].expand(k, bits)
    wrong = (source != own) & (source >= 0) & free
    if not bool(wrong.any()):
        lost = int(((source < 0) & free).sum())
        return Experiment(name="order", right=None, tried=k,
                       message=f"{lost} of {k * bits} bits of a row could not be followed; the others are read in their own places" if lost
                       else "every bit that could be followed is read in its own place")
    differences = []
    for column in wrong.any(dim=1).nonzero().reshape(-1).tolist()[:SHOWN]:
        differences.append(Difference(entry=f"weight {column}", definition=f"code of {column}", effective=_made_of(source[column], bits)))
    moved = wrong.any(dim=1)
    count, unknown = int(moved.sum()), int(((source != own).any(dim=1) & ~moved).sum())
    rule = _rule(source, free, bits)
    why = "could not be followed" if bench.sets_codes else "hold, or are read from, the fixed maximum of a block, and cannot be recovered"
    rest = f" ({unknown} more {why})" if unknown else ""
    return Experiment(name="order", right=False, tried=k, differences=differences,
                   message=f"{count} of {k} weights of a row are made of other codes' bits{rest}: {rule or f'weight {differences[0].entry[7:]} is {differences[0].effective}'}")


def _made_of(sources: Tensor, bits: int) -> str:
    """``code of 5``, or ``bits 0-3 of 5, bits 0-1 of 9``, low bits first; `sources` are numbers k * bits + bit."""
    runs: list[list[int]] = []     # bit, source column, source bit, length
    for bit, source in enumerate(sources.tolist()):
        column, at = divmod(source, bits) if source >= 0 else (-1, -1)
        if runs and column >= 0 and runs[-1][1] == column and runs[-1][2] + runs[-1][3] == at:
            runs[-1][3] += 1
        elif runs and column < 0 and runs[-1][1] < 0:
            runs[-1][3] += 1
        else:
            runs.append([bit, column, at, 1])
    if len(runs) == 1 and runs[0][1] >= 0:
        return f"code of {runs[0][1]}"
    return ", ".join("?" if column < 0 else f"bit{'s' if length > 1 else ''} {at}{f'-{at + length - 1}' if length > 1 else ''} of {column}"
                     for _, column, at, length in runs)


def _rule(source: Tensor, free: Tensor, bits: int) -> str | None:
    """Where whole codes are moved by one rule, the rule."""
    column = torch.arange(len(source))
    known = (source >= 0) & free
    from_column, from_bit = source // bits, source % bits
    if not bool((from_bit == torch.arange(bits))[known].all()):
        if bool((from_column == column[:, None])[known].all()):
            order = [int(from_bit[:, bit][known[:, bit]].mode().values) if bool(known[:, bit].any()) else None for bit in range(bits)]
            return f"bits 0 to {bits - 1} of each code are its bits {', '.join('?' if bit is None else str(bit) for bit in order)}"
        return None
    for distance in (1, 2, 3, 4, 7, 8, 15, 16):
        if bool(((from_column == column[:, None] ^ distance) | ~known).all()):
            return f"k reads the code of k ^ {distance}"
    offset = from_column - column[:, None]
    values = offset[known].unique()
    if len(values) == 1:
        return f"k reads the code of k {'+' if values[0] > 0 else '-'} {abs(int(values[0]))}"
    if len(values) == 2 and int(values.sum()) == 0:
        return f"k reads the code of k ± {int(values[1])}"
    if bool(((from_column + column[:, None]) == (from_column + column[:, None])[known][0])[known].all()):
        return f"k reads the code of {int((from_column + column[:, None])[known][0])} - k"
    return None


def _distinct_codes(bench: Bench, table: Tensor) -> Tensor:
    """Codes that are read as a finite number each. Of 8 bits those in which no nibble is all or none but for its upper bit: mixed
    in any way they make no NaN, which would hide the rest of its row."""
    codes = torch.arange(len(table), device=table.device)
    usable = table.isfinite() & bench.table.isfinite() & (bench.table.abs() <= bench.fmt.max)
    if bench.fmt.bits == 8:
        for nibble in (codes & 7, (codes >> 4) & 7):
            usable &= (nibble != 0) & (nibble != 7)
    codes = codes[usable]
    return codes if len(table[codes].unique()) > 1 else codes[:0]


def _bits(codes: Tensor, bits: int) -> Tensor:
    """+1 or -1, float [..., bits], low bits first."""
    return ((codes[..., None] >> torch.arange(bits, device=codes.device)) & 1).float() * 2 - 1


def _read_bits(bench: Bench, table: Tensor, read: Tensor) -> Tensor:
    """The bits of the code that each number stands for; 0 where it stands for none, or for codes that differ in that bit."""
    numbers = table.unique()
    numbers = numbers[numbers.isfinite()]
    all_bits = _bits(torch.arange(len(table), device=table.device), bench.fmt.bits)
    of_number = torch.stack([all_bits[table == number].mean(dim=0) for number in numbers])
    of_number = torch.where(of_number.abs() == 1, of_number, 0.0)
    at = torch.bucketize(read.nan_to_num(torch.inf), (numbers[1:] + numbers[:-1]) / 2)
    found = of_number[at]
    return torch.where(bench.near(read, numbers[at])[..., None], found, 0.0)
