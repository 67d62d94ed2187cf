"""Recover which block's scale multiplies each weight, independently of the scales' values.

Over several weights, every block gets scales from a few levels, so that the sequence of levels identifies the block.
The factor of each level is measured first, under one scale everywhere, so that misread scale values do not hide their
positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.examination import ranges
from fpxbench.diagnosis.decode_faults import block_of, block_row_of
from fpxbench.diagnosis.experiment import Difference, Experiment
from fpxbench.diagnosis.index_map import IndexMap
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.decode_table import known_code, plain_weights
from fpxbench.diagnosis.scale_places import block_size_faults, scale_places
from fpxbench.records.kinds import Kind

LEVELS = 12
"""Number of scales, powers of two from 2**-6: normal numbers in E4M3 and, times a code near 1, in fp16."""
LOWEST = -6
FAR_APART = torch.arange(-110, 120, 20)
SHOWN = 64
_FEWEST_CHANGED = 64
"""Some scales are replaced by constants only if at least one weight in this many changes with its scale."""
_FEW_CONSTANTS = 3


@dataclass(frozen=True)
class BlockMap:
    """The scale that multiplies each weight: flat positions [N, K] in the grid of scales, -1 for none; `free`: where it
    is known."""

    place: Tensor
    free: Tensor
    constant: str = ""
    """Which weights are multiplied by a constant instead of a scale, as a clause."""


def recover_blocks(bench: Bench, table: Tensor) -> tuple[Experiment, BlockMap | None]:
    """Return the experiment on which scale multiplies each weight, and the map; None if it cannot be recovered."""
    one_for_all = bench.scaling.block_rows is None
    only_scale = Experiment(name="blocks", right=True, tried=1, message="there is one scale for all")
    code, number = known_code(table)
    if code is None:
        return only_scale if one_for_all else Experiment(
            name="blocks", right=None, message="no code is read as a number that scales could be seen by"
        ), None
    constant = constants(bench, code, number)
    left_out = constant.isfinite()
    if one_for_all and not bool(left_out.any()):
        return only_scale, None
    plain = plain_weights(bench, code, number)
    bench.unscaled |= left_out
    found, places = _recovered(bench, code, number, (plain & ~left_out).cpu())
    if bool(left_out.any()):
        clause = _constant_places(bench, constant)
        wrong = found.right is False
        return found.model_copy(update={
            "right": False, "kinds": [Kind.SCALE_MISSING, *(found.kinds if wrong else [])],
            "message": f"{clause}; and {found.message}" if wrong else clause,
        }), None if places is None else replace(places, constant=clause)
    if found.right and (lost := int((bench.free & ~plain).sum())):
        return found.model_copy(update={"right": None, "message": (
            f"{found.message}, but for {lost} of {int(bench.free.sum())} weights, which are not read as all others are"
        )}), places
    return found, places


def constants(bench: Bench, code: int, number: float) -> Tensor:
    """Return the factors of weights that do not change when every scale is enlarged, float64 [N, K]; NaN for all other
    weights, and for all if too few change."""
    codes = torch.full((1, 1), code)
    louder = bench.scales(torch.full((1, 1), 4 * bench.unit))
    scales = [bench.unit_scales, louder]
    if louder.tensor_scale is not None and bench.sets_codes:    # perhaps only the tensor scale is applied
        by = 0.125 if bench.divides_by_global_scale else 8.0
        scales.append(replace(louder, tensor_scale=louder.tensor_scale * by))
    before, *after = (bench.read(bench.hold(codes, one)) / number for one in scales)
    usable = bench.free & before.isfinite() & (before.abs() > 2.0**-60)
    if bench.forced_scale is not None:      # weights under the forced scale do not change either
        forced = usable & bench.near(before, torch.full_like(before, bench.forced_scale))
        bench.unscaled |= forced
        usable &= ~forced
    fixed, enough = torch.zeros_like(usable), False
    for seen in after:
        if not enough:
            fixed = bench.near(seen, before) & usable
            enough = _FEWEST_CHANGED * int((usable & ~fixed).sum()) >= int(usable.sum())
    return torch.where(fixed, before, torch.nan) if enough else torch.full_like(before, torch.nan)


def _constant_places(bench: Bench, constant: Tensor) -> str:
    """Describe the weights without a scale and their factors, as a clause."""
    left_out = constant.isfinite()
    for dim in (0, 1):      # a forced code between two weights without a scale has none either
        beside = left_out.roll(1, dim) & left_out.roll(-1, dim)
        left_out = left_out | (bench.forced & beside)
    rows, columns = (left_out.any(dim=dim).nonzero().reshape(-1).tolist() for dim in (1, 0))
    whole = int(left_out.sum()) == len(rows) * len(columns)
    along = "all columns" if len(columns) == bench.k else f"columns {ranges(columns)}"
    where = along + ("" if len(rows) == bench.n else f" of row{'s' * (len(rows) > 1)} {ranges(rows)}")
    numbers = [f"{value:g}" for value in constant[constant.isfinite()].unique().tolist()]
    by = " or ".join(numbers)
    if len(numbers) > _FEW_CONSTANTS:
        by = f"{len(numbers)} numbers, {numbers[0]} to {numbers[-1]}"
    return (f"the scales of {where if whole else f'{int(left_out.sum())} weights'} are not applied: whatever they are,"
            f" those weights are multiplied by {by}")


def _recovered(bench: Bench, code: int, number: float, free: Tensor) -> tuple[Experiment, BlockMap | None]:
    """Return the experiment and the map where `free` [N, K]."""
    if not bool(free.any()):
        return Experiment(
            name="blocks", right=None, message="no weight is read as the one code that all of them hold"
        ), None
    levels, factors = _levels(bench, code, number, free, torch.arange(LOWEST, LOWEST + LEVELS))
    if len(levels) < 2 and bench.scaling.scale_format.powers_of_two:    # E8M0 codes used as numbers are too close
        levels, factors = _levels(bench, code, number, free, FAR_APART)
    rows, blocks = bench.grid_shape
    count = rows * blocks
    if len(levels) < 2 and count > 1:
        return Experiment(name="blocks", right=None, tried=count,
                          message="no scale makes a difference, so where they are read from cannot be seen"), None
    place = (_recover_places(bench, code, number, levels, factors) if count > 1
             else torch.zeros(bench.n, bench.k, dtype=torch.long))
    own = bench.scaling.block_index(bench.n, bench.k)
    wrong = free & (place >= 0) & (place != own)
    unknown = free & (place < 0)
    found = BlockMap(torch.where(free, place, -1), free)
    if not bool((wrong | unknown).any()):
        return Experiment(
            name="blocks", right=True, tried=count, message=f"each of {count} scales meets its own block"
        ), found
    kinds, message = name_places(bench, found)
    if not bool(wrong.any()) and not kinds:
        return Experiment(name="blocks", right=None, tried=count, message=(
            f"{int(unknown.sum())} of {int(free.sum())} weights meet a factor that is not a block's scale")), None
    differences = _differences(bench, found, own)
    share = f"{int(wrong.sum())} of {int(free.sum())} weights meet another block's scale: " if bool(wrong.any()) else ""
    lost = f" ({int(unknown.sum())} weights meet a factor that is not a block's scale)" if bool(unknown.any()) else ""
    return Experiment(
        name="blocks", right=False, tried=count, kinds=kinds, differences=differences, message=share + message + lost
    ), found


def _levels(bench: Bench, code: int, number: float, free: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `exponents` whose powers of two, as scales, have distinct and finite factors, and those (float64)."""
    row, column = free.nonzero()[-1].tolist()
    at = torch.tensor([column], device=bench.device)
    held = (bench.hold(torch.full((1, 1), code), bench.scales(torch.ldexp(torch.ones(1, 1), exponent)))
            for exponent in exponents)
    seen = torch.stack([bench.read(operands, at)[row, 0] for operands in held]).cpu() / number
    kept: list[int] = []
    for level in range(len(exponents)):
        apart = all(abs(float(seen[level] - seen[other])) > 0.1 * abs(float(seen[other])) for other in kept)
        if apart and math.isfinite(float(seen[level])) and float(seen[level]) != 0:
            kept.append(level)
    return exponents[kept], seen[kept]


def _recover_places(bench: Bench, code: int, number: float, levels: Tensor, factors: Tensor) -> Tensor:
    """Return the flat position of each weight's scale, int64 [N, K]; -1 if no block has the sequence of scales read."""
    rows, blocks = bench.grid_shape
    count, base = rows * blocks, len(levels)
    digits = max(1, math.ceil(math.log(count, base) - 1e-9))
    rng = inputs.generator(bench.seed, "blocks")
    # shuffled so that neighbours differ in every digit, not only in the last
    shuffled = torch.randperm(base**digits, generator=rng)[:count]
    place_of = torch.full((base**digits,), -1)
    place_of[shuffled] = torch.arange(count)
    read = torch.zeros(bench.n, bench.k, dtype=torch.long)
    known = torch.ones(bench.n, bench.k, dtype=torch.bool)
    place = torch.full_like(read, -1)
    check = min(base, 7)
    for digit in range(digits + 1):     # the last one is a check
        digit_of = shuffled // base**digit % base if digit < digits else shuffled % check
        scales = bench.scales(torch.ldexp(torch.ones(count), levels[digit_of]).reshape(rows, blocks))
        factor = (bench.read(bench.hold(torch.full((1, 1), code), scales)) / number).cpu()
        distance = (factor[..., None] - factors).abs() / factors.abs()
        nearest = distance.nan_to_num(torch.inf).min(dim=2)
        known &= nearest.values < 0.03
        if digit < digits:
            read += nearest.indices * base**digit
        else:
            place = place_of[read]
            known &= (place >= 0) & (nearest.indices == shuffled[place.clamp(min=0)] % check)
    return torch.where(known, place, -1)


def _differences(bench: Bench, found: BlockMap, own: Tensor) -> list[Difference]:
    rows, blocks = bench.grid_shape
    differences, seen = [], set()
    for n, k in (found.free & (found.place != own)).nonzero().tolist():
        here, place = divmod(int(own[n, k]), blocks), int(found.place[n, k])
        if (here, place) not in seen:
            seen.add((here, place))
            effective = _block(bench, *divmod(place, blocks)) if place >= 0 else "no block's scale"
            differences.append(
                Difference(entry=f"row {n}, column {k}", definition=_block(bench, *here), effective=effective)
            )
        if len(differences) == SHOWN:
            break
    return differences


def _block(bench: Bench, row: int, block: int) -> str:
    return f"row {row}" if bench.scaling.block is None else f"block {block} of row {row}"


def name_places(bench: Bench, found: BlockMap) -> tuple[list[Kind], str]:
    """Return the kind and the rule of a block map: a known fault that gives it exactly, or its structure. No kind if
    known faults of several kinds give it."""
    block, grid_row = block_of(torch.arange(bench.k), bench.scaling), block_row_of(torch.arange(bench.n), bench.scaling)
    fitting: dict[Kind, str] = {}
    for kind, message, places in _known_places(bench, block, grid_row):
        if bool((places == found.place)[found.free].all()):
            fitting.setdefault(kind, message)
    if len(fitting) == 1:
        return list(fitting), next(iter(fitting.values()))
    if fitting:
        told = "; or ".join(f"{kind}: {message}" for kind, message in fitting.items())
        return [], (f"cannot tell between {', '.join(fitting)}, which place these {len(block.unique())} blocks of a row"
                    f" alike ({told})")
    return _structure(bench, found, block, grid_row)


def _known_places(bench: Bench, block: Tensor, grid_row: Tensor) -> Iterator[tuple[Kind, str, Tensor]]:
    """Yield every known fault in placing scales: its kind, its rule, and the place of each weight's scale [N, K]."""
    n, k, scaling = bench.n, bench.k, bench.scaling
    rows, blocks = bench.grid_shape
    columns = torch.arange(k)
    for known in scale_places(scaling, n, k):
        yield known.kind, known.message, known.source[grid_row][:, block]
    if scaling.block is None and rows == n:
        yield (Kind.SCALE_TRANSPOSED, "row scales are applied along K instead of N",
               (columns % rows)[None, :].expand(n, k))
    for step, side, which in ((1, "early", "next"), (-1, "late", "previous")) if scaling.block else ():
        yield (Kind.BLOCK_OFF_BY_ONE,
               f"blocks begin one column {side}: a weight beside each boundary meets the {which} block's scale",
               grid_row[:, None] * blocks + block_of((columns + step).clamp(0, k - 1), scaling)[None, :])
    for message, positions in block_size_faults(scaling, n, k):
        yield Kind.BLOCK_SIZE_MISTAKEN, message, positions(columns, torch.arange(n))


def _structure(bench: Bench, found: BlockMap, block: Tensor, grid_row: Tensor) -> tuple[list[Kind], str]:
    """Return the kind and the structure of a map that no known fault gives: permuted, shared or padding scales, or
    another block size."""
    rows, blocks = bench.grid_shape
    if not bool((found.place >= 0)[found.free].any()):
        return [Kind.SCALE_PADDING_READ], "no weight meets a block's scale"
    # The scale of each block, if all its weights have the same one.
    own_of = grid_row[:, None] * blocks + block[None, :]
    own = own_of[found.free]
    places = found.place[found.free]
    high = torch.full((rows * blocks,), -2).scatter_reduce(0, own, places, "amax")
    low = torch.full((rows * blocks,), torch.iinfo(torch.int64).max).scatter_reduce(0, own, places, "amin")
    if not bool((low >= high).all()):
        change, name = _first_change(found, own_of)
        return [Kind.BLOCK_SIZE_MISTAKEN], f"scales change within the scheme's blocks: first after {change} {name}"
    grid = high.clamp(min=-1).reshape(rows, blocks)
    mapped = IndexMap.from_flat(grid, blocks, "row", "block")
    rule = mapped.describe()
    n_known, n_moved = int(mapped.known.sum()), int(mapped.moved.sum())
    if 2 * n_known < mapped.known.numel():
        return [], "most weights meet a factor that is not a block's scale"
    if n_moved == 0:
        unknown = int((~mapped.known).sum())
        return [Kind.SCALE_PADDING_READ], (
            f"{unknown} of {mapped.known.numel()} blocks meet a factor that is not a block's scale")
    kind = Kind.SCALE_PERMUTED if mapped.injective else Kind.SCALE_SHARED
    if rule is not None:
        return [kind], f"the scale of {rule}"
    r, c = mapped.moved.nonzero()[0].tolist()
    example = f"{_block(bench, r, c)} meets that of {_block(bench, int(mapped.rows[r, c]), int(mapped.columns[r, c]))}"
    how = ("a permutation without a simple rule" if mapped.injective
           else "several blocks share one scale, without a simple rule")
    return [kind], f"{how} moves {n_moved} of {n_known} scales: {example}"


def _first_change(found: BlockMap, own: Tensor) -> tuple[int, str]:
    """Return after how many weights along K, or rows, the scale first changes within a block of `own` [N, K]."""
    for dim, name in ((1, "weights along K"), (0, "rows")):
        size = own.shape[dim] - 1
        place, free, block = ([tensor.narrow(dim, start, size) for start in (0, 1)]
                              for tensor in (found.place, found.free, own))
        differs = (place[0] != place[1]) & free[0] & free[1] & (block[0] == block[1])
        if bool(differs.any()):
            return int(differs.any(dim=1 - dim).nonzero()[0]) + 1, name
    return 0, "weights"
