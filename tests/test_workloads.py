"""Workloads are the layers that the models were published with."""

import sys
import tempfile

import pytest
import torch

from fpxbench.checking.inputs import make_weight
from fpxbench.records.case import Case
from fpxbench.workloads import TOKENS, WeightContents, contents_of, workload_named, workloads

# From each model's published config.json: (N, K).
PUBLISHED = {
    "llama2-7b.qkv": (12288, 4096),
    "llama2-7b.o": (4096, 4096),
    "llama2-7b.gate_up": (22016, 4096),
    "llama2-7b.down": (4096, 11008),
    "llama3-8b.k": (1024, 4096),
    "llama3-8b.qkv": (6144, 4096),
    "llama3-8b.gate_up": (28672, 4096),
    "llama3-8b.down": (4096, 14336),
    "llama3-70b.k": (1024, 8192),
    "llama3-70b.qkv": (10240, 8192),
    "llama3-70b.o": (8192, 8192),
    "llama3-70b.gate_up": (57344, 8192),
    "llama3-70b.down": (8192, 28672),
    "qwen2.5-7b.qkv": (4608, 3584),
    "qwen2.5-7b.o": (3584, 3584),
    "qwen2.5-7b.gate_up": (37888, 3584),
    "qwen2.5-7b.down": (3584, 18944),
    "mixtral-8x7b.expert_gate_up": (28672, 4096),
    "mixtral-8x7b.expert_down": (4096, 14336),
    "qwen3-8b.qkv": (6144, 4096),
    "qwen3-8b.down": (4096, 12288),
    "qwen3-32b.qkv": (10240, 5120),
    "qwen3-32b.o": (5120, 8192),
    "qwen3-32b.gate_up": (51200, 5120),
    "qwen3-30b-a3b.expert_gate_up": (1536, 2048),
    "qwen3-30b-a3b.o": (2048, 4096),
    "qwen3-235b-a22b.expert_down": (4096, 1536),
    "qwen3-235b-a22b.qkv": (9216, 4096),
    "llama4-scout.expert_gate_up": (16384, 5120),
    "llama4-scout.down": (5120, 16384),
    "llama4-scout.qkv": (7168, 5120),
    "mistral-small-24b.qkv": (6144, 5120),
    "mistral-small-24b.o": (5120, 4096),
    "mistral-small-24b.gate_up": (65536, 5120),
    "gemma3-12b.qkv": (8192, 3840),
    "gemma3-12b.o": (3840, 4096),
    "gemma3-12b.down": (3840, 15360),
    "phi-4.qkv": (7680, 5120),
    "phi-4.gate_up": (35840, 5120),
    "phi-4.down": (5120, 17920),
    "gpt-oss-20b.qkv": (5120, 2880),
    "gpt-oss-20b.o": (2880, 4096),
    "gpt-oss-20b.expert_gate_up": (5760, 2880),
    "gpt-oss-120b.expert_down": (2880, 2880),
    "deepseek-v3.qkv_a": (2112, 7168),
    "deepseek-v3.q_b": (24576, 1536),
    "deepseek-v3.kv_b": (32768, 512),
    "deepseek-v3.o": (7168, 16384),
    "deepseek-v3.expert_gate_up": (4096, 7168),
    "deepseek-v3.expert_down": (7168, 2048),
    "deepseek-v3.gate_up": (36864, 7168),
    "deepseek-v3.down": (7168, 18432),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layer_has_the_shape_it_was_published_with(name):
    workload = workload_named(name)
    assert (workload.n, workload.k) == PUBLISHED[name]
    assert workload.m == TOKENS == (1, 4, 16, 64, 512, 4096)


def test_only_the_models_with_experts_have_expert_layers():
    models = {name.rpartition(".")[0] for name in workloads() if ".expert_" in name}
    assert models == {
        "mixtral-8x7b",
        "qwen3-30b-a3b",
        "qwen3-235b-a22b",
        "llama4-scout",
        "gpt-oss-20b",
        "gpt-oss-120b",
        "deepseek-v3",
    }


@pytest.mark.parametrize(("name", "shape"), [
    ("llama3-70b.qkv.tp8", (1280, 8192)), ("llama3-70b.down.tp8", (8192, 3584)), ("llama2-7b.down.tp4", (4096, 2752)),
    ("gpt-oss-20b.expert_down.tp8", (2880, 360)), ("deepseek-v3.kv_b.tp16", (2048, 512)),
])
def test_a_rank_of_tensor_parallelism_holds_its_share(name, shape):
    workload = workload_named(name)
    assert (workload.n, workload.k) == shape


def test_what_every_rank_holds_whole_is_not_divided():
    assert "deepseek-v3.qkv_a.tp2" not in workloads((2,)) and "canary.seed.tp2" not in workloads((2,))


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
        case = Case(
            implementation="dense", scheme="bf16", workload=workload.name, m=workload.m[0], n=workload.n, k=workload.k
        )
        assert case.id.split("/")[2] == workload.name


def test_an_unknown_workload_names_the_nearest():
    with pytest.raises(ValueError, match="no workload 'llama2-7b.kqv'; did you mean .*llama2-7b.qkv"):
        workload_named("llama2-7b.kqv")


def test_what_a_weight_holds_goes_by_its_workload_and_may_be_asked_for() -> None:
    case = Case(implementation="x", scheme="e2m1-row", workload="llama2-7b.o", m=1, n=16, k=64)
    canary = case.model_copy(update={"workload": "canary.codes"})
    assert contents_of("canary.codes") is WeightContents.CODES
    assert contents_of("canary.seed") is contents_of("somebody.s") is WeightContents.NORMAL
    assert torch.equal(make_weight(case, 1, contents=WeightContents.CODES), make_weight(canary, 1))
    assert not torch.equal(make_weight(case, 1), make_weight(canary, 1))
    assert torch.equal(make_weight(canary, 1, contents=WeightContents.NORMAL), make_weight(case, 1))


def test_shapes_are_read_from_an_earlier_file_and_made_anew_if_it_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = workloads.__wrapped__()
    (file,) = tmp_path.glob("*/*.json")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert workloads.__wrapped__((2,)) == made | workloads((2,))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ImportError, match="transformers"):
        workloads.__wrapped__()
