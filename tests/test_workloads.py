"""Workloads are the layers that the models were published with."""

import pytest

from fpxbench.records.case import Case
from fpxbench.workloads import TOKENS, workload_named, workloads

# From each model's published config.json: (N, K).
PUBLISHED = {
    "llama2-7b.qkv": (12288, 4096), "llama2-7b.o": (4096, 4096), "llama2-7b.gate_up": (22016, 4096), "llama2-7b.down": (4096, 11008),
    "llama3-8b.k": (1024, 4096), "llama3-8b.qkv": (6144, 4096), "llama3-8b.gate_up": (28672, 4096), "llama3-8b.down": (4096, 14336),
    "llama3-70b.k": (1024, 8192), "llama3-70b.qkv": (10240, 8192), "llama3-70b.o": (8192, 8192), "llama3-70b.gate_up": (57344, 8192),
    "llama3-70b.down": (8192, 28672),
    "qwen2.5-7b.qkv": (4608, 3584), "qwen2.5-7b.o": (3584, 3584), "qwen2.5-7b.gate_up": (37888, 3584), "qwen2.5-7b.down": (3584, 18944),
    "mixtral-8x7b.expert_gate_up": (28672, 4096), "mixtral-8x7b.expert_down": (4096, 14336),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layer_has_the_shape_it_was_published_with(name):
    workload = workload_named(name)
    assert (workload.n, workload.k) == PUBLISHED[name]
    assert workload.m == TOKENS == (1, 4, 16, 64, 512, 4096)


def test_only_the_models_with_experts_have_expert_layers():
    assert {name.split(".")[0] for name in workloads() if ".expert_" in name} == {"mixtral-8x7b"}


def test_the_issues_own_function_is_a_canary():
    seed = workload_named("canary.seed")
    assert (seed.m, seed.n, seed.k) == ((1,), 32, 32) and seed.is_canary


def test_the_ragged_canary_is_a_multiple_of_no_block():
    ragged = workload_named("canary.ragged")
    assert all(size % block for size in (*ragged.m, ragged.n, ragged.k) for block in (2, 4, 16, 32))


def test_the_codes_canary_has_room_for_every_number_midpoint_and_neighbour_of_an_8_bit_format():
    codes = workload_named("canary.codes")
    assert codes.n * codes.k >= 4 * 256


def test_every_workload_makes_a_case():
    for workload in workloads().values():
        case = Case(implementation="dense", scheme="bf16", workload=workload.name, m=workload.m[0], n=workload.n, k=workload.k)
        assert case.id.split("/")[2] == workload.name


def test_an_unknown_workload_names_the_nearest():
    with pytest.raises(ValueError, match="no workload 'llama2-7b.kqv'; did you mean .*llama2-7b.qkv"):
        workload_named("llama2-7b.kqv")
