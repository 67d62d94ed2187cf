"""triton_fused's kernels compile for GPUs that are not here, into what they were written to become."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pytest
from places import HELPERS

from fpxbench.implementation import discover

pytest.importorskip("triton")

discover()
from fpxbench.impls.triton_fused import Dot, Matvec, Target, fitted  # noqa: E402  (discover makes that package)
from fpxbench.numbers.scheme import scheme_named  # noqa: E402

TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"]
SCHEMES = ["e4m3fn-row", "e5m2-row", "e4m3fnuz-row", "e3m2-g128", "mxfp4", "nvfp4", "int8-row"]
K = 4096


@dataclass(frozen=True)
class Job:
    target: str
    scheme: str
    activation: str
    m: int
    config: Matvec | Dot

    def line(self) -> str:
        return json.dumps(vars(self) | {"config": asdict(self.config)})


def jobs():
    """Every target with every scheme, on both paths and, in turn, with both activations and two configs of each."""
    for t, target in enumerate(TARGETS):
        kind = Target("cuda", int(target[3:])) if target.startswith("sm_") else Target("hip")
        for s, scheme in enumerate(SCHEMES):
            odd = (t + s) % 2
            matvec = Matvec(rows=2 - odd, words=4 * kind.warp_size * (1 + odd), num_warps=1 + odd)
            tile = (64, 64, 64, 4) if odd else (16, 64, 64, 4)
            dot = fitted(*tile, scheme_named(scheme), K, kind)
            yield Job(target, scheme, ["bf16", "fp16"][odd], 1, matvec)
            yield Job(target, scheme, ["fp16", "bf16"][odd], 64 if odd else 16, dot)
    yield Job("sm_90", "e2m1-g128", "bf16", 1, Matvec(4, 256, 2))
    yield Job("sm_90", "e4m3fn-row", "bf16", 4, Matvec(4, 128, 1))


def compile_all(part, cache):
    """Facts by job, from one child process; a child that dies leaves out the rest, and its last words are the error."""
    child = HELPERS / "triton_aot_child.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}    # 3.10 changes the default
    run = subprocess.run(
        [sys.executable, child], input="\n".join(job.line() for job in part), env=environment,
        capture_output=True, text=True, timeout=240,
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    done = [answer["facts"] for answer in answers if "facts" in answer]
    error = f"the compiling process ended with {run.returncode}: {run.stderr[-2000:]}"
    return dict(zip(part, done, strict=False)), error


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton-cache")
    every = list(jobs())
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda part: compile_all(part, cache), [every[::2], every[1::2]]))
    facts = {job: result for part, _ in parts for job, result in part.items()}
    missing = [job for job in every if job not in facts]
    assert not missing, f"{missing[0]} did not compile; " + " | ".join(error for part, error in parts if error)
    return facts


def only(compiled, kind, target=""):
    return {
        job: facts for job, facts in compiled.items() if isinstance(job.config, kind) and job.target.startswith(target)
    }


def test_every_kernel_becomes_an_object_on_every_target(compiled):
    assert {job.target for job in compiled} == set(TARGETS)
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
    }
    for job, facts in only(compiled, Dot).items():
        assert facts["matrix"] == expected[job.target], job


def test_nothing_is_spilled(compiled):
    assert not {
        job: facts["stack_bytes"] for job, facts in only(compiled, Matvec, "sm_").items() if facts["stack_bytes"]
    }


def test_tiles_fit_the_shared_memory_of_their_target(compiled):
    limits = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    for job, facts in only(compiled, Dot).items():
        assert facts["shared_bytes"] <= limits[job.target] * 1024, job


def test_e4m3fn_is_decoded_by_an_instruction_where_there_is_one(compiled):
    for job, facts in only(compiled, Matvec, "sm_").items():
        native = job.scheme == "e4m3fn-row" and job.target != "sm_80"
        assert (facts["native_decodes"] > 0) == native, job
