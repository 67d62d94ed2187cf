"""Workloads are the layers that the models were published with."""

import sys
import tempfile

import pytest
import torch

from fpxbench.checking.inputs import make_weight
from fpxbench.checking.routing import empty_experts, rows_per_expert
from fpxbench.records.case import Case, Routing
from fpxbench.workloads import TOKENS, Split, WeightContents, contents_of, workload_named, workloads

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
    assert models == {each.name.split(".experts_")[0] for each in workloads().values()
                      if each.experts and not each.is_canary}
    assert models == {"mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "llama4-scout", "gpt-oss-20b", "gpt-oss-120b",
                      "deepseek-v3"}


# From the same files: experts and experts per token.
EXPERTS = {
    "mixtral-8x7b": (8, 2),
    "qwen3-30b-a3b": (128, 8),
    "qwen3-235b-a22b": (128, 8),
    "llama4-scout": (16, 1),
    "gpt-oss-20b": (32, 4),
    "gpt-oss-120b": (128, 4),
    "deepseek-v3": (256, 8),
}


@pytest.mark.parametrize("model", EXPERTS)
def test_all_experts_of_a_layer_are_a_workload_in_two_routings(model):
    layers = {name: each for name, each in workloads().items() if name.startswith(f"{model}.experts_")}
    assert set(layers) == {f"{model}.experts_{layer}.{routing}" for layer in ("gate_up", "down")
                           for routing in ("uniform", "skewed")}
    for name, layer in layers.items():
        assert (layer.experts, layer.experts_per_token) == EXPERTS[model]
        assert layer.routing == name.rpartition(".")[2] and 1 in layer.m
        one = workload_named(name.rpartition(".")[0].replace("experts_", "expert_"))
        assert (layer.n, layer.k, one.experts) == (one.n, one.k, None)


def test_every_divided_layer_has_a_share_for_each_size_ragged_ones_included():
    alone, shared = workloads(), workloads((2, 4, 8))
    divided = [each for each in alone.values() if each.split is not Split.NONE]
    assert len(shared) == len(alone) + 3 * len(divided)
    ragged = set()
    for layer in divided:
        for size in (2, 4, 8):
            part = shared[f"{layer.name}.tp{size}"]
            assert part.n * size >= layer.n and part.k * size >= layer.k
            assert (part.n, part.k) in ((-(-layer.n // size), layer.k), (layer.n, -(-layer.k // size)))
            assert (part.experts, part.experts_per_token, part.routing, part.m) == (
                layer.experts, layer.experts_per_token, layer.routing, layer.m)
            ragged |= {part.name} if part.n % 128 or part.k % 128 else set()
    assert {"gpt-oss-20b.expert_down.tp8", "llama2-7b.down.tp8", "gpt-oss-120b.experts_down.skewed.tp8"} <= ragged


@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("m", [0, 1, 9, 64])
def test_a_routing_gives_every_row_to_an_expert_as_it_says(routing, m):
    case = Case(implementation="x", scheme="mxfp4", workload="w", m=m, n=8, k=32, experts=6, experts_per_token=2,
                routing=routing)
    draws = [rows_per_expert(case, 1, purpose) for purpose in range(200)]
    assert all(draw.shape == (6,) and int(draw.sum()) == case.rows == 2 * m for draw in draws)
    assert torch.equal(rows_per_expert(case, 1, 5), draws[5])
    assert m == 0 or len({tuple(draw.tolist()) for draw in draws}) > 2
    mean = torch.stack(draws).double().mean(0) / max(case.rows, 1)
    if routing is Routing.ONE:
        assert all(int((draw > 0).sum()) == (m > 0) for draw in draws)
    else:
        assert all(int(draw.max()) <= m for draw in draws)       # a token's experts differ
    if routing is Routing.EMPTY:
        assert empty_experts(case) == [0, 5, 3] and all(draw[[0, 3, 5]].sum() == 0 for draw in draws)
    elif m:
        assert bool((mean > 0.1).all())
    if routing is Routing.SKEWED and m == 64:
        assert all(int(draw.max()) > 2 * int(draw.min()) for draw in draws)


def test_a_case_of_experts_has_fields_that_others_do_not_have():
    plain = workload_named("llama2-7b.o").case("x", "mxfp4", 4)
    assert set(plain.model_dump()) == {"implementation", "scheme", "workload", "m", "n", "k", "activation", "id"}
    experts = workload_named("gpt-oss-20b.experts_down.skewed").case("x", "mxfp4", 4)
    assert experts.id == "x/mxfp4/gpt-oss-20b.experts_down.skewed/m4/bf16"
    assert Case.model_validate_json(experts.model_dump_json()) == experts
    assert (experts.rows, experts.weights, plain.rows) == (16, 32 * 2880 * 2880, 4)
    assert experts.of_one_expert.model_dump().keys() == plain.model_dump().keys()
    for wrong in ({"routing": None}, {"experts": 3}, {"experts": None, "experts_per_token": None}):
        with pytest.raises(ValueError, match="experts"):
            Case.model_validate(experts.model_dump() | wrong)


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
        case = workload.case("dense", "bf16", workload.m[0])
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
