"""Recover the effective decode table from rows of a single code, so that the order of codes does not matter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, compress, islice, permutations

import torch
from torch import Tensor

from fpxbench.checking import inputs, reference
from fpxbench.diagnosis.code_order_faults import code_order_faults
from fpxbench.diagnosis.decode_fault import DecodeFault, table_claims_hold
from fpxbench.diagnosis.decode_faults import is_subnormal, scale_faults, scaled_by, table_faults
from fpxbench.diagnosis.encode_faults import EncodeFault
from fpxbench.diagnosis.experiment import Difference, Experiment
from fpxbench.diagnosis.hypotheses import Faults, in_pairs, kinds_of, names_of, of_step, singly, table_under
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.code_bits import describe_code_bits
from fpxbench.numbers.codebook import CODEBOOKS, NumberFormat
from fpxbench.numbers.formats import FORMATS, Format
from fpxbench.numbers.packing import padded_k
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.kinds import Kind

COLUMNS = 8
"""Number of columns, spread over K, in which each code is read."""
ARRANGEMENTS = 5
"""Number of rows that hold each code."""
_AT_ONCE = 512
"""Tables to compare at once."""


def recover_table(bench: Bench) -> tuple[Tensor, Experiment]:
    """Return the number that each code is read as under the unit scale, float64 [2**bits], and the experiment.

    A row holds one code, so that NaN stays in its row (0 * NaN is NaN). Each code is stored in several rows and read in
    several columns. Rows and columns in which most codes differ from elsewhere have another fault and are excluded. A
    code that is still not the same number everywhere gets NaN.
    """
    size = 1 << bench.fmt.bits
    codes = torch.arange(size, device=bench.device)
    if not bench.sets_codes:
        codes = codes[bench.table.isfinite() & (bench.table.abs() <= bench.fmt.max)]
    ordinary = ordinary_places(bench)
    free = (bench.free.all(dim=0) & ordinary.any(dim=0)).nonzero().reshape(-1)
    evenly = torch.linspace(0, len(free) - 1, min(len(free), COLUMNS), device=bench.device)
    columns = free[evenly.round().long().unique()]
    seen, row_of = _read_codes(bench, codes, columns)
    table, odd, sound = _agreed_table(bench, codes, seen, row_of, ordinary[:, columns])
    tried = torch.zeros(size, dtype=torch.bool, device=bench.device)
    tried[codes] = True
    unclear = tried & ((odd & sound).any(dim=(1, 2)) | ~sound.any(dim=2).any(dim=1))
    table[~tried | unclear] = torch.nan
    if bool(unclear.any()) and not bench.implementation.slow(bench.device):
        uniform = _uniform_table(bench, codes)
        if uniform is not None:
            bench.rows_mixed = True
            table, unclear = uniform, torch.zeros_like(unclear)
    if bool(unclear.any()):
        return table, Experiment(
            name="table", right=None, tried=len(codes),
            message=f"{int(unclear.sum())} of {len(codes)} codes are read as one number here and another there"
        )
    return table, _table_experiment(bench, table, tried)


def _read_codes(bench: Bench, codes: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers that `codes` are read as, [2**bits, arrangements, columns], and their rows [2**bits,
    arrangements]."""
    size = 1 << bench.fmt.bits
    rng = inputs.generator(bench.seed, "table")
    numbers = codes[bench.table[codes].isfinite()]
    seen = torch.zeros(size, ARRANGEMENTS, len(columns), dtype=torch.float64, device=bench.device)
    row_of = torch.zeros(size, ARRANGEMENTS, dtype=torch.long, device=bench.device)
    for arrangement in range(ARRANGEMENTS):
        for part in codes[torch.randperm(len(codes), generator=rng).to(codes.device)].split(bench.n):
            rows = torch.randperm(bench.n, generator=rng)[:len(part)].to(codes.device)
            # Other rows hold various codes too: with a single code in them, exchanged rows would go unnoticed.
            held = numbers[torch.randint(len(numbers), (bench.n, 1), generator=rng).to(codes.device)].to(torch.uint8)
            held[rows, 0] = part.to(torch.uint8)
            seen[part, arrangement] = bench.read_codes(held, columns)[rows]
            row_of[part, arrangement] = rows
    return seen, row_of


def _agreed_table(
    bench: Bench, codes: Tensor, seen: Tensor, row_of: Tensor, ordinary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number that most places read for each code, the places that read another, and the sound places."""
    size = len(seen)
    sound = ordinary[row_of]
    for _ in range(2):
        # Of the numbers read for a code, take the one with the most others near it.
        flat = seen.reshape(size, -1)
        alike = (bench.near(flat[:, :, None], flat[:, None, :]) & sound.reshape(size, 1, -1)).sum(dim=2)
        table = flat.gather(1, alike.argmax(dim=1)[:, None])[:, 0]
        odd = ~bench.near(seen, table[:, None, None])
        held_by = torch.nn.functional.one_hot(row_of[codes].reshape(-1), bench.n).double()
        row_is_odd = held_by.T @ odd[codes].double().mean(dim=2).reshape(-1) > 0.5 * held_by.sum(dim=0)
        column_is_odd = odd[codes].double().mean(dim=(0, 1)) > 0.5
        sound = ordinary[row_of] & ~(row_is_odd[row_of][:, :, None] | column_is_odd)
    return table, odd, sound


def _table_experiment(bench: Bench, table: Tensor, tried: Tensor) -> Experiment:
    """Return the experiment that compares a recovered table with the format's."""
    right, count = bench.table, int(tried.sum())
    wrong = tried & ~bench.near(table, right)
    # Codes that wrongly make an output NaN or infinite come first.
    ordered = sorted(wrong.nonzero().reshape(-1).tolist(),
                     key=lambda code: bool(table[code].isfinite() | ~right[code].isfinite()))
    differences = [Difference(entry=bench.fmt.describe_code(code), definition=number_text(right[code]),
                              effective=number_text(table[code])) for code in ordered]
    if not differences:
        message = f"all {count} codes decode to their definition"
        return Experiment(name="table", right=True, tried=count, message=message)
    kinds, what = _name_table(bench, table, tried)
    if not what:
        kinds = [] if bool((wrong & ~is_subnormal(bench.fmt).to(wrong.device)).any()) else [Kind.SUBNORMAL_WRONG]
        first = differences[0]
        what = f"{first.entry} as {first.effective} instead of {first.definition}"
    return Experiment(name="table", right=False, tried=count, kinds=kinds, differences=differences,
                      message=f"{len(differences)} of {count} codes decode to another number: {what}")


def ordinary_places(bench: Bench) -> Tensor:
    """Return where a weight of one code everywhere is read as that code's number, bool [N, K]; or, if less than a
    quarter is, as the most frequent number.

    This excludes an ignored tail of K, and scales read from padding. All true if nothing is read as a number.
    """
    seen = bench.read_codes(torch.full((1, 1), bench.fmt.max_code))
    usable = seen.isfinite() & (seen.abs() > 2.0**-60) & ~bench.unscaled
    if not bool((usable & bench.free).any()):
        return torch.ones_like(usable)
    right = usable & bench.near(seen, bench.table[bench.fmt.max_code].expand_as(seen))
    if 4 * int((right & bench.free).sum()) >= int(bench.scaled.sum()):
        return right
    mode = seen[usable & bench.free].mode().values
    return usable & bench.near(seen, mode.expand_as(seen))


def _uniform_table(bench: Bench, codes: Tensor) -> Tensor | None:
    """Return the table [2**bits] from weights of one code everywhere, which moved rows or columns do not affect; None
    if even these are read as several numbers."""
    table = torch.full((1 << bench.fmt.bits,), torch.nan, dtype=torch.float64, device=bench.device)
    places = (bench.free & ordinary_places(bench)).nonzero()
    row, column = places[len(places) // 2].tolist()
    rows = bench.free[:, column] & ordinary_places(bench)[:, column]
    for code in codes.tolist():
        read = bench.read_codes(torch.full((1, 1), code), torch.tensor([column], device=bench.device))[:, 0]
        table[code] = read[row]
        if not bool(bench.near(read, table[code].expand_as(read))[rows].all()):
            return None
    return table


def _name_table(bench: Bench, table: Tensor, tried: Tensor) -> tuple[list, str]:
    """Return the up to three known faults that give `table` exactly; or the other format whose table it is."""
    right = decode_table(bench.fmt, bench.device)
    tables = _Tables(bench)

    # Bits exchanged within each code also change the table.
    within = [one for one in code_order_faults(bench.fmt, bench.template.layout, bench.k)
              if not bench.near(tables.under((one,)), right.double()).all()] if bench.sets_codes else []
    known = [*table_faults(bench.fmt), *within,
             *(one for one in scale_faults(bench.scaling, bench.fmt, bench.n, bench.k)
               if one.kind in (Kind.SCALED, Kind.WRONG_MAX))]
    triples = (p for p in permutations(known, 3) if not any(one.replaces for one in p[1:]))
    for tried_sets in (singly(known), in_pairs(known), triples):
        fitting = [faults for faults in tables.giving(table, tried, tried_sets)
                   if table_claims_hold(faults, table_under(faults, right))]
        if len(kinds_of(fitting)) == 1:
            return sorted({one.kind for one in fitting[0]}), "; and ".join(one.message for one in fitting[0])
        if fitting:
            return [], f"as under {' or '.join(names_of(fitting))}, which cannot be distinguished"
    factor = common_factor(bench, table, tried)
    if factor is not None:
        return [Kind.SCALED], scaled_by(factor, bench.scaling, bench.fmt)
    return _another_format(bench, table, tried)


def _another_format(bench: Bench, table: Tensor, tried: Tensor) -> tuple[list[Kind], str]:
    """Return the fault of codes that are decoded as another format, ignoring that format's non-finite codes."""
    candidates: Iterator[NumberFormat] = chain(FORMATS.values(), CODEBOOKS.values(), _of_the_same_width(bench.fmt))
    for other in candidates:
        if other.bits != bench.fmt.bits or not other.signed:
            continue
        wanted = decode_table(other, bench.device).double()
        counted = tried & wanted.isfinite()
        if int(counted.sum()) * 2 < int(tried.sum()) or not bool(bench.near(table, wanted)[counted].all()):
            continue
        rest = "" if bool(bench.near(table, wanted)[tried].all()) else ", except for its codes that are not numbers"
        return [Kind.FORMAT_MISTAKEN], f"the table is {other.name}'s{rest}: codes are read as another format's"
    reading = describe_code_bits(bench, table, tried)
    return ([Kind.FORMAT_MISTAKEN], reading) if reading is not None else ([], "")


def common_factor(bench: Bench, table: Tensor, tried: Tensor) -> float | None:
    """Return the common factor of all codes in `table`, NaN and infinity unchanged; None if it is 1 or there is none.
    """
    finite = bench.table.isfinite() & tried & (bench.table != 0)
    right, read = bench.table[finite], table[finite]
    factor = float((read * right).sum() / right.square().sum())
    if not math.isfinite(factor) or not factor or abs(factor - 1) <= reference.unit_roundoff(bench.dtype):
        return None
    wanted = bench.table * factor
    near = bench.near(table, wanted)
    # the factor is only as exact as the numbers read
    near |= (table - wanted).abs() <= 2 * reference.unit_roundoff(bench.dtype) * wanted.abs()
    return factor if bool(near[tried].all()) else None


def gives_table(bench: Bench, faults: Faults, table: Tensor) -> bool:
    """Return whether reading with `faults` gives `table` where both are known. Encoder faults are not tested: their
    effect on the table is not predicted."""
    if any(isinstance(one, EncodeFault) for one in faults):
        return True
    known = ~table.isnan() if not bench.sets_codes else torch.ones_like(table, dtype=torch.bool)
    return bool(bench.near(table, _Tables(bench).under(faults))[known].all())


def effective_table(bench: Bench, faults: Faults) -> Tensor:
    """Return the numbers that rows of one code are read as under `faults`, without scales: float64 [2**bits]."""
    return _Tables(bench).unscaled(faults)


class _Tables:
    """Predicted decode tables under faults, float64 [2**bits], with cached parts that sets of faults share."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._made, self._read, self._factor = cache(self._made_by), cache(self._read_by), cache(self._factor_by)

    def unscaled(self, faults: Faults) -> Tensor:
        return self._made(of_step(faults, "table"))[self._read(of_step(faults, "codes"))]

    def under(self, faults: Faults) -> Tensor:
        return self.unscaled(faults) * self._factor(of_step(faults, "scales"))

    def giving(self, table: Tensor, tried: Tensor, sets: Iterable[Faults]) -> Iterator[Faults]:
        """Yield the sets of faults that give `table` where it was `tried`."""
        remaining = iter(sets)
        while some := list(islice(remaining, _AT_ONCE)):
            near = self.bench.near(table[tried], torch.stack([self.under(faults) for faults in some])[:, tried])
            yield from compress(some, near.all(dim=1).tolist())

    def _made_by(self, faults: tuple[DecodeFault, ...]) -> Tensor:
        return table_under(faults, decode_table(self.bench.fmt, self.bench.device)).double()

    def _read_by(self, faults: tuple[DecodeFault, ...]) -> Tensor:
        """Return the code read in the middle of a row of each code, int32 [2**bits]."""
        bench = self.bench
        codes = torch.arange(1 << bench.fmt.bits, dtype=torch.uint8, device=bench.device)
        codes = codes[:, None].repeat(1, padded_k(bench.k))
        for fault in faults:
            codes = fault.apply(codes, torch.arange(codes.shape[1], device=bench.device))
        return codes[:, bench.k // 2].int()

    def _factor_by(self, faults: tuple[DecodeFault, ...]) -> float:
        block, tensor = torch.ones(1, device=self.bench.device), torch.ones(1, device=self.bench.device)
        for fault in faults:
            block, tensor = fault.apply(block, tensor)
        return float(block * tensor)


def _of_the_same_width(fmt: NumberFormat) -> list[Format]:
    """Return signed float formats of the same width, all codes finite, with the usual bias."""
    return [Format(f"e{e}m{fmt.bits - 1 - e}", e, fmt.bits - 1 - e, (1 << (e - 1)) - 1) for e in range(2, fmt.bits)]


def known_code(table: Tensor) -> tuple[int | None, float]:
    """Return the code whose number in `table` is nearest 1 in magnitude, and that number; (None, 0) if none is usable.
    """
    usable = table.isfinite() & (table.abs() >= 2.0**-20) & (table.abs() <= 2.0**20)
    if not bool(usable.any()):
        return None, 0.0
    distance = torch.where(usable, table.abs().log2().abs(), torch.inf)
    code = int(distance.argmin())
    return code, float(table[code])


def plain_weights(bench: Bench, code: int, number: float) -> Tensor:
    """Return where a weight of all `code` is read as `number`, bool [N, K]; not where the code cannot be chosen."""
    seen = bench.read_codes(torch.full((1, 1), code))
    return bench.near(seen, torch.full_like(seen, number)) & bench.free & ~bench.unscaled



def number_text(value: Tensor | float) -> str:
    return f"{float(value):.6g}"
