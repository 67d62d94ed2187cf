"""What torch.compile writes for a weight-only product is read from its launches, for GPUs that are not present."""

import json
import subprocess
import sys
from pathlib import Path

import fake_triton
import pytest
from places import CHECKOUT
from ptx_samples import DECODE

from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.targets import engine
from fpxbench.targets.architectures import ARCHITECTURES, architectures_like
from fpxbench.targets.build_diff import changes
from fpxbench.targets.cell_outcomes import evaluate, follow_decodes
from fpxbench.targets.collection import assemble, evaluate_build, evaluate_builds
from fpxbench.targets.engine import CHILD
from fpxbench.targets.matrix import CellOutcome, KernelMetrics, Matrix, read_matrix
from fpxbench.targets.operations import probes_like
from fpxbench.targets.reproduction import script
from fpxbench.targets.triton_builds import find_triton
from fpxbench.targets.version_spans import causes

sys.path.append(str(CHILD))
import inductor  # the child's own module, which imports no PyTorch yet

sys.path.remove(str(CHILD))


SHIPPED = CHECKOUT / "reports" / "targets" / "targets.json"


def question(probe):
    found, = probes_like([f"inductor/{probe}"])
    return found


# The installed PyTorch.

ASKED = [("e4m3fn/default-nk-m16-bf16", "sm_90"), ("e4m3fn/default-nk-m16-bf16", "sm_80"),
         ("e4m3fnuz/default-nk-m16-bf16", "sm_90"),
         ("e4m3fn/max-autotune-nk-m1-bf16", "sm_90"), ("e4m3fn/max-autotune-kn-m16-bf16", "sm_90"),
         ("e4m3fnuz/max-autotune-kn-m16-bf16", "gfx942")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return evaluate_build(find_triton("installed"),
                              [(question(probe), ARCHITECTURES[name]) for probe, name in ASKED])


def outcome(installed, probe, architecture):
    found = installed.outcomes[f"inductor/{probe}", architecture]
    if found.status is Status.MISSING:
        pytest.skip(found.cause)
    return found


def test_by_default_the_product_is_a_librarys_and_a_16_bit_weight_goes_through_memory(installed):
    found = outcome(installed, "e4m3fn/default-nk-m16-bf16", "sm_90")
    assert (found.status, found.flags) == (Status.OK, ("unfused",)), found
    assert "upcast by a kernel, then product by extern_kernels.mm" in found.cause and "32 MiB for 16 MiB" in found.cause
    assert found.check == "table", "the upcast's PTX was to be run on every code"
    metrics = installed.metrics["inductor/e4m3fn/default-nk-m16-bf16", "sm_90"]
    assert metrics.conversions == ["cvt.rn.f16x2.e4m3x2"] and metrics.matrix == []


def test_tuned_one_row_is_one_kernel_and_so_are_more_if_the_weight_is_stored_as_it_is_multiplied(installed):
    for probe, multiplies in (("e4m3fn/max-autotune-nk-m1-bf16", False), ("e4m3fn/max-autotune-kn-m16-bf16", True)):
        found = outcome(installed, probe, "sm_90")
        assert (found.status, found.flags, found.cause) == (Status.OK, (), "upcast, product and scale are one kernel")
        assert bool(installed.metrics[f"inductor/{probe}",
                                      "sm_90"].matrix) == multiplies, "only several rows are worth matrix instructions"


@pytest.mark.parametrize(("fmt", "architecture"), [("e4m3fn", "sm_80"), ("e4m3fnuz", "sm_90")])
def test_what_triton_has_no_dtype_for_on_a_gpu_is_upcast_by_pytorch_itself(installed, fmt, architecture):
    found = outcome(installed, f"{fmt}/default-nk-m16-bf16", architecture)
    assert found.status is Status.OK and found.flags == ("unfused",)
    assert found.cause.startswith("3 launches: upcast by torch.ops.prims.convert_element_type.default, then product by "
                                  "extern_kernels.mm")
    assert (f"inductor/{fmt}/default-nk-m16-bf16", architecture) not in installed.metrics


def test_on_amd_the_kernel_is_compiled_for_amd(installed):
    assert outcome(installed, "e4m3fnuz/max-autotune-kn-m16-bf16", "gfx942").flags == ()
    assert installed.metrics["inductor/e4m3fnuz/max-autotune-kn-m16-bf16", "gfx942"].matrix == ["v_mfma"]


def test_the_build_says_which_pytorch_it_was(installed):
    import torch

    assert installed.build.torch == torch.__version__


def test_it_still_launches_what_the_shipped_matrix_lists(installed):
    matrix = read_matrix(SHIPPED)
    position = next((at for at, build in enumerate(matrix.builds) if build.key == installed.build.key), None)
    if position is None or matrix.builds[position].torch.partition("+")[0] != installed.build.torch.partition("+")[0]:
        pytest.skip(f"the matrix has no PyTorch {installed.build.torch} with Triton {installed.build.triton}")
    written = {probe.id: probe for probe in matrix.probes}
    for (probe, architecture), now in installed.outcomes.items():
        then = matrix.outcome_of(written[probe], architecture, position)
        assert (now.status, now.cause, now.flags) == (then.status, then.cause, then.flags), (probe, architecture)


# What a module launches.

MODULE = """
upcast_0 = async_compile.triton('upcast_0', '''source of upcast_0''', device_str='cuda')
fused_1 = async_compile.triton('fused_1', '''source of fused_1''', device_str='cuda')

class Runner:
    def call(self, args):
        x_1, w_1, s_1 = args
        args.clear()
        with torch.cuda._DeviceGuard(0):
            buf0 = empty_strided_cuda((4096, 4096), (1, 4096), torch.bfloat16)
            stream0 = get_raw_stream(0)
            w_1 = copy_if_misaligned(w_1)
{body}
        return (buf2, )
"""


@pytest.mark.parametrize(("body", "launches"), [
    ("fused_1.run(x_1, s_1, w_1, buf2, stream=stream0)", [("triton", ["upcast", "product", "scale"])]),
    ("upcast_0.run(w_1, buf0, stream=stream0)\n"
     "            extern_kernels.mm(x_1, reinterpret_tensor(buf0, (1, 2)), out=buf1)\n"
     "            fused_1.run(buf1, s_1)",
     [("triton", ["upcast"]), ("extern_kernels.mm", ["product"]), ("triton", ["scale"])]),
    ("buf0 = torch.ops.prims.convert_element_type.default(reinterpret_tensor(w_1, (1, 2)), torch.bfloat16)\n           "
     " fused_1.run(x_1, buf0, s_1)",
     [("torch.ops.prims.convert_element_type.default", ["upcast"]), ("triton", ["product", "scale"])]),
    ("fused_1.run(x_1, w_1, buf1)\n            fused_1.run(buf1, buf2)\n            fused_1.run(s_1, buf2)",
     [("triton", ["upcast", "product"]), ("triton", []), ("triton", ["scale"])]),
])
def test_a_launchs_arguments_decide_what_it_does(body, launches):
    module = MODULE.format(body="            " + body)
    assert [(launch["by"], launch["does"]) for launch in inductor.launches_of(module)] == launches
    assert inductor.kernels_of(module) == {"upcast_0": "source of upcast_0", "fused_1": "source of fused_1"}


@pytest.mark.parametrize(("module", "message"), [
    (MODULE.format(body="            novel.launcher(x_1, w_1, s_1)"),
     "no known launch does the upcast and product and scale"),
    (MODULE.format(body="            fused_1.run(x_1, w_1)"), "no known launch does the scale"),
    ("def call(arguments):\n    pass\n", "writes no function `call"),
    ("", "writes no function `call"),
])
def test_an_unknown_form_of_module_is_not_observable(module, message):
    with pytest.raises(inductor.NotObservable, match=message):
        inductor.launches_of(module)


# Where it cannot be observed.

HIDING = """
import json, sys
sys.path.insert(0, {child!r})
import inductor  # the child's own module, which imports no PyTorch yet
inductor.prepare({request})
messages = {{}}
for name in {names}:
    owner, attribute = inductor._found(name.rpartition(".")[0]), name.rpartition(".")[2]
    kept = owner.__dict__[attribute]
    delattr(owner, attribute)
    try:
        inductor.generated({request})
    except inductor.NotObservable as error:
        messages[name] = str(error)
    setattr(owner, attribute, kept)
from torch._inductor import compile_fx
compile_fx.compile_fx_inner = lambda graph: None
try:
    inductor.generated({request})
except inductor.NotObservable as error:
    messages["takes something else"] = str(error)
print(json.dumps(messages))
"""


def test_a_missing_private_name_is_named(tmp_path):
    """About 10 s: PyTorch is imported."""
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    names = ["torch._inductor.select_algorithm.add_preprocessing_fn",
             "torch._inductor.graph.GraphLowering.compile_to_module"]
    request = question("e4m3fn/default-nk-m16-bf16").request(ARCHITECTURES["sm_90"])
    program = HIDING.format(child=str(CHILD), request=request, names=names)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    messages = json.loads(run.stdout.splitlines()[-1])
    for name in names:
        assert messages[name] == f"not observable on this build: PyTorch {torch.__version__} has no {name}"
    assert "TypeError: " in messages["takes something else"]
    outcome, metrics = evaluate(question("e4m3fn/default-nk-m16-bf16"), ARCHITECTURES["sm_90"],
                                {"raised": ["NotObservable", messages[names[0]]]})
    assert (outcome.status, outcome.cause, metrics) == (Status.MISSING, messages[names[0]], None)


def test_without_pytorch_it_is_missing_and_a_triton_from_a_folder_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = fake_triton.write(tmp_path / "fake")
    alone = tmp_path / "python"
    alone.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -S "$@"\n')
    alone.chmod(0o755)
    questions, architectures = probes_like(["inductor/int8/default-nk-m16-bf16",
                                            "decode/e4m3fn/bf16"]), architectures_like(["sm_80"])
    by_python, by_folder = evaluate_builds([str(alone), str(folder)], questions, architectures)
    missing = by_python.outcomes["inductor/int8/default-nk-m16-bf16", "sm_80"]
    assert (missing.status, missing.cause) == (Status.MISSING,
                                               "not observable on this build: no PyTorch beside its Triton")
    assert by_python.build.torch == ""
    assert list(by_folder.outcomes) == [("decode/e4m3fn/bf16", "sm_80")]
    matrix = assemble([by_folder], questions, architectures)
    assert [probe.operation for probe in matrix.probes] == [operation.name
                                                            for operation in matrix.operations] == ["decode"]


def test_answers_are_kept_by_pytorch_where_it_has_a_part_in_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = (engine._AnswerCache("key", "", torch) for torch in ("2.13.0", "2.14.0"))
    for probe, same in (("inductor/int8/default-nk-m16-bf16", False), ("decode/e4m3fn/bf16", True)):
        request = probes_like([probe])[0].request(ARCHITECTURES["sm_90"])
        assert (one.name(request) == other.name(request)) == same


# What it amounts to.


def metadata(ptx="", **more):
    return {"object_bytes": 5000, "shared_bytes": 0, "matrix": {}, "matrix_types": [],
            "conversions": {"cvt.rn.f16x2.e4m3x2": 2}, "load_bits": 32,
            "assembly": ptx} | more


def launched(upcast, **last):
    return {"compiled": {"launches": [
        {"by": "triton", "kernel": "a", "does": ["upcast"], "metadata": upcast,
         "block": {"threads": 32, "XBLOCK": 128}},
        {"by": "triton", "kernel": "b", "does": ["product", "scale"], "metadata": metadata(**last),
         "block": {"threads": 128}},
    ]}}


def test_an_upcast_that_decodes_another_format_is_wrong_however_it_is_launched():
    ptx = DECODE.format(instruction="e4m3x2", correction="")
    right, _ = evaluate(question("e4m3fn/max-autotune-nk-m16-fp16"), ARCHITECTURES["sm_90"], launched(metadata(ptx)))
    assert (right.status, right.check, right.flags) == (Status.OK, "table", ("unfused",))
    probe = question("e4m3fnuz/max-autotune-kn-m16-bf16")
    halves = type(probe)(probe.operation, probe.format, probe.detail, probe.options | {"x": "fp16"})
    wrong, _ = evaluate(halves, ARCHITECTURES["sm_90"], launched(metadata(ptx)))
    assert (wrong.status, wrong.kind, wrong.check) == (Status.WRONG, Kind.FNUZ_AS_FN, "table")


def test_a_kernel_that_decodes_by_an_instruction_known_to_be_wrong_is_wrong():
    decode, product = ("decode/e4m3fnuz/bf16", "sm_90"), ("inductor/e4m3fnuz/max-autotune-nk-m1-bf16", "sm_90")
    by_librarys = ("inductor/e4m3fnuz/default-nk-m16-bf16", "sm_90")
    outcomes = {decode: CellOutcome(status=Status.WRONG, kind=Kind.FNUZ_AS_FN), product: CellOutcome(status=Status.OK),
                by_librarys: CellOutcome(status=Status.OK)}
    follow_decodes(outcomes, {key: KernelMetrics(conversions=["cvt.rn.f16x2.e4m3x2"]) for key in (decode, product)})
    assert outcomes[product].kind is Kind.FNUZ_AS_FN and outcomes[by_librarys].status is Status.OK


def test_one_empty_object_among_several_is_a_failure():
    outcome, _ = evaluate(question("int8/max-autotune-nk-m16-fp16"), ARCHITECTURES["sm_90"],
                          launched(metadata(), object_bytes=0))
    assert (outcome.status, outcome.kind) == (Status.ERROR, Kind.EMPTY_OBJECT)


def matrix_of(flags):
    return Matrix.model_validate({
        "generator": "test", "generated": "2026-01-01T00:00:00Z",
        "machine": {"system": "x", "processor": "y", "cores": 1},
        "builds": [{"triton": "3.7.1", "torch": "2.13.0"}], "operations": [],
        "architectures": [ARCHITECTURES["sm_90"].model_dump()],
        "outcomes": [{"status": "ok", "cause": "2 launches" if flags else "one kernel", "flags": flags}],
        "probes": [{"id": "inductor/int8/x", "operation": "inductor", "format": "int8",
                    "cells": {"sm_90": [{"builds": (0, 0), "outcome": 0}]}}],
    })


def test_a_build_that_fuses_no_more_has_lost_something_and_says_what_it_launches():
    fused, unfused = matrix_of([]), matrix_of(["unfused"])
    lost, = changes(fused, 0, unfused, 0)
    assert lost.verdict == "lost" and "ok -> ok (unfused): 2 launches" in str(lost)
    gained, = changes(unfused, 0, fused, 0)
    assert gained.verdict == "gained"
    assert changes(unfused, 0, unfused, 0) == []
    assert [outcome.cause for outcome, _, _ in causes(unfused, 0)] == ["2 launches"] and causes(fused, 0) == []


def test_a_script_asks_again_with_nothing_but_pytorch(tmp_path):
    """About 10 s: PyTorch is imported."""
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    file = tmp_path / "again.py"
    file.write_text(script(question("int8/max-autotune-nk-m1-bf16"), ARCHITECTURES["sm_90"], found="ok: one kernel"))
    run = subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path)
    if "NotObservable" in run.stderr:
        pytest.skip(run.stderr.splitlines()[-1])
    assert run.returncode == 0, run.stderr
    assert "async_compile.triton" in run.stdout and run.stdout.splitlines()[-1].endswith("compiles")
    assert not list(Path(tmp_path).glob("triton_*")), "it left files where it was run"
