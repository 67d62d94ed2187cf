"""Every block of a kernel is executed: shared memory, barriers, shuffles, and a quantizer that stores a value twice."""

import re
import sys

import pytest

from fpxbench.numbers.formats import BF16, format_named
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.targets import engine
from fpxbench.targets.architectures import ARCHITECTURES
from fpxbench.targets.cell_outcomes import evaluate
from fpxbench.targets.operations import STORE_TILES, STORE_WARPS, probes_like
from fpxbench.targets.ptx_execution import run
from fpxbench.targets.ptx_instructions import GLOBAL, Memory, Miscompiled
from fpxbench.targets.ptx_parser import Unmodelled, parse
from fpxbench.targets.store_check import code_at
from fpxbench.targets.triton_builds import find_triton

sys.path.append(str(engine.CHILD))
import inductor  # the child's own module, which imports no PyTorch yet

sys.path.remove(str(engine.CHILD))


def outputs(body, threads=64, blocks=1):
    """Return what each thread of a kernel leaves in %r9, 32 bits; %r1 is the thread and %r2 its address in out."""
    kernel = parse(f"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
.param .u64 out
)
{{
ld.param.u64 %rd1, [out];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mad.lo.s32 %r3, %r2, {threads}, %r1;
mad.wide.s32 %rd2, %r3, 4, %rd1;
mov.b32 %r4, global_smem;
shl.b32 %r5, %r1, 2;
add.s32 %r6, %r4, %r5;
{body}
st.global.b32 [ %rd2 + 0 ], %r9;
ret;
}}
""")
    memory = Memory()
    run(kernel, (GLOBAL,), memory, threads, [(block, 0, 0) for block in range(blocks)])
    return [memory.read(GLOBAL + 4 * at, 4) for at in range(threads * blocks)]


NEIGHBOUR = """
st.shared.b32 [ %r6 + 0 ], %r1;
{barrier}
xor.b32 %r7, %r5, 128;
add.s32 %r8, %r4, %r7;
ld.shared.b32 %r9, [%r8];
"""


def test_after_a_barrier_a_thread_reads_what_another_warp_wrote():
    assert outputs(NEIGHBOUR.format(barrier="bar.sync 0;"), blocks=2) == [at ^ 32 for at in range(64)] * 2


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync 0xffffffff;"])
def test_without_a_barrier_between_the_warps_it_is_a_race_though_the_order_of_execution_would_hide_it(barrier):
    swapped = NEIGHBOUR.format(barrier=barrier).replace("xor.b32 %r7, %r5, 128", "and.b32 %r7, %r5, 127")
    with pytest.raises(Miscompiled, match="use byte .* of shared memory without a barrier"):
        outputs(swapped)


def test_a_write_to_what_another_warp_may_still_read_is_a_race():
    twice = NEIGHBOUR.format(barrier="bar.sync 0;") + "st.shared.b32 [ %r6 + 0 ], %r9;"
    with pytest.raises(Miscompiled, match="without a barrier"):
        outputs(twice)


def test_threads_that_never_meet_are_not_modelled():
    with pytest.raises(Unmodelled, match="wait for each other"):
        outputs("setp.lt.s32 %p1, %r1, 40; @%p1 bar.warp.sync 0xffffffff; @!%p1 bar.sync 0; mov.b32 %r9, 0;")


def test_lanes_exchange_values():
    assert outputs("shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1;") == [at ^ 3 for at in range(64)]


def test_a_loop_runs_as_often_as_its_condition_holds_and_an_endless_one_is_not_modelled():
    body = "mov.b32 %r9, 0;\n$L__BB0_1:\nadd.s32 %r9, %r9, 5;\nsetp.lt.s32 %p1, %r9, %r1;\n@%p1 bra $L__BB0_1;"
    assert outputs(body, threads=12) == [5, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10, 15]
    with pytest.raises(Unmodelled, match="more than"):
        outputs("$L__BB0_1:\nadd.s32 %r9, %r1, 5;\nbra $L__BB0_1;", threads=1)


@pytest.mark.parametrize(("trans", "row", "column"), [("", 4, 1), (".trans", 1, 4)])
def test_a_matrix_is_loaded_by_rows_or_by_columns(trans, row, column):
    """Lane 4 r + c: of an 8 × 8 matrix (element 8 r + c is 8 r + c) elements 2 c and 2 c + 1 of row r, or column r."""
    write = ("shl.b32 %r10, %r1, 1; shl.b32 %r11, %r10, 16; add.s32 %r11, %r11, 65536; or.b32 %r11, %r11, %r10;"
             "st.shared.b32 [ %r6 + 0 ], %r11; bar.sync 0; and.b32 %r12, %r1, 7; shl.b32 %r12, %r12, 4;"
             "add.s32 %r13, %r4, %r12;")
    found = outputs(f"{write} ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{ %r9 }}, [%r13];", threads=32)
    element = (lambda r, c: 8 * c + r) if trans else (lambda r, c: 8 * r + c)
    assert found == [element(lane // 4, 2 * (lane % 4)) | element(lane // 4, 2 * (lane % 4) + 1) << 16
                     for lane in range(32)]


def test_an_undefined_register_matters_only_if_a_result_depends_on_it():
    assert outputs("prmt.b32 %r9, %r1, %r77, 0x3210;", threads=4) == [0, 1, 2, 3]
    with pytest.raises(Miscompiled, match="never written"):
        outputs("add.s32 %r9, %r1, %r77;", threads=4)


# A quantizer that stores twice.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return answers of the installed Triton for sm_90, by probe."""
    pytest.importorskip("triton")
    specs = probes_like(["quantize_store/e4m3fn/*-y32-x32-w2", "quantize_store/e5m2/addresses-y32-x32-w2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        answers = engine.compile_cells(find_triton("installed"), [(spec, ARCHITECTURES["sm_90"]) for spec in specs])
    return [(spec, answers.by_cell[spec.id, "sm_90"]) for spec in specs]


def altered(answer, pattern, replacement, count=1):
    """Return the answer with some of its assembly replaced."""
    assembly, changed = re.subn(pattern, replacement, answer["compiled"]["assembly"], count=count)
    assert changed, f"no {pattern} in the kernel"
    return answer | {"compiled": answer["compiled"] | {"assembly": assembly}}


def test_what_the_installed_triton_stores_twice_is_right_in_both_places(compiled):
    for spec, answer in compiled:
        outcome, _ = evaluate(spec, ARCHITECTURES["sm_90"], answer)
        assert (outcome.status, outcome.check) == (Status.OK, "inputs"), (spec.id, outcome)


@pytest.mark.parametrize(("pattern", "replacement", "cause"), [
    (r"bar\.sync \t?0;", "", "is wrong for every input"),
    (r"(st\.global\.\S+ \[ %rd\d+ \+ )0", r"\g<1>64", "misses elements"),
    (r"(st\.global[^{]*\{ )(%\w+), (%\w+)", r"\1\3, \2", "has its elements in another order"),
    (r"max\.(\S*)f32\s+(%\w+), (%\w+), \S+;", r"mov.b32 \2, 0;", "has other values"),
])
def test_an_injected_fault_of_a_store_is_found(compiled, pattern, replacement, cause):
    spec, answer = compiled[0]
    outcome, _ = evaluate(spec, ARCHITECTURES["sm_90"], altered(answer, pattern, replacement))
    assert outcome.status is Status.WRONG and cause in outcome.cause and outcome.check == "inputs", outcome


def test_nan_that_becomes_a_number_has_its_own_name(compiled):
    spec, answer = compiled[0]
    wrong = altered(answer, r"max\.NaN\.f32|max\.(\S*)NaN\.f32", "max.f32", count=0)
    outcome, _ = evaluate(spec, ARCHITECTURES["sm_90"], wrong)
    assert (outcome.status, outcome.kind) == (Status.WRONG, Kind.NAN_CODE_LOST), outcome


def test_what_cannot_be_executed_is_only_compiled(compiled):
    spec, answer = compiled[0]
    outcome, _ = evaluate(spec, ARCHITECTURES["sm_90"], altered(answer, r"bar\.sync", "bar.red"))
    assert (outcome.status, outcome.check) == (Status.OK, "none") and "bar.red" in outcome.message
    amd, _ = evaluate(spec, ARCHITECTURES["gfx942"], answer | {"compiled": answer["compiled"] | {"conversions": {}}})
    assert (amd.status, amd.check) == (Status.OK, "none")


# The kernel that torch.compile writes.

MODULE = """
triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''source''', device_str='cuda')
triton_poi_fused_1 = async_compile.triton('triton_poi_fused_1', '''source''', device_str='cuda')

def call(args):
    x_1, s_1 = args
    buf0 = empty_strided_cuda((4080, 4112), (4224, 1), torch.float8_e4m3fn)
    buf1 = empty_strided_cuda((4112, 4080), (4096, 1), torch.float8_e4m3fn)
    {body}
    return (buf0, buf1, )
"""


@pytest.mark.parametrize(("body", "found"), [
    ("triton_poi_fused_0.run(x_1, s_1, buf0, buf1, 4112, 4080, stream=raw_stream0)",
     ("triton_poi_fused_0", ["x", "s", {"out": [4224, 1]}, {"transposed": [4096, 1]}, 4112, 4080])),
    ("triton_poi_fused_0.run(x_1, s_1, buf0, 9); triton_poi_fused_1.run(buf0, buf1, 4112, 4080)", None),
    ("buf2 = torch.ops.prims.convert_element_type.default(x_1); triton_poi_fused_0.run(buf2, buf1, 4112, 4080)", None),
])
def test_one_launch_that_stores_twice_is_recognised_by_its_arguments(body, found):
    assert inductor.store_of(MODULE.format(body=body)) == found


@pytest.fixture(scope="module")
def by_inductor(tmp_path_factory):
    """Return the answer for E5M2 on sm_90 with three of its configurations: 10 s, as PyTorch is imported."""
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    spec, = probes_like(["inductor_store/e5m2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        answers = engine.compile_cells(find_triton("installed"), [(spec, ARCHITECTURES["sm_90"])])
    answer = answers.by_cell[spec.id, "sm_90"]
    if "raised" in answer and answer["raised"][0] == "NotObservable":
        pytest.skip(answer["raised"][1])
    store = answer["compiled"]["store"]
    assert {(config["YBLOCK"], config["XBLOCK"]) for config in store["configs"]} >= {(32, 32), (64, 64), (16, 256)}
    return spec, {"compiled": {"store": store | {"configs": [store["configs"][at] for at in (0, 1, -1)]}}}


def test_inductors_quantizer_is_right_in_every_configuration(by_inductor):
    spec, answer = by_inductor
    outcome, metrics = evaluate(spec, ARCHITECTURES["sm_90"], answer)
    assert (outcome.status, outcome.check) == (Status.OK, "inputs"), outcome
    assert "every configuration" in outcome.cause and metrics.conversions


def test_one_wrong_configuration_of_several_is_wrong_and_named(by_inductor):
    spec, answer = by_inductor
    configs = [config | {"metadata": dict(config["metadata"])} for config in answer["compiled"]["store"]["configs"]]
    metadata = configs[1]["metadata"]
    metadata["assembly"], changed = re.subn(r"bar\.sync\s+0;", "", metadata["assembly"])
    assert changed
    outcome, _ = evaluate(spec, ARCHITECTURES["sm_90"],
                          {"compiled": {"store": answer["compiled"]["store"] | {"configs": configs}}})
    assert outcome.status is Status.WRONG and "1 of 3 configurations" in outcome.message
    assert f"num_warps {configs[1]['num_warps']}" in outcome.message


def test_configurations_that_cannot_be_executed_leave_the_cell_only_compiled(by_inductor):
    spec, answer = by_inductor
    amd, _ = evaluate(spec, ARCHITECTURES["gfx942"], answer)
    assert (amd.status, amd.check) == (Status.OK, "none") and "0 of 3 configurations were executed" in amd.cause
    several, _ = evaluate(spec, ARCHITECTURES["sm_90"], {"compiled": {"store": {"arguments": [], "configs": []}}})
    assert (several.status, several.check, several.flags) == (Status.OK, "none", ("unfused",))


def test_every_tile_is_a_probe_and_its_codes_are_exact_in_the_source():
    ids = {spec.id for spec in probes_like(["quantize_store/e5m2"])}
    for y, x in STORE_TILES:
        assert any(f"quantize_store/e5m2/addresses-y{y}-x{x}-w{warps}" in ids for warps in STORE_WARPS)
    for name in ("e4m3fn", "e5m2"):
        fmt = format_named(name)
        codes = [code_at(fmt, row, column, 64) for row in range(64) for column in range(64)]
        assert len(set(codes)) > 1.8 * fmt.max_code, "most codes of both signs occur"
        assert all(BF16.value(BF16.round(fmt.value(code))) == fmt.value(code) for code in set(codes) - {fmt.nan_code})
