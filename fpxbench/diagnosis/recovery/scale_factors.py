"""Recover the factor of each scale: every code of a coded scale format, fp32 scales over their range, and the
second-level scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.experiment import Difference, Experiment
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.decode_table import common_factor, known_code, number_text, plain_weights
from fpxbench.diagnosis.recovery.scale_blocks import BlockMap
from fpxbench.diagnosis.scale_functions import (
    Agree,
    describe_factors,
    matching_functions,
    right_range,
    stored_format,
    within_fp32,
)
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.kinds import Kind

FEW_SCALES, SOME_SCALES = 12, 48
"""Numbers of scales to try one by one, with slow calls and with fast ones."""
GLOBAL_SCALES = (2.0**-30, 2.0**-10, 0.375, 1.5, 8.0, 2.0**20)


@dataclass(frozen=True)
class Factors:
    """The recovered factors of scales, float64 [S] each. `codes` are the stored bits, int64 [S]; None for fp32."""

    codes: Tensor | None
    values: Tensor
    seen: Tensor
    probe: Tensor
    """The code that each factor was measured with, int64 [S]."""
    number: Tensor
    """The number that this code is read as, or its definition if a common factor of all codes belongs to the scales."""

    def holds_common_factor(self, table: Tensor) -> bool:
        """Return whether the common factor of all codes in `table` is part of the factors."""
        return bool((self.number != table.cpu()[self.probe]).any())


def recover_scales(
    bench: Bench, table: Tensor, blocks_right: bool, blocks: BlockMap | None = None
) -> tuple[Experiment, Factors | None]:
    """Measure the factor of every scale with codes whose numbers are known from `table`.

    blocks : the scale of each weight, if known
    """
    code, read = known_code(table)
    if code is None:
        return Experiment(name="scales", right=None,
                          message="no code is read as a number that scales could be seen by"), None
    plain = plain_weights(bench, code, read)
    if not bool(plain.any()):
        return Experiment(name="scales", right=None,
                          message="no weight is read as the one code that all of them hold"), None
    codes, values, skipped = _scales_to_try(bench)
    rowwise = blocks_right and not bench.rows_mixed and bench.grid_shape[0] == bench.n > 1
    if not rowwise and (bench.implementation.slow(bench.device) or not bench.sets_codes):     # each costs a call
        most = FEW_SCALES if bench.implementation.slow(bench.device) else SOME_SCALES
        few = torch.linspace(0, len(values) - 1, min(len(values), most)).round().long()
        codes, values = (None if codes is None else codes[few]), values[few]
        skipped.append("all others: not tried, each takes a call")
    probe, usable = _probe_codes(bench, table, values)
    skipped += _not_visible(bench, codes, values, usable)
    if not bool(usable.any()):
        return Experiment(name="scales", right=None, message=f"no scale could be seen ({'; '.join(skipped)})"), None
    codes, values, probe = (None if codes is None else codes[usable]), values[usable], probe[usable]
    seen = _read_factors(bench, blocks, plain, codes, values, probe, rowwise=rowwise)
    number, constant = table[probe].cpu(), common_factor(bench, table, ~table.isnan())
    if constant is not None and not bool(bench.near(seen, number * values, 3.0).all()):
        # A common factor of all codes beside other faults in scales belongs to the scale under which codes were read.
        number = bench.table.cpu()[probe]
    factors = Factors(codes, values, seen / number, probe, number)
    return _judge_factors(bench, table, factors, skipped), factors


def _scales_to_try(bench: Bench) -> tuple[Tensor | None, Tensor, list[str]]:
    """Return the codes (None for fp32 scales) and values to try, and which are omitted and why."""
    fmt = stored_format(bench.scaling)
    if fmt is None:
        exponents = torch.arange(-120, 121, 8) if bench.implementation.slow(bench.device) else torch.arange(-140, 128)
        near_one = torch.arange(-8, 9)
        values = torch.cat([torch.ldexp(torch.ones(len(exponents), dtype=torch.float64), exponents),
                            1.25 * torch.exp2(near_one.double()), 1.75 * torch.exp2(near_one.double())]).sort().values
        stored = bench.scaling.scale_format
        values = values[stored.decode(stored.encode(values.float())).double() == values]
        return None, (values if bench.sets_codes else values[_reachable(bench, values)]), []
    table = decode_table(fmt).double()
    codes = torch.arange(128 if fmt.signed else 256)
    skipped = ([f"negative scale codes, 0x80 to 0x{(1 << fmt.bits) - 1:02x}, which no quantizer stores: not tried"]
               if fmt.signed else [])
    if not bench.sets_codes:    # the weight determines its scales: none is NaN, and zero blocks may have any
        reachable = _reachable(bench, table[codes])
        codes = codes[reachable]
        skipped.append("scales that no finite weight is stored under: not tried")
    return codes, table[codes], skipped


def _reachable(bench: Bench, values: Tensor) -> Tensor:
    """Return the scales that a weight can be constructed for, in fp32 or the dtype that it is cast to: all the format's
    numbers times the scale must be normal."""
    finfo = torch.finfo(bench.dtype if getattr(bench.implementation, "casts_weight", False) else torch.float32)
    magnitudes = bench.table.abs()
    least = float(magnitudes[magnitudes > 0].amin())
    return values.isfinite() & (values * bench.fmt.max <= finfo.max / 4) & (values * least >= finfo.tiny)


def _probe_codes(bench: Bench, table: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each scale, the code whose product with it is nearest 1, and whether that product is a normal 16-bit
    number."""
    finfo = torch.finfo(bench.dtype)
    numbers = table.cpu()
    exact = bench.table.cpu().abs()
    usable = numbers.isfinite() & (numbers.abs() > 0) & exact.isfinite() & (exact <= bench.fmt.max)
    product = numbers.abs()[None, :] * torch.where(values.isfinite() & (values > 0), values, 1.0)[:, None]
    defined = exact[None, :] * torch.where(values.isfinite() & (values > 0), values, 1.0)[:, None]
    visible = (usable[None, :] & (product >= finfo.tiny) & (product <= finfo.max)
               & (defined >= finfo.tiny) & (defined <= finfo.max))
    distance = torch.where(visible, product.log2().abs() + 0.01 * numbers.abs().log2().abs()[None, :], torch.inf)
    # A NaN that is read as a number lies past the format's maximum: it is measured with the smallest code.
    distance[values.isnan()] = torch.where(visible[values.isnan()], numbers.abs()[None, :], torch.inf)
    best = distance.argmin(dim=1)
    return best, visible.any(dim=1)


def _not_visible(bench: Bench, codes: Tensor | None, values: Tensor, usable: Tensor) -> list[str]:
    if bool(usable.all()):
        return []
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[bench.dtype]
    if not bool(usable.any()):
        return [f"with {name} weights, none can be tried"]
    low, high = values[usable].nan_to_num(1.0).min(), values[usable].nan_to_num(1.0).max()
    texts = []
    for mask, why in ((~usable & (values < low), "below"), (~usable & (values > high), "above")):
        if bool(mask.any()):
            if codes is None:
                texts.append(f"scales {why} {float(low if why == 'below' else high):.3g}")
            else:
                texts.append(f"codes {int(codes[mask].min())} to {int(codes[mask].max())}")
    return [f"{' and '.join(texts)} leave the normal range of {name} weights: not tried"] if texts else []


def _read_factors(
    bench: Bench, blocks: BlockMap | None, plain: Tensor, codes: Tensor | None, values: Tensor, probe: Tensor, *,
    rowwise: bool,
) -> Tensor:
    """Return the product of each scale with its probe code, float64 [S]."""
    row, *column = plain.nonzero()[-1].tolist()
    at = torch.tensor(column, device=bench.device)

    def sums_of_nonfinite(operands: Operands, read: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        """Replace NaN read under non-finite scales by a sum along K: one-hot activations turn infinity into NaN."""
        where = where & ~read.isfinite()
        if not bool(where.any()):
            return read
        sums = bench.row_sums(operands).cpu()[rows]
        return torch.where(where & ~sums.isfinite(), sums, read)

    def scales_of(indices: Tensor) -> Scales:
        grid = indices.reshape(-1, indices.shape[-1] if indices.ndim > 1 else 1)
        return bench.scales_of_codes(codes[grid]) if codes is not None else bench.scales(values[grid])

    if not rowwise:
        seen = _read_where_met(bench, blocks, plain, values, probe, scales_of)
        for one in (~seen.isfinite()).nonzero().reshape(-1).tolist():
            operands = bench.hold(probe[one].reshape(1, 1), scales_of(torch.tensor([one])))
            read = bench.read(operands, at)[row, :1].cpu()
            seen[one] = sums_of_nonfinite(operands, read, ~values[one:one + 1].isfinite(), torch.tensor([row]))
        return seen
    # Each row has one scale; over random arrangements, rows that read another scale stand out.
    rng = inputs.generator(bench.seed, "scale codes")
    rows = plain.any(dim=1).nonzero().reshape(-1).cpu()
    columns = plain.double().argmax(dim=1)[rows].cpu()
    seen = torch.zeros(len(values), dtype=torch.float64)
    order = torch.randperm(len(values), generator=rng)
    for part in order.split(len(rows)):
        index = part[torch.arange(bench.n) % len(part)]
        index[rows[:len(part)]] = part
        operands = bench.hold(probe[index].reshape(-1, 1), scales_of(index))
        wanted = columns[:len(part)].unique()
        read = bench.read(operands, wanted.to(bench.device)).cpu()
        of_part = read[rows[:len(part)], torch.searchsorted(wanted, columns[:len(part)])]
        seen[part] = sums_of_nonfinite(operands, of_part, ~values[part].isfinite(), rows[:len(part)])
    return seen


def _read_where_met(
    bench: Bench, blocks: BlockMap | None, plain: Tensor, values: Tensor, probe: Tensor,
    scales_of: Callable[[Tensor], Scales],
) -> Tensor:
    """Return the products of scales, float64 [S], as many per call as one column's weights meet.

    All weights hold one code, so that moved codes do not matter. NaN: not measured, as for non-finite scales, which
    spoil their whole row.
    """
    seen = torch.full((len(values),), math.nan, dtype=torch.float64)
    if blocks is None or not bench.sets_codes:
        return seen
    place = torch.where(plain.cpu() & blocks.free, blocks.place, -1)
    column = max(range(bench.k), key=lambda k: len(place[:, k].unique()))
    places = {where: n for n, where in enumerate(place[:, column].tolist()) if where >= 0}
    at = torch.tensor([column], device=bench.device)
    finite = values.isfinite()
    for code in probe[finite].unique() if len(places) > 1 else ():
        for part in (finite & (probe == code)).nonzero().reshape(-1).split(len(places)):
            index = part[:1].repeat(math.prod(bench.grid_shape))
            index[torch.tensor(list(places))[:len(part)]] = part
            operands = bench.hold(code.reshape(1, 1), scales_of(index.reshape(bench.grid_shape)))
            seen[part] = bench.read(operands, at).cpu()[list(places.values())[:len(part)], 0]
    return seen


def _judge_factors(bench: Bench, table: Tensor, factors: Factors, skipped: list[str]) -> Experiment:
    values, seen, number = factors.values, factors.seen, factors.number
    rest = f" ({'; '.join(skipped)})" if skipped else ""

    # A number that differs from the definition was itself rounded when it was read.
    roundings = torch.where(
        number == table.cpu()[factors.probe], torch.where(number == bench.table.cpu()[factors.probe], 1.0, 3.0), 1.0
    )

    def agree(seen: Tensor, wanted: Tensor) -> Tensor:
        scale, several = (number, roundings) if seen.shape == number.shape else (torch.ones_like(seen), 1.0)
        return bench.near(seen * scale, wanted * scale, several)

    of_nan = values.isnan()
    wrong = torch.where(of_nan, seen.isfinite(), ~agree(seen, values))
    if bool((of_nan & seen.isinf()).any()):     # infinity for NaN is tolerated: the product is not finite either way
        name = _name(factors, int((of_nan & seen.isinf()).nonzero()[0]))
        skipped = [*skipped, f"the NaN code {name} multiplies by infinity"]
        rest = f" ({'; '.join(skipped)})"
    differences = [Difference(entry=_name(factors, index), definition=number_text(values[index]),
                              effective=number_text(seen[index])) for index in wrong.nonzero().reshape(-1).tolist()]
    global_kind, global_message, global_differences = (
        _recover_global(bench, table) if bench.scaling.has_tensor_scale and bench.sets_codes else (None, "", []))
    scales = partial(Experiment, name="scales", tried=len(values))
    if not differences and not global_differences:
        of_products = bool((number != bench.table.cpu()[factors.probe]).any())
        factor = common_factor(bench, table, ~table.isnan()) if of_products else None
        scale = "scale codes" if factors.codes is not None else "scales"
        what = f"each of {len(values)} {scale} multiplies by its own value"
        if factor is not None:      # codes were measured only as products with a scale
            return scales(right=None, message=f"{what}, or by {factor:.3g} times that, and codes decode as defined")
        return scales(right=True, message=f"{what}{rest}")
    kinds: list[Kind] = []
    messages = []
    if differences:
        kinds, message = _name_factors(bench, factors, agree)
        messages.append(
            f"{len(differences)} of {len(values)} scales multiply by another number than their own: {message}"
        )
    if global_differences:
        if kinds != [Kind.SCALE_MISSING] or global_kind is not Kind.GLOBAL_SCALE_MISSING:   # both missing: one fault
            kinds = [*kinds, global_kind]
        messages.append(global_message)
    return scales(right=False, kinds=kinds, differences=differences + global_differences,
                  message="; and ".join(messages) + rest)


def _name_factors(
    bench: Bench, factors: Factors, agree: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Kind], str]:
    """Return the kinds and the message of scales that do not multiply by their own value."""
    values, seen = factors.values, factors.seen
    fitting = matching_functions(bench.scaling, factors.codes, values, seen, agree)
    if fitting and len({tuple(one.kinds) for one in fitting}) == 1:
        return fitting[0].kinds, fitting[0].message
    if fitting:
        return [], f"as under {' or '.join(sorted({str(one.kind) for one in fitting}))}, which cannot be distinguished"
    order = values.nan_to_num(torch.inf).argsort()
    names = [_name(factors, index) for index in order.tolist()]
    near = partial(bench.near, roundings=3.0)
    return _unknown_function(names, values[order], seen[order], near)


def _unknown_function(names: list[str], values: Tensor, seen: Tensor, agree: Agree) -> tuple[list[Kind], str]:
    """Return the kind and the structure of factors, ascending by scale, that no known fault gives."""
    if (kept := right_range(values, seen, agree)) is None:
        return [Kind.SCALE_MISREAD], describe_factors(names, values, seen, agree)
    first, last = kept
    lost = " and ".join(text for text, there in (
        ("smaller ones are rounded or lost", first > 0), ("larger ones are infinite", last < len(values) - 1)) if there)
    return [Kind.SCALE_NARROWED], (f"scales are right from {names[first]} to {names[last]}, {lost}: they, or products"
                                   " with them, pass through a narrower type")


def _name(factors: Factors, index: int) -> str:
    return number_text(factors.values[index]) if factors.codes is None else f"0x{int(factors.codes[index]):02x}"


def gives_factors(bench: Bench, table: Tensor, block: Tensor, factors: Factors) -> bool:
    """Return whether a hypothesis, as a decode table and factors `block` of ``factors.values``, gives the measured
    factors."""
    block = block.double().cpu()
    predicted = table.double().cpu()[factors.probe] * block
    return bool((bench.near(factors.seen * factors.number, predicted, 2.0) | ~within_fp32(block, factors.values)).all())


def _recover_global(bench: Bench, table: Tensor) -> tuple[Kind | None, str, list[Difference]]:
    """Return the kind and the message of the fault in the second-level scale, with the differences; None if right."""
    code, number = known_code(table)
    row, *column = plain_weights(bench, code, number).nonzero()[-1].tolist()
    at = torch.tensor(column, device=bench.device)
    seen = []
    for value in GLOBAL_SCALES:
        scales = replace(bench.unit_scales, tensor_scale=torch.full((1,), value, device=bench.device))
        read = bench.read(bench.hold(torch.full((1, 1), code), scales), at)[row, 0]
        seen.append(float(read) / (number * bench.unit))
    power = -1 if bench.divides_by_global_scale else 1
    given, factors = torch.tensor(GLOBAL_SCALES, dtype=torch.float64), torch.tensor(seen, dtype=torch.float64)
    fault = _global_fault(bench.dtype, given, factors, power)
    if fault is None:
        return None, "", []
    return *fault, [
        Difference(entry=f"global scale {number_text(value)}", definition=number_text(value**power),
                   effective=number_text(factor))
        for value, factor in zip(given, factors, strict=True)
        if abs(float(factor) - float(value**power)) > 0.02 * float(value**power)
    ]


def _global_fault(dtype: torch.dtype, given: Tensor, factors: Tensor, power: int) -> tuple[Kind, str] | None:
    """Return the kind and the message if global scales `given` multiply by `factors`, not by their `power`; else None.
    """
    def is_power(exponent: float) -> bool:
        wanted = given**exponent
        inside = (wanted > torch.finfo(dtype).tiny) & (wanted < torch.finfo(dtype).max)
        return bool(((factors - wanted).abs() <= 0.02 * wanted)[inside].all()) and int(inside.sum()) >= 3

    if is_power(power):
        return None
    if is_power(0):
        return (Kind.GLOBAL_SCALE_MISSING,
                "the global scale is not applied: whatever it is, weights are multiplied by 1")
    if is_power(-power):
        inverse = "divided by it" if power > 0 else "multiplied by it"
        return Kind.GLOBAL_SCALE_INVERTED, f"the global scale is inverted: weights are {inverse}"
    for exponent, what in ((2, "squared"), (0.5, "replaced by its square root"), (-2, "inverted and squared"),
                           (3, "cubed")):
        if is_power(power * exponent):
            return Kind.GLOBAL_SCALE_MISREAD, f"the global scale is {what}"
    ratio = factors / given**power
    if bool(((ratio / ratio.median() - 1).abs() < 0.02).all()):
        what = f"the global scale is applied {float(ratio.median()):.4g} times too large"
    elif bool(((factors / factors.median() - 1).abs() < 0.02).all()):
        what = f"whatever the global scale is, weights are multiplied by {float(factors.median()):.4g}"
    else:
        what = f"the global scale {number_text(given[0])} multiplies by {number_text(factors[0])}"
    return Kind.GLOBAL_SCALE_MISREAD, what
