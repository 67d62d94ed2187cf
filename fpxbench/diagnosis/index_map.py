"""Describe a map between positions of a grid by the rule that gives the source of each position.

The maps come from experiments: the scale that multiplies a block, the code that is read for a weight. A description is
returned only if it holds for every known position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
_FEWEST_POSITIONS = 32
"""Every permutation of 4 positions is linear in their bits, and one in thirty of 8."""
Rule = tuple[str, Callable[[Tensor], Tensor]]
"""Text with ``{i}`` for the position, and the function that it describes: int64 positions -> int64 sources."""


@dataclass(frozen=True)
class IndexMap:
    """The source of each position of a grid [R, C], int64; -1 where it is unknown.

    row_name, column_name : names of the axes in descriptions: ``row`` and ``block``
    """

    rows: Tensor
    columns: Tensor
    row_name: str
    column_name: str

    @classmethod
    def from_flat(cls, flat: Tensor, source_columns: int, row_name: str, column_name: str) -> IndexMap:
        """Return the map of flat sources [R, C], ``row * source_columns + column``; -1 where unknown."""
        known = flat >= 0
        return cls(torch.where(known, flat // source_columns, -1), torch.where(known, flat % source_columns, -1),
                   row_name, column_name)

    @property
    def known(self) -> Tensor:
        return self.rows >= 0

    @property
    def moved(self) -> Tensor:
        """Known positions whose source is another position, bool [R, C]."""
        r, c = self._own()
        return self.known & ((self.rows != r) | (self.columns != c))

    def rows_moved(self) -> Tensor | None:
        """Return the source row of each row, int64 [R], if only whole rows are moved; else None."""
        _, c = self._own()
        return _one_axis(self.rows, self.known) if bool((self.columns == c)[self.known].all()) else None

    @property
    def injective(self) -> bool:
        """Whether no two known positions have the same source."""
        flat = (self.rows * (int(self.columns.max()) + 1) + self.columns)[self.known]
        return len(flat.unique()) == len(flat)

    def describe(self) -> str | None:
        """Return the rule of the map as one clause; None if no simple rule holds for every known position."""
        separate = self._describe_axes()
        if separate is not None:
            return separate
        if self.transposed:
            return f"{self.row_name} r, {self.column_name} c is that of {self.row_name} c, {self.column_name} r"
        return self._describe_flat()

    @property
    def transposed(self) -> bool:
        """Whether every position [r, c] has the source [c, r]."""
        r, c = self._own()
        return bool(self.moved.any()) and bool(((self.rows == c) & (self.columns == r))[self.known].all())

    def _own(self) -> tuple[Tensor, Tensor]:
        shape = self.rows.shape
        return torch.arange(shape[0])[:, None].expand(shape), torch.arange(shape[1])[None, :].expand(shape)

    def _describe_axes(self) -> str | None:
        """Return the rules of a map whose source row depends only on the row, and its source column on the column."""
        of_rows, of_columns = _one_axis(self.rows, self.known), _one_axis(self.columns.T, self.known.T)
        if of_rows is None or of_columns is None:
            return None
        parts = []
        for source, name, letter in ((of_rows, self.row_name, "r"), (of_columns, self.column_name, "c")):
            if bool((source == torch.arange(len(source)))[source >= 0].all()):
                continue
            rule = axis_rule(source)
            if rule is None:
                return None
            parts.append(f"{name} {letter} is that of {name} {rule.format(i=letter)}")
        return "; ".join(parts) or None

    def _describe_flat(self) -> str | None:
        """Return the rule of a map in terms of flat positions, in memory order."""
        size_r, size_c = self.rows.shape
        if size_r == 1 or size_c == 1:
            return None
        flat = torch.where(self.known, self.rows * size_c + self.columns, -1).reshape(-1)
        if bool((self.columns >= size_c).any()):
            return None
        rule = axis_rule(flat)
        where = f"flat position i = {size_c} * {self.row_name} + {self.column_name}"
        if rule is not None:
            return f"{where} is that of {rule.format(i='i')}"
        bits = bit_rule(flat)
        return None if bits is None else f"{where} is that with {bits}"


def axis_rule(source: Tensor) -> str | None:
    """Return the rule of a map along one axis, int64 [L] with -1 where unknown, as text with ``{i}`` for the position;
    None if none fits."""
    known = source >= 0
    if not bool(known.any()):
        return None
    position = torch.arange(len(source))
    for text, function in _axis_rules(source, known):
        if bool((function(position) == source)[known].all()):
            return text
    return None


def _axis_rules(source: Tensor, known: Tensor) -> Iterator[Rule]:
    size = len(source)
    position = torch.arange(size)
    first = int(known.nonzero()[0])
    offset = int(source[first]) - first
    values = source[known]
    if len(values.unique()) == 1:
        yield str(int(values[0])), lambda i: torch.full_like(i, int(values[0]))
    sign, distance = ("+" if offset > 0 else "-"), abs(offset)
    yield f"{{i}} {sign} {distance}", lambda i: i + offset
    yield f"({{i}} {sign} {distance}) mod {size}", lambda i: (i + offset) % size
    for step in {1, distance}:
        if step:
            yield f"{{i}} + {step}, at most {size - 1}", lambda i, step=step: (i + step).clamp(max=size - 1)
            yield f"{{i}} - {step}, at least 0", lambda i, step=step: (i - step).clamp(min=0)
    total = int(source[first]) + first
    yield f"{total} - {{i}}", lambda i: total - i
    if bool(known[:2].all()):
        step, start = (int(source[1]) - int(source[0])) % size, int(source[0])
        text = f"({step} * {{i}} + {start}) mod {size}" if start else f"{step} * {{i}} mod {size}"
        yield text, lambda i: (step * i + start) % size
    different = (source ^ position)[known]
    if len(different.unique()) == 1:
        yield f"{{i}} xor {int(different[0])}", lambda i: i ^ int(different[0])
    elif len(values_pm := (source - position)[known].unique()) == 2 and int(values_pm.sum()) == 0:
        step = int(values_pm.max())
        yield f"{{i}} ± {step}", lambda i: torch.where(known, source, i)
    for shared in (2, 3, 4, 8, 16, 32, 64, 128):
        if shared < 2 * size:
            for back in range(min(shared, 4)):
                yield (f"{shared} * ({{i}} div {shared})" + (f" + {back}" if back else ""),
                       lambda i, shared=shared, back=back: i // shared * shared + back)
            yield f"{{i}} div {shared}", lambda i, shared=shared: i // shared
            yield f"{{i}} mod {shared}", lambda i, shared=shared: i % shared
            yield f"{shared} * {{i}}", lambda i, shared=shared: i * shared
            yield f"{shared} * {{i}} mod {size}", lambda i, shared=shared: i * shared % size
    yield from _tile_rules(source, known)


def _tile_rules(source: Tensor, known: Tensor) -> Iterator[Rule]:
    """Yield rules that move positions within tiles of one size, in the same way in every tile."""
    size = len(source)
    for tile in dict.fromkeys((*TILES, size)):
        if tile > size or tile < 2:
            continue
        base = torch.arange(size) // tile * tile
        within = source - base
        if not bool(((within >= 0) & (within < tile))[known].all()):
            continue
        yield from _within_tile(tile)
        table = torch.full((tile,), -1)
        index = (torch.arange(size) % tile)[known]
        table[index] = within[known]
        if tile <= 16 and bool((table >= 0).all()):
            listed = ", ".join(map(str, table.tolist()))
            yield (f"({listed})[{{i}} mod {tile}] of its {tile}" if tile < size else f"({listed})[{{i}}]",
                   lambda i, tile=tile, table=table: i // tile * tile + table[i % tile])
        bits = bit_rule(table) if tile & (tile - 1) == 0 or tile == size else None
        if bits is not None:
            yield (f"{{i}} with {bits}", lambda i, tile=tile, table=table: i // tile * tile + table[i % tile])


def _within_tile(tile: int) -> Iterator[Rule]:
    of_its = f" of its {tile}"
    yield f"{tile - 1} - {{i}} mod {tile}{of_its}", lambda i: i // tile * tile + (tile - 1 - i % tile)
    for stride in range(2, tile):
        if tile % stride == 0:
            groups = tile // stride
            yield (f"{groups} * ({{i}} mod {stride}) + ({{i}} mod {tile}) div {stride}{of_its}",
                   lambda i, stride=stride, groups=groups:
                   i // tile * tile + groups * (i % tile % stride) + i % tile // stride)
    for step in range(1, tile):
        yield f"({{i}} + {step}) mod {tile}{of_its}", lambda i, step=step: i // tile * tile + (i + step) % tile


def bit_rule(source: Tensor) -> str | None:
    """Return the rule of an affine map over GF(2): each bit of the source is the xor of some bits of the position,
    possibly inverted. None if the map is not of this form, or too few positions are known.

    This covers xor swizzles, transposes and interleaves of powers of two, reversed bits, and Gray codes. `source` is
    int64 [L], -1 where unknown.
    """
    bits = max(2, (len(source) - 1).bit_length())
    known = source >= 0
    units = torch.tensor([0, *(1 << bit for bit in range(bits))])
    if len(source) <= int(units[-1]) or not bool(known[units].all()) or bool((source >= 1 << bits).any()):
        return None
    constant, *images = source[units].tolist()
    position, predicted = torch.arange(len(source)), torch.full_like(source, constant)
    for bit, image in enumerate(images):
        predicted ^= torch.where((position >> bit & 1) == 1, image ^ constant, 0)
    if not bool((predicted == source)[known].all()):
        return None
    taken = [[bit for bit, image in enumerate(images) if (image ^ constant) >> at & 1] for at in range(bits)]
    if any(len(of) != 1 for of in taken) and (len(source) < _FEWEST_POSITIONS or int(known.sum()) < 3 * len(units)):
        return None     # with so few positions, a random permutation may have this form
    text = ", ".join(("not " if constant >> at & 1 else "") + (" xor ".join(map(str, of)) if of else "none")
                     for at, of in enumerate(taken))
    return f"bits 0 to {bits - 1} taken from bits {text}"


def _one_axis(source: Tensor, known: Tensor) -> Tensor | None:
    """Return the source of each row, int64 [R], if all known columns of each row have the same one, else None; -1 for a
    row without known columns."""
    low = torch.where(known, source, torch.iinfo(torch.int64).max).amin(dim=1)
    high = source.amax(dim=1)
    if not bool((low == high)[known.any(dim=1)].all()):
        return None
    return high
