"""Recover the effective decode table. Every code of a row is the same, so that nothing depends on the order of
codes."""

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
from fpxbench.diagnosis.hypotheses import Faults, in_pairs, kinds_of, names_of, singly, table_under
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.code_bits import describe_code_bits
from fpxbench.numbers.codebook import CODEBOOKS, NumberFormat
from fpxbench.numbers.formats import FORMATS, Format
from fpxbench.numbers.packing import padded_k
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.kinds import Kind

COLUMNS = 8
"""Columns in which each code is read, spread over K."""
ARRANGEMENTS = 5
"""Rows to which each code is given."""
_AT_ONCE = 512
"""Tables that are compared at once."""


def recover_table(bench: Bench) -> tuple[Tensor, Experiment]:
    """Return what each code is read as under the unit scale, float64 [2**bits], and how that differs from the format's.

    A row holds one code, so that NaN stays in its row (0 * NaN is NaN). Each code is given to several rows and read in
    several columns. Rows and columns in which most codes are not what they are elsewhere are left out: there, something
    else is wrong. A code that is then not the same number everywhere has NaN for its entry.
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
    """Return what each of `codes` is read as, [2**bits, arrangements, columns], and the row that it was given to."""
    size = 1 << bench.fmt.bits
    rng = inputs.generator(bench.seed, "table")
    numbers = codes[bench.table[codes].isfinite()]
    seen = torch.zeros(size, ARRANGEMENTS, len(columns), dtype=torch.float64, device=bench.device)
    row_of = torch.zeros(size, ARRANGEMENTS, dtype=torch.long, device=bench.device)
    for arrangement in range(ARRANGEMENTS):
        for part in codes[torch.randperm(len(codes), generator=rng).to(codes.device)].split(bench.n):
            rows = torch.randperm(bench.n, generator=rng)[:len(part)].to(codes.device)
            # Other rows hold other codes too: with one code in them, rows that change places would all read that.
            held = numbers[torch.randint(len(numbers), (bench.n, 1), generator=rng).to(codes.device)].to(torch.uint8)
            held[rows, 0] = part.to(torch.uint8)
            seen[part, arrangement] = bench.read_codes(held, columns)[rows]
            row_of[part, arrangement] = rows
    return seen, row_of


def _agreed_table(
    bench: Bench, codes: Tensor, seen: Tensor, row_of: Tensor, ordinary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number that most places read for each code, where others were read, and which places are sound."""
    size = len(seen)
    sound = ordinary[row_of]
    for _ in range(2):
        # Of the numbers that a code was read as, the one that most others are near to.
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
    """Return how a recovered table differs from the format's."""
    right, count = bench.table, int(tried.sum())
    wrong = tried & ~bench.near(table, right)
    differences = [     # what makes an output NaN or infinite stands first
        Difference(
            entry=bench.fmt.describe_code(code), definition=number_text(right[code]), effective=number_text(table[code])
        )
        for code in sorted(
            wrong.nonzero().reshape(-1).tolist(),
            key=lambda code: bool(table[code].isfinite() | ~right[code].isfinite()),
        )
    ]
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
    """Return where a weight of one code everywhere is read as its own number, or where less than a quarter is, as the
    number that most of it is, bool [N, K].

    That is not where K's tail is left out, or a scale is padding; and everywhere if nothing is read as a number.
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
    """Return the table [2**bits] from weights of one code everywhere, which no order of rows or columns changes; None
    where even they are read as several numbers."""
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
    """Return the known faults that give `table` exactly, alone or two or three at once; or the format that it is of."""
    right = decode_table(bench.fmt, bench.device)
    tables = _Tables(bench)

    # Bits that are exchanged within each code look like another table too.
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
    """Return the fault of codes that are decoded as another format's numbers, those that are no numbers left aside."""
    candidates: Iterator[NumberFormat] = chain(FORMATS.values(), CODEBOOKS.values(), _of_the_same_width(bench.fmt))
    for other in candidates:
        if other.bits != bench.fmt.bits or not other.signed:
            continue
        wanted = decode_table(other, bench.device).double()
        counted = tried & wanted.isfinite()
        if int(counted.sum()) * 2 < int(tried.sum()) or not bool(bench.near(table, wanted)[counted].all()):
            continue
        rest = "" if bool(bench.near(table, wanted)[tried].all()) else ", but for its codes that are no numbers"
        return [Kind.FORMAT_MISTAKEN], f"the table is {other.name}'s{rest}: codes are read as another format's"
    reading = describe_code_bits(bench, table, tried)
    return ([Kind.FORMAT_MISTAKEN], reading) if reading is not None else ([], "")


def common_factor(bench: Bench, table: Tensor, tried: Tensor) -> float | None:
    """Return what every code is read as times its value, NaN and infinity as they are; None if there is no such factor,
    or it is 1."""
    finite = bench.table.isfinite() & tried & (bench.table != 0)
    right, read = bench.table[finite], table[finite]
    factor = float((read * right).sum() / right.square().sum())
    if not math.isfinite(factor) or not factor or abs(factor - 1) <= reference.unit_roundoff(bench.dtype):
        return None
    wanted = bench.table * factor
    near = bench.near(table, wanted)
    # the factor is as coarse as what it was seen by
    near |= (table - wanted).abs() <= 2 * reference.unit_roundoff(bench.dtype) * wanted.abs()
    return factor if bool(near[tried].all()) else None


def gives_table(bench: Bench, faults: Faults, table: Tensor) -> bool:
    """Return whether reading with `faults` gives `table`, as far as both say. Those of an encoder may show in it in
    ways of their own."""
    if any(isinstance(one, EncodeFault) for one in faults):
        return True
    said = ~table.isnan() if not bench.sets_codes else torch.ones_like(table, dtype=torch.bool)
    return bool(bench.near(table, _table_under(bench, faults))[said].all())


def effective_table(bench: Bench, faults: Faults) -> Tensor:
    """Return what rows of one code are read as by a reader that makes `faults`, its scales left out: float64
    [2**bits]."""
    return _Tables(bench).unscaled(faults)


def _table_under(bench: Bench, faults: Faults) -> Tensor:
    """Return the same under a scale of 1 as it is read."""
    return _Tables(bench).under(faults)


class _Tables:
    """What rows of one code are read as under faults: float64 [2**bits]. Sets of faults share their parts."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._made, self._read, self._factor = cache(self._made_by), cache(self._read_by), cache(self._factor_by)

    def unscaled(self, faults: Faults) -> Tensor:
        return self._made(_of_step(faults, "table"))[self._read(_of_step(faults, "codes"))]

    def under(self, faults: Faults) -> Tensor:
        return self.unscaled(faults) * self._factor(_of_step(faults, "scales"))

    def giving(self, table: Tensor, tried: Tensor, sets: Iterable[Faults]) -> Iterator[Faults]:
        """Yield those of `sets` that give `table` where it was `tried`."""
        remaining = iter(sets)
        while some := list(islice(remaining, _AT_ONCE)):
            near = self.bench.near(table[tried], torch.stack([self.under(faults) for faults in some])[:, tried])
            yield from compress(some, near.all(dim=1).tolist())

    def _made_by(self, faults: tuple[DecodeFault, ...]) -> Tensor:
        return table_under(faults, decode_table(self.bench.fmt, self.bench.device)).double()

    def _read_by(self, faults: tuple[DecodeFault, ...]) -> Tensor:
        """Return the code that is read in the middle of a row of each code, int32 [2**bits]."""
        bench = self.bench
        codes = torch.arange(1 << bench.fmt.bits, dtype=torch.uint8, device=bench.device)[:, None].repeat(
            1, padded_k(bench.k)
        )
        for fault in faults:
            codes = fault.apply(codes, torch.arange(codes.shape[1], device=bench.device))
        return codes[:, bench.k // 2].int()

    def _factor_by(self, faults: tuple[DecodeFault, ...]) -> float:
        factor = torch.ones(1, device=self.bench.device), torch.ones(1, device=self.bench.device)
        for fault in faults:
            factor = fault.apply(*factor)
        return float(_product(factor))


def _of_step(faults: Faults, step: str) -> tuple[DecodeFault, ...]:
    return tuple(one for one in faults if isinstance(one, DecodeFault) and one.step == step)


def _of_the_same_width(fmt: NumberFormat) -> list[Format]:
    """Return signed floats of as many bits that are numbers only, with the usual bias."""
    return [Format(f"e{e}m{fmt.bits - 1 - e}", e, fmt.bits - 1 - e, (1 << (e - 1)) - 1) for e in range(2, fmt.bits)]


def known_code(table: Tensor) -> tuple[int | None, float]:
    """Return the code read as a number nearest 1 in magnitude, and that number: by it, factors are seen."""
    usable = table.isfinite() & (table.abs() >= 2.0**-20) & (table.abs() <= 2.0**20)
    if not bool(usable.any()):
        return None, 0.0
    distance = torch.where(usable, table.abs().log2().abs(), torch.inf)
    code = int(distance.argmin())
    return code, float(table[code])


def plain_weights(bench: Bench, code: int, number: float) -> Tensor:
    """Return where a weight that is all `code` is read as `number`: bool [N, K]. Not where that cannot be chosen, nor
    where padding is read."""
    seen = bench.read_codes(torch.full((1, 1), code))
    return bench.near(seen, torch.full_like(seen, number)) & bench.free & ~bench.unscaled


def _product(parts: tuple[Tensor, Tensor]) -> Tensor:
    return parts[0] * parts[1]


def number_text(value: Tensor | float) -> str:
    return f"{float(value):.6g}"
