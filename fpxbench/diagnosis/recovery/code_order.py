"""Recover which stored code, and which of its bits, each weight is read from.

Over several weights, every place gets a unique sequence of codes, and each sequence read is looked up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.diagnosis.code_order_faults import code_order_faults
from fpxbench.diagnosis.experiment import Difference, Experiment
from fpxbench.diagnosis.index_map import IndexMap
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.numbers import packing
from fpxbench.records.kinds import Kind

WEIGHTS = 3, 48
"""Numbers of random weights: to see whether the order is right; and to find the source of each bit."""
ROWS = 8
"""Number of rows in which each bit is searched."""
SURE = 24
"""Bits of a sequence that must agree: one place in 2**24 does by chance, and a few thousand are compared."""
SHOWN = 64


def recover_order(bench: Bench, table: Tensor) -> tuple[Experiment, IndexMap | None]:
    """Recover the source of each weight's code from weights of random codes; return the map too if whole codes move."""
    alphabet = _distinct_codes(bench, table)
    if len(alphabet) < 2:
        return Experiment(
            name="order", right=None, message="codes cannot be distinguished by the numbers that they are read as"
        ), None
    rng = inputs.generator(bench.seed, "order")
    stored: list[Tensor] = []
    read: list[Tensor] = []

    def add_weights(count: int) -> None:
        while len(stored) < count:
            codes = alphabet[torch.randint(len(alphabet), (bench.n, bench.k), generator=rng).to(alphabet.device)]
            codes = torch.where(bench.forced, bench.fmt.max_code, codes)
            read.append(bench.read_codes(codes))
            stored.append(codes)

    add_weights(WEIGHTS[0])
    if all(bool(bench.near(seen, table[codes])[bench.scaled].all()) for codes, seen in zip(stored, read, strict=True)):
        return Experiment(name="order", right=True, tried=bench.n * bench.k,
                          message=f"all {bench.n * bench.k} codes are read in their own places"), None
    known = _known_order(bench, table, stored, read)
    if known is None:
        add_weights(max(WEIGHTS[0], min(WEIGHTS[1], math.ceil(60 / math.log2(len(alphabet))))))
        whole = _whole_codes(bench, table, stored, read)
        if whole is not None:
            return whole
    add_weights(WEIGHTS[1])
    rows = torch.linspace(0, bench.n - 1, min(bench.n, ROWS)).round().long().unique().to(alphabet.device)
    known_bits = _bits_of_numbers(bench, table)
    sources = _sources(bench, torch.stack([_bits(codes[rows], bench.fmt.bits) for codes in stored], dim=-1),
                       torch.stack([_read_bits(bench, *known_bits, seen[rows]) for seen in read], dim=-1))
    if known is not None and sources.right is False:
        kind, message = known
        return sources.model_copy(
            update={"kinds": [kind], "message": sources.message.split(": ", 1)[0] + f": {message}"}
        ), None
    return sources, None


def _known_order(bench: Bench, table: Tensor, stored: list[Tensor], read: list[Tensor]) -> tuple[Kind, str] | None:
    """Return the known fault in the order of codes that explains every weight read; None if there is none, or faults of
    several kinds do."""
    columns = torch.arange(bench.k, device=bench.device)
    layout = bench.template.layout if bench.sets_codes else ("planar" if bench.fmt.bits < 8 else "bytes")
    tail = packing.padded_k(bench.k) - bench.k
    padded = [torch.nn.functional.pad(codes.to(torch.uint8), (0, tail)) for codes in stored]
    found = [fault for fault in code_order_faults(bench.fmt, layout, bench.k)
             if all(bool(bench.near(seen, table[fault.apply(codes, columns).long()])[bench.scaled].all())
                    for codes, seen in zip(padded, read, strict=True))]
    return (found[0].kind, found[0].message) if len({fault.kind for fault in found}) == 1 else None


def _whole_codes(
    bench: Bench, table: Tensor, stored: list[Tensor], read: list[Tensor]
) -> tuple[Experiment, IndexMap] | None:
    """Return the map of whole codes, from anywhere in the weight, that explains what was read; None if it explains less
    than half."""
    numbers = table[table.isfinite()].unique()
    source_key, source_sure = _number_keys(bench, numbers, [table[codes] for codes in stored])
    seen_key, sure = _number_keys(bench, numbers, read)
    free = bench.scaled.cpu()
    ordered, order = torch.where(source_sure, source_key, torch.iinfo(torch.int64).max).reshape(-1).sort()
    at = torch.searchsorted(ordered, seen_key.reshape(-1)).clamp(max=len(ordered) - 1)
    place = torch.where((ordered[at] == seen_key.reshape(-1)) & sure.reshape(-1), order[at], -1).reshape(
        bench.n, bench.k
    )
    place = torch.where(free, place, -1)
    if int((place >= 0).sum()) < 0.5 * int(free.sum()):
        return None
    found = IndexMap.from_flat(place, bench.k, "row", "weight")
    if not bool(found.moved.any()):
        return None
    lost = int((free & (place < 0)).sum())
    rest = f" ({lost} read no stored code)" if lost else ""
    return _whole_codes_experiment(found, bench.n * bench.k, int(free.sum()), rest), found


def _number_keys(bench: Bench, numbers: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a hash of each place's sequence of numbers, and whether all of them are numbers of the table."""
    key = torch.zeros(bench.n, bench.k, dtype=torch.int64)
    sure = torch.ones(bench.n, bench.k, dtype=torch.bool)
    weights = torch.randint(1 << 62, (len(values),), generator=torch.Generator().manual_seed(1)).tolist()
    for weight, each in zip(weights, values, strict=True):
        at = torch.bucketize(each.nan_to_num(torch.inf), (numbers[1:] + numbers[:-1]) / 2)
        sure &= bench.near(each, numbers[at]).cpu()
        key += at.cpu() * weight | 1
    return key, sure


def _whole_codes_experiment(found: IndexMap, tried: int, free: int, rest: str) -> Experiment:
    """Return the experiment on codes that are read from other places."""
    moved = found.moved
    differences = [
        Difference(entry=f"row {n}, weight {k}", definition="its own code",
                   effective=f"code of row {int(found.rows[n, k])}, weight {int(found.columns[n, k])}")
        for n, k in moved.nonzero()[:SHOWN].tolist()
    ]
    if found.transposed:
        kind = Kind.WEIGHT_TRANSPOSED
        rule = "the weight is transposed: row n, weight k reads the code of row k, weight n"
    else:
        kind, described, first = Kind.CODE_PERMUTED, found.describe(), differences[0]
        rule = f"the code of {described}" if described else f"{first.entry} reads the {first.effective}"
    return Experiment(name="order", right=False, tried=tried, kinds=[kind], differences=differences,
                      message=f"{int(moved.sum())} of {free} weights read another place's code{rest}: {rule}")


def _sources(bench: Bench, stored: Tensor, seen: Tensor) -> Experiment:
    """Return the experiment on the source of each bit, from sequences of bits, +1 or -1 (0: unknown), [rows, K, bits,
    weights]."""
    rows, k, bits, _ = stored.shape
    agreed: Tensor | None = None
    for row in range(rows):
        source, wanted = stored[row].reshape(k * bits, -1), seen[row].reshape(k * bits, -1)
        counted = wanted.abs().sum(dim=1)
        agreeing = wanted @ source.T
        most, at = agreeing.max(dim=1)
        second = agreeing.scatter_(1, at[:, None], -torch.inf).amax(dim=1)
        # The source of a constant bit is unknown; a source missing from one row may be found in another.
        found = torch.where((counted >= SURE) & (most == counted) & (second < counted), at, -1)
        agreed = found if agreed is None else torch.where(
            (found >= 0) & (agreed >= 0) & (found != agreed), -2, torch.maximum(found, agreed))
    source = agreed.cpu().reshape(k, bits)
    own = torch.arange(k * bits).reshape(k, bits)
    free = bench.scaled.any(dim=0).cpu()[:, None].expand(k, bits)
    wrong = (source != own) & (source >= 0) & free
    if not bool(wrong.any()):
        lost = int(((source < 0) & free).sum())
        return Experiment(
            name="order",
            right=None,
            tried=k,
            message=f"{lost} of {k * bits} bits of a row could not be followed; the others are read in their own places"
            if lost
            else "every bit that could be followed is read in its own place",
        )
    differences = []
    for column in wrong.any(dim=1).nonzero().reshape(-1).tolist()[:SHOWN]:
        differences.append(
            Difference(
                entry=f"weight {column}", definition=f"code of {column}", effective=_made_of(source[column], bits)
            )
        )
    moved = wrong.any(dim=1)
    count, unknown = int(moved.sum()), int(((source != own).any(dim=1) & ~moved).sum())
    rule = _rule(source, free, bits)
    why = (
        "could not be followed"
        if bench.sets_codes
        else "hold, or are read from, the fixed maximum of a block, and cannot be recovered"
    )
    rest = f" ({unknown} more {why})" if unknown else ""
    return Experiment(
        name="order",
        right=False,
        tried=k,
        differences=differences,
        message=f"{count} of {k} weights of a row are made of other codes' bits{rest}: "
                f"{rule or f'weight {differences[0].entry[7:]} is {differences[0].effective}'}",
    )


def _made_of(sources: Tensor, bits: int) -> str:
    """Return ``code of 5``, or ``bits 0-3 of 5, bits 0-1 of 9``, low bits first; `sources` are k * bits + bit."""
    runs: list[list[int]] = []     # bit, source column, source bit, length
    for bit, source in enumerate(sources.tolist()):
        column, at = divmod(source, bits) if source >= 0 else (-1, -1)
        continues = runs and column >= 0 and runs[-1][1] == column and runs[-1][2] + runs[-1][3] == at
        if continues or (runs and column < 0 and runs[-1][1] < 0):
            runs[-1][3] += 1
        else:
            runs.append([bit, column, at, 1])
    if len(runs) == 1 and runs[0][1] >= 0:
        return f"code of {runs[0][1]}"
    return ", ".join(
        "?"
        if column < 0
        else f"bit{'s' if length > 1 else ''} {at}{f'-{at + length - 1}' if length > 1 else ''} of {column}"
        for _, column, at, length in runs
    )


def _rule(source: Tensor, free: Tensor, bits: int) -> str | None:
    """Return the rule by which whole codes, or bits within all codes, move; None if there is no single rule."""
    column = torch.arange(len(source))
    known = (source >= 0) & free
    from_column, from_bit = source // bits, source % bits
    if not bool((from_bit == torch.arange(bits))[known].all()):
        if bool((from_column == column[:, None])[known].all()):
            order = [
                int(from_bit[:, bit][known[:, bit]].mode().values) if bool(known[:, bit].any()) else None
                for bit in range(bits)
            ]
            return (f"bits 0 to {bits - 1} of each code are its bits "
                    f"{', '.join('?' if bit is None else str(bit) for bit in order)}")
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
    """Return codes that are read as finite numbers. For 8 bits, only those in which the low three bits of each nibble
    are neither all set nor all clear: no mixture of their bits is NaN, which would hide the rest of its row."""
    codes = torch.arange(len(table), device=table.device)
    usable = table.isfinite() & bench.table.isfinite() & (bench.table.abs() <= bench.fmt.max)
    if bench.fmt.bits == 8:
        for nibble in (codes & 7, (codes >> 4) & 7):
            usable &= (nibble != 0) & (nibble != 7)
    codes = codes[usable]
    return codes if len(table[codes].unique()) > 1 else codes[:0]


def _bits(codes: Tensor, bits: int) -> Tensor:
    """Return the bits of codes as +1 or -1, float [..., bits], low bits first."""
    return ((codes[..., None] >> torch.arange(bits, device=codes.device)) & 1).float() * 2 - 1


def _bits_of_numbers(bench: Bench, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of `table`, ascending, and the bits of each number's code, [numbers, bits]; 0 where its codes
    differ in a bit."""
    numbers = table.unique()
    numbers = numbers[numbers.isfinite()]
    all_bits = _bits(torch.arange(len(table), device=table.device), bench.fmt.bits)
    of_number = torch.stack([all_bits[table == number].mean(dim=0) for number in numbers])
    return numbers, torch.where(of_number.abs() == 1, of_number, 0.0)


def _read_bits(bench: Bench, numbers: Tensor, of_number: Tensor, read: Tensor) -> Tensor:
    """Return the bits of the code of each number read; 0 if it has none."""
    at = torch.bucketize(read.nan_to_num(torch.inf), (numbers[1:] + numbers[:-1]) / 2)
    found = of_number[at]
    return torch.where(bench.near(read, numbers[at])[..., None], found, 0.0)
