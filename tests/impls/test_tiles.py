"""The table of tiles, the user's own before the shipped one, and how the stream kernel divides its work."""

import json
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace

import pytest
import torch
from places import CHECKOUT

from fpxbench.implementation import discover

pytest.importorskip("triton")

discover()
from fpxbench.impls import (  # noqa: E402  (discover makes the package)
    _fragment,
    _tiles,
    _triton_modules,
    _tuning,
    triton_fused,
)
from fpxbench.impls._tiles import StreamTile, Tile, TileDevice, TileEntry, pick  # noqa: E402
from fpxbench.numbers.formats import format_named  # noqa: E402
from fpxbench.numbers.packing import fragment, pack  # noqa: E402
from fpxbench.numbers.scheme import scheme_named  # noqa: E402

H200 = TileDevice(90, stream=True)
FEW = Tile(8, 1, 1, 4, 2)


@pytest.fixture
def own(tmp_path, monkeypatch):
    path = tmp_path / "own" / "tiles.json"
    monkeypatch.setenv(_tiles.OWN_TABLE, str(path))
    return path


def test_the_shipped_table_has_every_width_and_number_of_tokens_for_six_layers():
    entries = _tiles.read(_tiles.SHIPPED)
    every = {(bits, m) for bits in _tiles.WIDTHS for m in (*_tiles.M_CLASSES, None)}
    layers = Counter((entry.n, entry.k) for entry in entries)
    assert len({(entry.n, entry.k, entry.bits, entry.m_max) for entry in entries}) == len(entries)
    assert sum(count == len(every) for count in layers.values()) >= 6, "others have some classes alone"
    assert {(entry.bits, entry.m_max) for entry in entries} == every
    for entry in entries:
        rows = entry.tile.block_m
        assert entry.m_max is None or rows <= max(16, entry.m_max), entry
        if isinstance(entry.tile, StreamTile):
            options = {name: getattr(entry.tile, name) for name in ("warps", "chunk", "at_once", "teams", "slices")}
            most = StreamTile.with_all_stages(entry.bits, rows, entry.tile.block_n, **options)
            assert entry.tile.stages <= most.stages, f"{entry} does not fit shared memory"


def test_the_tile_is_that_of_the_nearest_layer_with_as_many_tokens(own):
    for entry in _tiles.read(_tiles.SHIPPED):
        m = entry.m_max or 4096
        assert pick(m, entry.n, entry.k, entry.bits, "none", H200) == entry.tile
        assert pick(m, entry.n + 8, entry.k - 8, entry.bits, "none", H200) == entry.tile
    assert pick(100, 4096, 4096, 8, "none", H200) == pick(128, 4096, 4096, 8, "none", H200)
    assert pick(64, 4096, 4096, 5, "mx", H200) == pick(64, 4096, 4096, 6, "none", H200)
    assert isinstance(pick(4096, 4096, 4096, 8, "none", TileDevice(90)), Tile), "no Gluon, no stream kernel"


def test_an_entry_without_teams_and_overlap_has_none(own):
    own.parent.mkdir()
    own.write_text(json.dumps([
        {"arch": 90, "bits": 8, "n": 8, "k": 8, "m_max": 1, "tile": {"block_m": 8, "groups": 1, "warps_n": 1,
                                                                     "warps_k": 4}},
        {"arch": 90, "bits": 8, "n": 8, "k": 8, "m_max": 64, "stream": {"block_m": 64, "block_n": 64, "warps": 4,
                                                                        "stages": 4}}]))
    assert [pick(m, 8, 8, 8, "none", H200) for m in (1, 64)] == [Tile(8, 1, 1, 4), StreamTile(64, 64, 4, 4)]
    assert Tile(8, 1, 1, 4).overlap == StreamTile(64, 64, 4, 4).overlap == "none"


def test_an_entry_of_ones_own_comes_first_for_its_layer_and_tokens_alone(own):
    before = {m: pick(m, 4096, 4096, 8, "none", H200) for m in (1, 16, 512)}
    mine = Tile(16, 2, 1, 8, 1, True)
    assert before[16] != mine
    assert _tiles.save(TileEntry(90, 8, 4096, 4096, 16, mine)) == own
    assert {m: pick(m, 4096, 4096, 8, "none", H200) for m in (1, 16, 512)} == before | {16: mine}
    assert pick(16, 4096, 4096, 4, "none", H200) != mine
    _tiles.save(TileEntry(90, 8, 4096, 4096, 16, FEW))
    _tiles.save(TileEntry(90, 4, 4096, 4096, None, StreamTile(128, 128, 8, 4)))
    assert [entry.tile for entry in _tiles.read(own)] == [FEW, StreamTile(128, 128, 8, 4)]
    assert pick(16, 4096, 4096, 8, "none", H200) == FEW
    assert pick(16, 4096, 4096, 8, "none", TileDevice(80)) == FEW, "an architecture of its own has no entries: sm_90's"
    _tiles.save(TileEntry(80, 8, 4096, 4096, 16, mine))
    assert pick(16, 28672, 8192, 8, "none", TileDevice(80)) == mine, "now it has"


@pytest.mark.parametrize(("text", "problem"), [
    ("{", "is not a table of tiles"),
    ("{}", "must be a JSON list"),
    ('[{"arch": 90}]', "entry 0: 'tile'"),
    ('[3]', "entry 0"),
    (json.dumps([TileEntry(90, 8, 8, 8, 1, FEW).as_json() | {"bits": 5}]), "entry 0: bits must be one of"),
    (json.dumps([TileEntry(90, 8, 8, 8, 1, FEW).as_json() | {"m_max": 3}]), "m_max one of"),
    (json.dumps([TileEntry(90, 8, 8, 8, 1, FEW).as_json() | {"tile": {"block_m": 8}}]), "missing 3 required"),
    (json.dumps([{**TileEntry(90, 8, 8, 8, 1, FEW).as_json(), "tile": vars(FEW) | {"groups": 3}}]),
     "groups of a tile must be a power of two, not 3"),
    (json.dumps([{**TileEntry(90, 8, 8, 8, 1, StreamTile(64, 128, 8, 4)).as_json(),
                  "stream": vars(StreamTile(64, 128, 8, 4)) | {"block_n": 32}}]), "is not a tile of the stream kernel"),
    (json.dumps([{**TileEntry(90, 8, 8, 8, 1, StreamTile(64, 64, 4, 4)).as_json(),
                  "stream": vars(StreamTile(64, 64, 4, 3)) | {"teams": 2}}]), "4 stages or more"),
    (json.dumps([{**TileEntry(90, 8, 8, 8, 1, StreamTile(64, 64, 4, 4)).as_json(),
                  "stream": vars(StreamTile(64, 128, 4, 4)) | {"slices": 3}}]), "slices of 64"),
    (json.dumps([{**TileEntry(90, 8, 8, 8, 1, FEW).as_json(), "tile": vars(FEW) | {"overlap": "soon"}}]),
     "overlap of a tile must be one of"),
])
def test_a_table_that_is_none_is_refused_with_its_file_and_entry(own, text, problem):
    own.parent.mkdir()
    own.write_text(text)
    with pytest.raises(ValueError, match=problem) as raised:
        pick(1, 4096, 4096, 8, "none", H200)
    assert str(own) in str(raised.value) and _tiles.OWN_TABLE in str(raised.value)


def test_every_candidate_fits_its_device_and_covers_what_the_shipped_table_has():
    shipped = {(entry.bits, entry.m_max, replace(entry.tile, overlap="none")) for entry in _tiles.read(_tiles.SHIPPED)}
    tried = {(bits, most, tile) for bits in _tiles.WIDTHS for most in (*_tiles.M_CLASSES, None)
             for tile in _tuning.candidates(most or 4096, bits, "none", H200)}
    assert len(shipped - tried) <= len(shipped) // 4, "what is shipped was found by trying these, or nearly so"
    for scaling, device in (("fp32", H200), ("none", TileDevice(80))):
        assert all(isinstance(tile, Tile) for m in (1, 16, 64, 4096)
                   for tile in _tuning.candidates(m, 8, scaling, device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_layers_are_tuned_on_a_gpu_only():
    run = subprocess.run([sys.executable, CHECKOUT / "tools/tune_layers.py"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "no GPU here that the fragment kernels run on\n")


def test_tuning_remembers_the_fastest_tile(own, monkeypatch):
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: next(times))
    monkeypatch.setattr(triton_fused, "device_of", lambda device: H200)
    fused = triton_fused.TritonFused()
    weight = fused.quantize(torch.randn(8, 128), scheme_named("e4m3fn-row"))
    tiles = [FEW, Tile(8, 2, 1, 4, 2), Tile(8, 2, 2, 2, 1)]
    assert fused._tuned(torch.zeros(1, 128, dtype=torch.bfloat16), weight, tiles) == tiles[1]
    assert _tiles.read(own) == (TileEntry(90, 8, 8, 128, 1, tiles[1]),)


def plain(function, **names):
    """Return a kernel's helper as a function of integers."""
    return types.FunctionType(function.fn.__code__, {"gl": types.SimpleNamespace(maximum=max, minimum=min, **names)})


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("m_blocks", "n_blocks", "k_tiles", "programs"), [
    (1, 32, 32, 132), (1, 112, 64, 132), (4, 112, 64, 132), (32, 16, 112, 264), (9, 7, 1, 132), (3, 5, 2, 7),
    (1, 1, 3, 3), (4, 32, 32, 132), (4, 48, 32, 132), (1, 64, 3, 192),
])
def test_the_stream_kernel_multiplies_each_step_once_and_adds_up_each_part_once(m_blocks, n_blocks, k_tiles, programs,
                                                                                split):
    pytest.importorskip("triton.experimental.gluon")
    stream = _triton_modules.kernels("_stream_kernel", False)
    tiles = m_blocks * n_blocks
    rest, sharing = _fragment.divided(tiles, k_tiles, programs) if split else (0, 1)
    full = -(-(tiles - rest) // programs) * programs
    steps, parts, blocks = [], {}, set()
    for program in range(programs):
        place = plain(stream._place, program_id=lambda axis, program=program: program)
        for item in range(full // programs + 2):
            m, n, begin, end, slot = place(item, programs, sharing, full, rest, k_tiles, m_blocks, n_blocks, 8)
            if end > begin:
                steps += [(m, n, k) for k in range(begin, end)]
                blocks.add((m, n))
                assert slot not in parts and slot < programs + rest
                if slot >= 0:
                    parts[slot] = program
    assert len(steps) == len(set(steps)) == m_blocks * n_blocks * k_tiles
    assert blocks == {(m, n) for m in range(m_blocks) for n in range(n_blocks)}
    summed = {}
    for number in range(rest):
        first, last = plain(stream._sharing)(number, sharing, rest, k_tiles)
        for program in range(first, last + 1):
            assert program + number not in summed
            summed[program + number] = program
    assert summed == parts


@pytest.mark.parametrize(("tiles", "k_tiles", "programs", "rest", "sharing"), [
    (264, 32, 132, 0, 1),       # each program makes two
    (64, 32, 264, 64, 256),     # four programs a tile; 8 programs have nothing to do
    (48, 32, 132, 48, 132),     # two a tile would take 96 programs: a third longer
    (128, 32, 132, 0, 1),       # one each, and 4 programs have nothing to do
    (192, 32, 132, 60, 120),    # after one whole tile each, two a tile
    (1, 3, 132, 1, 3),          # a step each
])
def test_tiles_are_divided_so_that_a_program_has_a_part_of_one_where_that_costs_little(
        tiles, k_tiles, programs, rest, sharing):
    assert _fragment.divided(tiles, k_tiles, programs) == (rest, sharing)


@pytest.mark.parametrize("fmt", ["e4m3fn", "e3m2", "e2m1", "int8", "e2m2", "e3m3", "e1m1", "e1m0"])
def test_four_lanes_of_the_stream_kernel_decode_neighbouring_columns_of_each_other(fmt):
    """Lane 4 r + w has, of the 8 columns of lane 4 r + i, columns 2 w and 2 w + 1, which is how the instruction takes
    columns that lie in the activation's own order."""
    pytest.importorskip("triton.experimental.gluon")
    stream, fmt = _triton_modules.kernels("_stream_kernel", False), format_named(fmt)
    bits, mantissa_bits = fmt.bits, None if fmt.twos_complement else fmt.mantissa_bits
    placed = fragment.placed_bits(bits, mantissa_bits)
    codes = torch.randint(0, 1 << bits, (8, 128), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack(codes, bits, fragment.name_for(mantissa_bits)).reshape(-1).view(torch.int32).reshape(bits, 32)
    planes, line = [], 0
    for owners, lines in [(1, bits & 12), (2, bits & 2), (4, bits & 1)]:
        if lines:
            layout = stream._shared_layout.fn(8, 4, lines, owners)
            planes += [(layout, owners, line, plane) for plane in range(1 + (lines == 8))]
            line += lines
    for lane in range(32):
        for other in range(4):
            words = []
            for layout, owners, line, plane in planes:
                _, inner, word, _ = (sum(base[axis] for base in _bases(layout, lane, other | plane << 2))
                                     for axis in range(4))
                words.append((int(packed[line + inner, word]) & 0xFFFFFFFF) >> lane % owners * (16 // owners))
            for j, pair in enumerate(fragment.own_moves(placed)):
                decoded = 0
                for move in pair:
                    shifted = words[move.word] << move.shift if move.shift >= 0 else words[move.word] >> -move.shift
                    decoded |= shifted & move.mask * 0x10001
                column = 32 * j + 8 * other + 2 * (lane % 4)
                for half in range(2):
                    found = sum((decoded >> 16 * half + place & 1) << bit for bit, place in enumerate(placed))
                    assert found == codes[lane // 4, column + half], (lane, other, j, half)


def _bases(layout, lane, register):
    """Return the bases of a layout that a register of a lane adds up."""
    return [base for bit, base in enumerate(layout.lane_bases) if lane >> bit & 1] + [
        base for bit, base in enumerate(layout.reg_bases) if register >> bit & 1]
