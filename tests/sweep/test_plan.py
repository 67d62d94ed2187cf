"""Which cases a sweep has: profiles, globs, and names that nothing is called."""

import json
from itertools import groupby

import pytest
from pydantic import ValidationError

from fpxbench.implementation import Support, discover
from fpxbench.sweep import plan as plan_module
from fpxbench.sweep.plan import planned_cases
from fpxbench.sweep.selection import PROFILES, make_plan
from fpxbench.sweep.settings import Settings

STUB = '''
from fpxbench.implementation import Implementation, Support, implementation

@implementation("plan_stub")
class PlanStub(Implementation):
    """Says what it takes, and multiplies nothing."""

    def supports(self, scheme, device):
        if scheme.name == "mxfp4":
            return Support.no("takes no FP4")
        return Support.no("wants a library", missing=True) if scheme.name == "nvfp4" else Support.yes()

    def max_elements(self, device):
        return 4 * 4096 * 4096
'''


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    file = tmp_path_factory.mktemp("impls") / "plan_stub.py"
    file.write_text(STUB)
    return file


def plan(stub, **settings):
    return make_plan(Settings(**{"device": "cpu", "impls": (stub,), "implementation": ("plan_stub",), **settings}))


def ids(made):
    return [planned.case.id for planned in made.cases]


def test_globs_pick_implementations_schemes_and_workloads(stub):
    made = plan(stub, implementation=("plan_*", "dense"), scheme=("e[45]m?fn-row", "bf16"),
                workload=("canary.r*", "llama3-8b.k/m4"))
    assert ids(made) == ["plan_stub/e4m3fn-row/canary.ragged/m3/bf16", "plan_stub/bf16/canary.ragged/m3/bf16",
                         "dense/bf16/canary.ragged/m3/bf16", "plan_stub/e4m3fn-row/canary.ragged/m33/bf16",
                         "plan_stub/bf16/canary.ragged/m33/bf16", "dense/bf16/canary.ragged/m33/bf16",
                         "plan_stub/e4m3fn-row/llama3-8b.k/m4/bf16", "plan_stub/bf16/llama3-8b.k/m4/bf16",
                         "dense/bf16/llama3-8b.k/m4/bf16"]


def test_a_scheme_that_is_not_listed_is_made_from_its_parts(stub):
    assert ids(plan(stub, scheme=("e3m4b5-g64",), workload=("canary.seed",))) == [
        "plan_stub/e3m4b5-g64/canary.seed/m1/bf16"
    ]


def test_a_standard_scheme_asked_for_by_its_parts_is_filed_under_its_name(stub):
    assert ids(plan(stub, scheme=("e3m2-mx", "mxfp6_e3m2"), workload=("canary.seed",))) == [
        "plan_stub/mxfp6_e3m2/canary.seed/m1/bf16"
    ]


def test_a_refusal_is_a_case_with_its_reason_and_a_gap_is_told_from_it(stub):
    made = plan(stub, scheme=("mxfp4", "nvfp4", "e2m1-g32"), workload=("canary.seed",))
    assert [(p.refused, p.missing) for p in made.cases] == [
        ("takes no FP4", False), ("wants a library", True), ("", False)
    ]


def test_an_implementation_is_asked_once_about_a_scheme_for_all_layers(stub, monkeypatch):
    asked = []
    monkeypatch.setattr(discover([stub])[0]["plan_stub"], "supports",
                        lambda self, scheme, device: asked.append(scheme.name) or Support.yes())
    made = plan(stub, scheme=("e4m3fn-row", "e2m1-g32"), workload=("canary.*", "llama3-8b.k"))
    assert sorted(asked) == ["e2m1-g32", "e4m3fn-row"] and len(made.cases) > 10


def test_a_scheme_is_refused_once_and_not_on_every_layer(stub):
    made = plan(stub, scheme=("mxfp4", "e2m1-g32"), workload=("canary.*", "llama3-8b.k/m1"))
    refused = [each.case for each in made.cases if each.refused]
    assert [(case.scheme, case.workload) for case in refused] == [("mxfp4", "canary.codes")]
    assert len({each.case.workload for each in made.cases if each.case.scheme == "e2m1-g32"}) > 5
    elsewhere = plan(stub, scheme=("mxfp4",), workload=("canary.seed", "llama3-8b.k/m1"))
    assert [each.case.workload for each in elsewhere.cases] == ["canary.seed"]


def test_a_file_of_cases_keeps_every_refusal_that_was_asked_for(stub, tmp_path):
    file = tmp_path / "cases.jsonl"
    file.write_text("\n".join(
        json.dumps({"implementation": "plan_stub", "scheme": "mxfp4", "workload": name, "m": 1, "n": 64, "k": 64})
        for name in ("canary.seed", "canary.codes")))
    made = make_plan(Settings(device="cpu", impls=(stub,), cases=file))
    assert [each.refused for each in made.cases] == ["takes no FP4"] * 2


ABROAD = STUB.replace("plan_stub", "plan_abroad").replace("PlanStub", "PlanAbroad").replace(
    'if scheme.name == "mxfp4"', 'if device != "elsewhere"')


def test_an_implementation_that_refuses_the_device_itself_is_left_out_with_its_reason_unless_it_is_named(tmp_path):
    (tmp_path / "plan_abroad.py").write_text(ABROAD)
    chosen = {"device": "cpu", "impls": (tmp_path / "plan_abroad.py",), "workload": ("canary.seed",),
              "scheme": ("e4m3fn-row", "e5m2-row")}
    made = make_plan(Settings(**chosen))
    assert "plan_abroad: takes no FP4" in made.left_out
    assert "plan_abroad" not in {each.case.implementation for each in made.cases}
    named = make_plan(Settings(**chosen, implementation=("plan_abroad",)))
    assert [each.refused for each in named.cases] == ["takes no FP4"] * 2 and not named.left_out


def test_cpu_kernels_are_left_out_on_a_gpu_and_interpreters_beside_one(monkeypatch):
    on_gpu = make_plan(Settings(profile="smoke", device="cuda"))
    assert any(line.startswith("cpu_fused: runs on CPUs only") for line in on_gpu.left_out)
    assert "cpu_fused" not in {each.case.implementation for each in on_gpu.cases}
    monkeypatch.setattr("fpxbench.sweep.selection.default_device", lambda: "cuda")
    beside = make_plan(Settings(profile="smoke", device="cpu"))
    assert any(line.startswith("triton_fused: runs in an interpreter on CPUs") for line in beside.left_out)
    monkeypatch.setattr("fpxbench.sweep.selection.default_device", lambda: "cpu")
    alone = make_plan(Settings(profile="smoke", device="cpu"))
    assert "triton_fused" in {each.case.implementation for each in alone.cases}


@pytest.mark.parametrize(("profile", "schemes"), [
    ("quick", ()), ("full", ("bf16", "e4m3fn-row", "mxfp4")), pytest.param("full", (), marks=pytest.mark.slow)])
def test_canaries_come_first_then_one_layer_at_one_token_then_other_layers_at_one_token(profile, schemes):
    planned = make_plan(Settings(profile=profile, device="cuda", scheme=schemes))
    ran = [each.case for each in planned.cases if not each.refused]
    rank = [0 if case.workload.startswith("canary.") else 1 if case.m == 1 else 2 for case in ran]
    assert rank == sorted(rank) and set(rank) == {0, 1, 2}
    layers = [(case.workload, case.m) for case in ran if not case.workload.startswith("canary.")]
    assert len(list(groupby(layers))) == len(set(layers))       # one layer after the other
    implementations = {case.implementation for case in ran if (case.workload, case.m) == layers[0]}
    assert {"dense", "triton_fused", "compiled_mixed_mm", "eager_upcast"} <= implementations


def test_that_the_dense_baseline_takes_no_quantized_weight_is_no_case(stub):
    made = plan(stub, implementation=("dense",), scheme=("e4m3fn-row", "bf16"), workload=("canary.seed",))
    assert ids(made) == ["dense/bf16/canary.seed/m1/bf16"]


def test_what_is_too_large_for_an_implementation_is_left_out(stub):
    made = plan(stub, scheme=("e4m3fn-row",), workload=("llama2-7b.o/*",))
    assert ids(made) == [f"plan_stub/e4m3fn-row/llama2-7b.o/m{m}/bf16" for m in (1, 4)]


def test_a_layer_named_without_its_tokens_takes_the_profiles_or_else_all(stub):
    assert [c.split("/")[3] for c in ids(plan(stub, scheme=("int8-row",), workload=("llama2-7b.o",)))] == ["m1"]
    unlisted = plan(stub, scheme=("int8-row",), workload=("qwen2.5-7b.k",))
    assert [c.split("/")[3] for c in ids(unlisted)] == ["m1", "m4", "m16"]      # more is over its max_elements


@pytest.mark.parametrize(("field", "value", "says"), [
    ("implementation", "tritn_fused", "no implementation 'tritn_fused'; did you mean triton_fused"),
    ("implementation", "zzz*", "no implementation 'zzz*'; there are "),
    ("scheme", "e4m3fn-rwo", "no scheme 'e4m3fn-rwo'"),
    ("scheme", "e9*", "no scheme 'e9*'"),
    ("workload", "lama2-7b.qkv", "no workload 'lama2-7b.qkv'; did you mean llama2-7b.qkv"),
    ("workload", "llama2-7b.qkv/m2", "no workload 'llama2-7b.qkv/m2'; did you mean llama2-7b.qkv/m"),
])
def test_a_selection_of_nothing_names_the_value_and_the_nearest(stub, field, value, says):
    with pytest.raises(ValueError) as refusal:
        plan(stub, **{field: (value,)})
    assert says in str(refusal.value)


@pytest.mark.parametrize("profile", sorted(PROFILES), ids="-".join)
def test_every_profile_selects_cases_of_its_own_device_and_no_case_twice(stub, profile):
    made = plan(stub, profile=profile[0], device=profile[1])
    assert made.device == profile[1]
    assert len(set(ids(made))) == len(ids(made)) > 0


def test_each_profile_holds_the_one_before_it(stub):
    for device in ("cpu", "cuda"):
        smoke, quick, full = (
            set(ids(plan(stub, profile=profile, device=device))) for profile in ("smoke", "quick", "full")
        )
        assert quick < full and {c.split("/")[1] for c in smoke} < {c.split("/")[1] for c in quick}


def test_a_plan_says_what_could_not_be_loaded_and_what_each_implementation_is(stub, tmp_path):
    (tmp_path / "broken.py").write_text("import a_library_that_nobody_has")
    made = plan(stub, impls=(stub, tmp_path), scheme=("int8-row",), workload=("canary.seed",))
    assert made.about["plan_stub"] == "Says what it takes, and multiplies nothing."
    assert len(made.sources["plan_stub"]) == 12
    assert len(made.not_loaded) == 1 and "a_library_that_nobody_has" in made.not_loaded[0]


def test_another_process_plans_the_same_cases_less_those_refused(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = Settings(device="cpu", impls=(stub,), implementation=("plan_stub",), scheme=("int8-row", "mxfp4"),
                        workload=("canary.seed",))
    first = planned_cases(settings)
    assert first == ["plan_stub/int8-row/canary.seed/m1/bf16"]
    assert planned_cases(settings) == first     # from what it remembered
    with pytest.raises(RuntimeError, match="no scheme 'e4m3fn-rwo'"):
        planned_cases(settings.model_copy(update={"scheme": ("e4m3fn-rwo",)}))


def test_settings_come_from_the_environment_by_the_same_names(monkeypatch, tmp_path):
    for name, value in {
        "PROFILE": "smoke",
        "SCHEME": "mxfp4,nvfp4",
        "RESULTS": str(tmp_path),
        "TIMEOUT_S": "3.5",
        "FRESH": "1",
    }.items():
        monkeypatch.setenv(f"FPX_{name}", value)
    read = Settings.from_environment()
    assert (read.profile, read.scheme, read.results, read.timeout_s, read.fresh) == (
        "smoke", ("mxfp4", "nvfp4"), tmp_path, 3.5, True
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("profile", "slow"), ("timeout_s", 0), ("memory_limit", -1), ("timing_budget_s", -1), ("colour", "red")],
)
def test_a_setting_that_is_none_is_refused_by_name(field, value):
    with pytest.raises(ValidationError, match=field):
        Settings(**{field: value})


def test_a_file_of_cases_is_run_as_it_stands(stub, tmp_path):
    file = tmp_path / "cases.jsonl"
    shape = {"workload": "unheard.of", "m": 7, "n": 96, "k": 128, "activation": "fp16"}
    wanted = [{"implementation": "plan_stub", "scheme": "e4m3fn-row", **shape},
              {"implementation": "plan_stub", "scheme": "mxfp4", **shape},
              {"implementation": "plan_stub", "scheme": "e4m3fn-row", **shape, "n": 1 << 20},
              {"implementation": "of_another_day", "scheme": "e4m3fn-row", **shape}]
    for count in (2, 4):
        file.write_text("".join(json.dumps(case) + "\n" for case in wanted[:count]))
        made = plan(stub, cases=file, profile="smoke", implementation=())
        # An id says nothing of N and K, so the last of two cases of one id is the one.
        assert ids(made) == [
            f"{name}/{scheme}/unheard.of/m7/fp16"
            for name, scheme in [("plan_stub", "e4m3fn-row"), ("plan_stub", "mxfp4"), ("of_another_day", "e4m3fn-row")][
                : 2 + (count == 4)
            ]
        ]
    assert [each.refused for each in made.cases] == ["plan_stub takes no case of this size on cpu", "takes no FP4", ""]


@pytest.mark.parametrize(
    "text, said", [("", "holds no case"), ('{"implementation": "../x"}', "cases.jsonl:1: not a case")]
)
def test_a_file_that_holds_no_cases_is_a_mistake_that_names_it(stub, tmp_path, text, said):
    file = tmp_path / "cases.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        plan(stub, cases=file)


def test_layers_of_a_tensor_parallel_rank_are_planned_by_option_or_by_name():
    from fpxbench.sweep.selection import make_plan
    common = {"implementation": ("dense",), "scheme": ("bf16",), "device": "cpu"}
    planned = make_plan(Settings(tp=(4,), workload=("llama2-7b.down*/m1",), **common)).cases
    assert [(case.case.workload, case.case.k) for case in planned] == [
        ("llama2-7b.down", 11008),
        ("llama2-7b.down.tp4", 2752),
    ]
    planned = make_plan(Settings(workload=("llama3-70b.qkv.tp8/m16",), **common)).cases
    assert [(case.case.id, case.case.n) for case in planned] == [("dense/bf16/llama3-70b.qkv.tp8/m16/bf16", 1280)]


@pytest.mark.parametrize("change", ["a package", "the visible devices"])
def test_a_plan_is_made_again_where_its_answers_may_differ(change, monkeypatch, tmp_path):
    settings = Settings(device="cpu", scheme=("int8-row",))
    before = plan_module._plan_digest(settings)
    assert plan_module._plan_digest(settings) == before
    if change == "a package":
        (tmp_path / "a_plugin-1.0.dist-info").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert plan_module._plan_digest(settings) != before
