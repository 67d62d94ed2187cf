"""Choose the tile of a product: that of the nearest measured layer, so that nothing is tuned at the first call.

`_fragment_tiles.json` was measured on an H200. The user's own table, which `_tuning` writes, takes precedence. K, M and
the numbers of tiles are not compile-time constants, so that shapes with the same tile share compiled kernels.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from fpxbench.cache_folder import cache_root

SHIPPED = Path(__file__).with_name("_fragment_tiles.json")
OWN_TABLE = "FPX_TILES"
"""Environment variable with the path of the user's own table."""
M_CLASSES = (1, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = (4, 6, 8)
MOST_SHARED = 227 * 1024
"""Bytes of shared memory for one program on sm_90."""
MEASURED_ARCH = 90
OVERLAPS = ("none", "early", "late")
"""How a product overlaps with the kernels before and after it, from sm_90 on, where these allow it. With ``early`` and
``late`` it is launched before the kernel before has ended, and waits on the device before it reads or writes anything;
the next kernel may begin when all programs have waited (``early``) or have read the weight (``late``)."""


@dataclass(frozen=True)
class Tile:
    """`_fragment_kernel`: a program makes `block_m` x 8 `groups` `warps_n` of the result; `warps_k` warps divide K.

    depth : loads of the weight in flight
    ordered : x is first reordered as the threads read it, by a separate kernel
    overlap : one of `OVERLAPS`
    """

    block_m: int
    groups: int
    warps_n: int
    warps_k: int
    depth: int = 1
    ordered: bool = False
    overlap: str = "none"

    def __post_init__(self) -> None:
        _powers_of_two(self, "block_m", "groups", "warps_n", "warps_k", "depth")
        _known_overlap(self)
        if not (8 <= self.block_m <= 64 and self.warps_n * self.warps_k <= 32 and (self.block_m > 8 or not self.ordered)
                and self.shared_bytes <= MOST_SHARED):
            raise ValueError(f"{self} is not a tile of the fragment kernel: block_m 8 to 64 (16 at least where x is"
                             f" ordered), 32 warps at most and {MOST_SHARED} bytes of shared memory")

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory for adding up the warps' sums."""
        return 0 if self.warps_k == 1 else 4 * self.warps_n * self.warps_k * max(16, self.block_m) * 8 * self.groups


@dataclass(frozen=True)
class StreamTile:
    """`_stream_kernel`: a program makes tiles of `block_m` x `block_n` with `warps` (4 or 8) warps that decode.

    stages : buffers in shared memory for tiles of x and of the weight in flight
    chunk : how many times 32 columns are decoded, then multiplied, at once: 1, 2 or 4
    at_once : programs per multiprocessor, 1 or 2
    split : whether K of the tiles that remain, after every program has computed equally many, is divided among the
        programs; a second kernel adds up their sums, in order
    group : blocks of x that are multiplied by a part of the weight before the next part
    teams : 2 where two teams of `warps` warps take every other 128 columns of K, and add up their sums; 1 elsewhere
    overlap : one of `OVERLAPS`
    slices : number of groups of 4 warps that decode 64 rows of the weight each and share the tile of x; with 1,
        `block_n` rows are one slice
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    chunk: int = 1
    at_once: int = 1
    split: bool = True
    group: int = 8
    teams: int = 1
    overlap: str = "none"
    slices: int = 1

    def __post_init__(self) -> None:
        _powers_of_two(self, "block_m", "chunk", "group")
        _known_overlap(self)
        if not (16 <= self.block_m <= 256 and self.block_n in (64, 128, 192, 256) and self.warps in (4, 8) and
                16 * self.warps <= self.block_n and self.stages >= 2 * self.teams and self.chunk <= 4 and
                (self.teams, self.at_once) in ((1, 1), (1, 2), (2, 1)) and self.teams * self.warps <= 8 and
                (self.block_n != 192 if self.slices == 1 else
                 (self.warps, self.teams, self.at_once) == (4, 1, 1) and self.block_n == 64 * self.slices <= 192)):
            raise ValueError(f"{self} is not a tile of the stream kernel: block_m 16 to 256, block_n 64 to 256 and at"
                             " least 16 per warp, 4 or 8 warps, 2 stages or more, chunk 1, 2 or 4, at_once 1 or 2; or"
                             " two teams of 4 warps, 4 stages or more, at_once 1; or two or three slices of 64 of"
                             " block_n for 4 warps each, at_once 1")

    @classmethod
    def with_all_stages(cls, bits: int, block_m: int, block_n: int, warps: int, chunk: int = 1, at_once: int = 1,
                        split: bool = True, group: int = 8, teams: int = 1, slices: int = 1) -> StreamTile | None:
        """Return the tile with as many stages (8 at most) as fit in shared memory; None if fewer than two per team
        do."""
        room = MOST_SHARED // at_once - 64 * block_n - 3072     # results to be stored, barriers
        room -= 4 * block_m * block_n * (teams - 1)             # sums of the second team
        stages = min(8, room // (256 * block_m + 16 * bits * block_n + 8 * block_n))
        if stages < 2 * teams:
            return None
        return cls(block_m, block_n, warps, stages, chunk, at_once, split, group, teams, slices=slices)


AnyTile = Tile | StreamTile


@dataclass(frozen=True)
class TileDevice:
    """A device as the choice of a tile depends on it.

    arch : 90 for sm_90; 0 for Triton's interpreter
    stream : whether `_stream_kernel` runs there
    """

    arch: int
    stream: bool = False

    @property
    def ptx(self) -> bool:
        return self.arch > 0


@dataclass(frozen=True)
class TileEntry:
    """The fastest tile for a layer of N = `n` and K = `k` on `arch`, for codes of `bits` bits and M in the class
    `m_max` (the numbers of tokens up to it and above the next smaller class; None: above all classes)."""

    arch: int
    bits: int
    n: int
    k: int
    m_max: int | None
    tile: AnyTile

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS or self.m_max not in (*M_CLASSES, None) or min(self.arch, self.n, self.k) < 1:
            raise ValueError(f"bits must be one of {WIDTHS}, m_max one of {M_CLASSES} or null, and arch, n and k"
                             f" positive, not {self.bits}, {self.m_max}, {self.arch}, {self.n} and {self.k}")

    def as_json(self) -> dict[str, Any]:
        kind = "stream" if isinstance(self.tile, StreamTile) else "tile"
        return {"arch": self.arch, "bits": self.bits, "n": self.n, "k": self.k, "m_max": self.m_max,
                kind: {field.name: getattr(self.tile, field.name) for field in fields(self.tile)}}

    def distance(self, n: int, k: int) -> float:
        """Return how far a layer is from the measured one, in octaves of N and of K."""
        return abs(math.log2(n / self.n)) + abs(math.log2(k / self.k))


def _powers_of_two(tile: AnyTile, *names: str) -> None:
    for name in names:
        value = getattr(tile, name)
        if type(value) is not int or value < 1 or value & (value - 1):
            raise ValueError(f"{name} of a tile must be a power of two, not {value!r}")


def _known_overlap(tile: AnyTile) -> None:
    if tile.overlap not in OVERLAPS:
        raise ValueError(f"overlap of a tile must be one of {OVERLAPS}, not {tile.overlap!r}")


def read(path: Path) -> tuple[TileEntry, ...]:
    """Return the entries of a table. Raise ValueError with the file and the entry for what is not an entry."""
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a table of tiles: {error}; remove it, or set {OWN_TABLE}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} is not a table of tiles: it must be a JSON list; remove it, or set {OWN_TABLE}")
    entries = []
    for number, row in enumerate(rows):
        try:
            values = dict(row)
            if "stream" in values:
                tile: AnyTile = StreamTile(**values.pop("stream"))
            else:
                tile = Tile(**values.pop("tile"))
            entries.append(TileEntry(**values, tile=tile))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}, entry {number}: {error}; correct or remove it, or set {OWN_TABLE}") from None
    return tuple(entries)


def own_path(arch: int) -> str:
    """Return where the user's own table for an architecture is: FPX_TILES, or a file in the cache folder."""
    return os.environ.get(OWN_TABLE) or _cached_path(arch, os.environ.get("XDG_CACHE_HOME"))


@cache
def _cached_path(arch: int, cache_home: str | None) -> str:
    """Return the file in the cache folder, which lies in `cache_home`. Cached, as every product asks for it."""
    return str(cache_root() / f"tiles-sm_{arch}.json")


def _own(arch: int) -> tuple[str, int]:
    """Return the path of the user's own table and when it was written; 0 if there is none."""
    path = own_path(arch)
    try:
        return path, os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return path, 0


@cache
def _table(arch: int, own: str, written: int) -> tuple[TileEntry, ...]:
    """Return the user's own entries and the shipped ones, those of `arch` or else of sm_90."""
    entries = (*(read(Path(own)) if written else ()), *read(SHIPPED))
    return tuple(entry for entry in entries if entry.arch == arch) or tuple(
        entry for entry in entries if entry.arch == MEASURED_ARCH)


def save(entry: TileEntry) -> Path:
    """Put an entry in the user's own table, in place of another for the same layer and M, and return its path."""
    path = Path(own_path(entry.arch))
    kept = [old for old in (read(path) if path.is_file() else ())
            if (old.arch, old.bits, old.n, old.k, old.m_max) != (entry.arch, entry.bits, entry.n, entry.k, entry.m_max)]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text("[\n" + ",\n".join(json.dumps(each.as_json()) for each in [*kept, entry]) + "\n]\n")
    written.replace(path)
    return path


def m_class(m: int) -> int | None:
    """Return the class that a number of tokens is in."""
    return next((most for most in M_CLASSES if m <= most), None)


def width_of(bits: int) -> int:
    """Return the measured code width whose tiles codes of `bits` have: the next wider one."""
    return next(width for width in WIDTHS if bits <= width)


# fp32 block scales are not in the stream kernel; these are the best of a few tries on an H200.
GROUP_TILES = {8: Tile(8, 2, 1, 4, 2), 16: Tile(16, 2, 2, 2, 1, True), None: Tile(64, 2, 4, 2, 1, True)}
NARROW_GROUP_TILES = {8: Tile(8, 1, 1, 4, 2), 16: Tile(16, 1, 4, 4, 1, True), None: Tile(64, 2, 2, 4, 1, True)}
NARROW_N = 8192


def pick(m: int, n: int, k: int, bits: int, scaling: str, device: TileDevice) -> AnyTile:
    """Return the tile for M rows of x, a weight [n, k] with codes of `bits` bits, and scales applied as `scaling`.

    It is that of the nearest layer measured with M in the same class. Widths that were not measured use the next wider
    one's tiles, architectures that were not measured sm_90's.
    """
    if not device.ptx:      # the interpreter's time depends on operations, not on elements
        return Tile(8, 4, 4, 2) if m <= 8 else Tile(64, 4, 4, 2, ordered=True)
    if scaling == "fp32":
        return (GROUP_TILES if n > NARROW_N else NARROW_GROUP_TILES)[8 if m <= 8 else 16 if m <= 16 else None]
    tile = _nearest(*_own(device.arch), m_class(m), n, k, width_of(bits), device)
    return tile or Tile(min(64, max(16, 1 << (m - 1).bit_length())), 2, 4, 2, 1, True)


@cache
def _nearest(own: str, written: int, m_max: int | None, n: int, k: int, width: int, device: TileDevice
             ) -> AnyTile | None:
    measured = [entry for entry in _table(device.arch, own, written) if entry.bits == width and entry.m_max == m_max
                and (device.stream or isinstance(entry.tile, Tile))]
    return min(measured, key=lambda entry: entry.distance(n, k)).tile if measured else None
