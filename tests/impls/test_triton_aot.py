"""triton_fused's kernels compile for GPUs that are not here, into what they were written to become."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import pytest
from places import HELPERS

from fpxbench.implementation import discover

pytest.importorskip("triton")

discover()
from fpxbench.impls import _fragment, _tiles  # noqa: E402  (discover makes that package)
from fpxbench.impls._planar import Dot, Matvec, Target, fitted  # noqa: E402
from fpxbench.impls._tiles import SHIPPED, StreamTile, Tile, TileDevice, pick, read  # noqa: E402
from fpxbench.numbers.scheme import scheme_named  # noqa: E402

TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950"]
FRAGMENT_TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
SCHEMES = ["e4m3fn-row", "e5m2-row", "e4m3fnuz-row", "e3m2-g128", "mxfp4", "nvfp4", "int8-row"]
MAIN = {"e4m3fn-row": 8, "e3m2-row": 6, "mxfp4": 4, "nvfp4": 4}     # and their code widths
K = 4096
KERNELS = {Matvec: "matvec", Dot: "dot", Tile: "fragment", StreamTile: "stream"}
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}


@dataclass(frozen=True)
class Job:
    target: str
    scheme: str
    activation: str
    m: int
    config: Matvec | Dot | Tile | StreamTile

    def line(self) -> str:
        return json.dumps(vars(self) | {"config": asdict(self.config), "kernel": KERNELS[type(self.config)]})


def planar_jobs(whole):
    """Yield every target with schemes on both paths and, in turn, with both activations and two configs of each. AMD's,
    where planar rows are all there is, have every scheme between them, and if `whole` each of them. Unless `whole`, a
    scheme goes through one of the two kernels of a target, in turn."""
    for t, target in enumerate(TARGETS):
        kind = Target("cuda", int(target[3:])) if target.startswith("sm_") else Target("hip")
        every = SCHEMES if whole else SCHEMES[t % 2::2]
        for s, scheme in enumerate(every if target.startswith("gfx") else SCHEMES[t % 2::3]):
            odd, turn = (t + s) % 2, (t // 2 + s) % 2
            matvec = Matvec(rows=2 - odd, words=4 * kind.warp_size * (1 + odd), num_warps=1 + odd)
            tile = (64, 64, 64, 4) if odd else (16, 64, 64, 4)
            dot = fitted(*tile, scheme_named(scheme), K, kind)
            if whole or turn == 0:
                yield Job(target, scheme, ["bf16", "fp16"][odd], 1, matvec)
            if whole or turn == 1:
                yield Job(target, scheme, ["fp16", "bf16"][odd], 64 if odd else 16, dot)
    yield Job("sm_90", "e2m1-g128", "bf16", 1, Matvec(4, 256, 2))
    yield Job("sm_90", "e4m3fn-row", "bf16", 4, Matvec(4, 128, 1))


def fragment_jobs(whole):
    """Yield the tiles: on sm_90 those that the main schemes have for a wide layer; on every target those
    that have no stream kernel. Two groups of warps divide K or N of some tiles on sm_90; three, the longest to compile,
    only if `whole`. Unless `whole`, a main scheme has one of the four M, and a target one scheme, in turn."""
    for s, (scheme, bits) in enumerate(MAIN.items()):
        for m in (1, 16, 64, 512) if whole else ((64, 16, 512, 1)[s],):
            yield Job("sm_90", scheme, "bf16", m, pick(m, 28672, 8192, bits, "none", TileDevice(90, stream=True)))
    for overlap, m, stream in (("late", 1, False), ("none", 1, False), ("early", 16, False), ("late", 32, True)):
        tile = pick(m, 28672, 8192, 8, "none", TileDevice(90, stream))
        yield Job("sm_90", "int8-row", "bf16", m, replace(tile, overlap=overlap))
    shipped = [(entry.m_max, entry.bits, entry.tile) for entry in read(SHIPPED) if isinstance(entry.tile, Tile)]
    of_tokens = {each[0]: each for each in shipped}
    for m, bits, tile in shipped if whole else of_tokens.values():
        yield Job("sm_90", next(scheme for scheme, width in MAIN.items() if width == bits), "bf16", m, tile)
    groups = [("e4m3fn-row", "bf16", 256, 28672, 8192, 2), ("int8-row", "fp16", 64, 4096, 4096, 2),
              ("nvfp4", "bf16", 256, 4096, 4096, 2), ("e4m3fn-row", "bf16", 512, 6144, 4096, 3)]
    for scheme, activation, m, n, k, number in groups if whole else groups[:2]:
        tile = pick(m, n, k, scheme_named(scheme).format.bits, "none", TileDevice(90, stream=True))
        assert tile.teams * tile.slices == number, "another tile is the fastest: have another layer here"
        yield Job("sm_90", scheme, activation, m, tile)
    for t, target in enumerate(FRAGMENT_TARGETS):
        for s, scheme in enumerate((("int8-row", "e3m2-row", "nvfp4", "e5m2-row", "e4m3fn-row")[t], "e2m1-g32")):
            m, kind = (1, 16, 64)[(t + s) % 3], "fp32" if scheme == "e2m1-g32" else "none"
            if whole or s == t % 2:
                yield Job(target, scheme, ["bf16", "fp16"][(t + s) % 2], m,
                          pick(m, 28672, 8192, scheme_named(scheme).format.bits, kind, TileDevice(int(target[3:]))))


def compile_all(part):
    """Return metadata by job, from one child process. A child that dies leaves out the rest; the end of its log is the
    error.

    Objects are kept in Triton's own cache, whose keys hold the source of a kernel and of all that it calls, the options
    and the compiler: what did not change since the last run is read again, not compiled.
    """
    child = HELPERS / "triton_aot_child.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}    # 3.10 changes the default
    run = subprocess.run(
        [sys.executable, child], input="\n".join(job.line() for job in part), env=environment,
        capture_output=True, text=True,
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    done = [answer["facts"] for answer in answers if "facts" in answer]
    error = f"the compiling process ended with {run.returncode}: {run.stderr[-2000:]}"
    return dict(zip(part, done, strict=False)), error


@pytest.fixture(scope="module", params=["core", pytest.param("whole", marks=pytest.mark.slow)])
def compiled(request):
    every = list(dict.fromkeys([*planar_jobs(request.param == "whole"), *fragment_jobs(request.param == "whole")]))
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(compile_all, [every[::2], every[1::2]]))
    facts = {job: result for part, _ in parts for job, result in part.items()}
    missing = [job for job in every if job not in facts]
    assert not missing, f"{missing[0]} did not compile; " + " | ".join(error for part, error in parts if error)
    return facts


def only(compiled, kind, target=""):
    return {
        job: facts for job, facts in compiled.items() if isinstance(job.config, kind) and job.target.startswith(target)
    }


def test_every_kernel_becomes_an_object_on_every_target(compiled):
    for kind in (Matvec, Dot):
        assert {job.target for job in only(compiled, kind)} == set(TARGETS)
    assert {job.target for job in only(compiled, Tile)} == set(FRAGMENT_TARGETS)
    assert {job.scheme for job in only(compiled, (Matvec, Dot), "gfx")} == set(SCHEMES)
    assert {job.activation for job in only(compiled, (Matvec, Dot), "gfx")} == {"bf16", "fp16"}
    assert not [job for job, facts in compiled.items() if facts["object_bytes"] < 1000]


def test_the_matvec_reads_16_bytes_a_load_and_changes_no_layout(compiled):
    """No shared memory and no barrier, but for the sum across warps at the end."""
    for job, facts in only(compiled, Matvec).items():
        assert facts["wide_loads"] >= job.config.rows, job
        if job.config.num_warps == 1:
            assert facts["shared_bytes"] == 0 and facts["barriers"] == 0, job
        else:
            assert facts["shared_bytes"] <= 64 * job.config.num_warps, job


def test_the_dot_path_uses_each_targets_matrix_instructions(compiled):
    expected = {
        "sm_80": ["mma.sync"],
        "sm_89": ["mma.sync"],
        "sm_90": ["wgmma.mma_async"],
        "sm_100": ["tcgen05.mma"],
        "gfx942": ["v_mfma"],
        "gfx950": ["v_mfma"],
    }
    for job, facts in only(compiled, Dot).items():
        assert facts["matrix"] == expected[job.target], job


def test_fragments_meet_matrix_instructions_without_passing_between_threads(compiled):
    """From memory to registers to the instruction: no shared memory and no barrier in the loop along K."""
    for job, facts in only(compiled, Tile).items():
        assert facts["matrix"] == ["mma.sync"], job
        assert facts["loop_shared"] == 0 and facts["loop_barriers"] == 0, (job, facts)
        assert facts["shared_bytes"] <= job.config.shared_bytes, job


def test_for_few_tokens_the_weight_is_the_left_operand_which_has_twice_as_many_rows(compiled):
    """An instruction multiplies 8 weights of a thread instead of 4."""
    seen = set()
    for job, facts in only(compiled, Tile, "sm_90").items():
        tile = job.config
        left = tile.block_m == 8 and tile.groups > 1 and job.scheme != "e2m1-g32"      # which has fp32 block scales
        weights = 32 * tile.groups * tile.depth * max(1, tile.block_m // 16)
        assert facts["loop_products"] == weights // (8 if left else 4), (job, facts)
        seen.add(left)
    assert seen == {True, False}


def test_a_kernel_that_may_begin_early_waits_before_it_reads_or_writes_memory(compiled):
    """From sm_90 on. All warps wait, and let the next kernel begin before or after the products, but never before they
    have waited. Where the kernel that orders x is all that is waited for, only x is not read before.

    What counts is the machine code: the assembler once moved loads of x before the wait that preceded them."""
    seen = set()
    for job, facts in only(compiled, (Tile, StreamTile), "sm_").items():
        tile, dependent = job.config, int(job.target[3:]) >= 90
        overlap = _fragment.overlap_of(tile, int(job.target[3:])) if isinstance(tile, Tile) else tile.overlap
        seen.add((type(tile), dependent, overlap))
        waits = 0 if overlap == "none" else 1 if isinstance(tile, Tile) else 1 + tile.teams * tile.slices
        assert facts["waits"] == waits, (job, facts)
        if overlap == "x":
            assert facts["x_before_wait"] == 0, (job, facts)
        elif overlap != "none":
            assert facts["memory_before_wait"] == 0, (job, facts)
        before = facts["triggered_before_products"]
        if isinstance(tile, Tile):
            assert before == {"early": True, "late": False}.get(overlap), (job, facts)
        assert facts["trigger_waited"] is (None if before is None else overlap != "none"), (job, facts)
    assert seen >= {(Tile, False, "none"), (Tile, True, "none"), (Tile, True, "x"), (Tile, True, "late"),
                    (Tile, True, "early"), (StreamTile, True, "early"), (StreamTile, True, "late")}


def test_the_stream_kernel_decodes_in_registers_and_multiplies_by_wgmma(compiled):
    """Codes come from shared memory to the lane that decodes them, and nothing goes back there in the loop or from lane
    to lane. The assembler puts no waits of its own between the products: it does where it cannot allocate their
    registers, and they then run one after the other."""
    for job, facts in only(compiled, StreamTile).items():
        assert facts["matrix"] == ["wgmma.mma_async"], job
        assert facts["loop_stores"] == facts["loop_exchanges"] == 0 and facts["loop_barriers"] <= 3, (job, facts)
        block_n = job.config.block_n // job.config.slices
        loads = facts["loop_shared"] * 16 * job.config.warps // block_n     # for a warp's 16 rows
        assert loads <= {8: 4, 4: 4}.get(scheme_named(job.scheme).format.bits, 10), (job, facts)
        assert facts["loop_products"] == 8 * block_n // (16 * job.config.warps), (job, facts)
        if job.config.slices < 3:       # three groups have too few registers, and were the fastest even so
            assert facts["loop_waits"] == 4 // job.config.chunk, (job, facts)


def test_nothing_is_spilled(compiled):
    assert not {
        job: facts["stack_bytes"] for kind in (Matvec, Tile, StreamTile)
        for job, facts in only(compiled, kind, "sm_").items() if facts["stack_bytes"]
    }


def test_a_weight_costs_at_most_four_and_a_half_instructions_on_sm_90(compiled):
    """All of the loop along K, loads and matrix instructions included. About 8 (FP8) and 4 (FP4) are what memory
    leaves time for at 4.2 TB/s."""
    costs = {}
    for job, facts in only(compiled, (Tile, StreamTile), "sm_90").items():
        if job.scheme in MAIN:
            tile = job.config
            weights = (32 * tile.groups * tile.depth if isinstance(tile, Tile) else
                       4 * tile.block_n // (tile.warps * tile.slices))
            costs[job] = facts["loop_instructions"] / weights
    print("\n".join(f"{job.scheme} M={job.m}: {cost:.2f} a weight, {compiled[job]['registers']} registers"
                    for job, cost in costs.items()))
    assert {job.scheme for job in costs} == set(MAIN)
    assert max(costs.values()) < 4.5, max(costs.items(), key=lambda item: item[1])


def test_tiles_fit_the_shared_memory_of_their_target(compiled):
    for job, facts in only(compiled, (Dot, Tile, StreamTile)).items():
        assert facts["shared_bytes"] <= SHARED_KIB[job.target] * 1024, job


def test_every_shipped_tile_for_any_gpu_fits_the_smallest_shared_memory():
    tiles = [entry.tile for entry in _tiles.read(_tiles.SHIPPED) if isinstance(entry.tile, Tile)]
    tiles += [*_tiles.GROUP_TILES.values(), *_tiles.NARROW_GROUP_TILES.values()]
    tiles += [pick(m, n, 4096, 4, "none", TileDevice(89)) for m in (1, 17, 64, 5000) for n in (512, 30000)]
    assert max(tile.shared_bytes for tile in tiles) <= 99 * 1024


def test_e4m3fn_is_decoded_by_an_instruction_where_there_is_one(compiled):
    for job, facts in only(compiled, Matvec, "sm_").items():
        native = job.scheme == "e4m3fn-row" and job.target != "sm_80"
        assert (facts["native_decodes"] > 0) == native, job
