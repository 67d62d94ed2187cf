"""What users get wrong: each mistake either works or is refused in one sentence that names the value."""

import io
import json
import math
import re
import sys

import pytest
import torch
from commands import command
from pydantic import ValidationError

from fpxbench import cli, quantize
from fpxbench.cli.common import UsageError
from fpxbench.diagnosis.encode_faults import encoded
from fpxbench.implementation import Implementation, discover
from fpxbench.numbers.experts import CannotStack, QuantizedExperts
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import run_trial

pytestmark = pytest.mark.usefixtures("one_thread")

# Those that compile or interpret have tests of their own; what is asked here is asked of all alike.
EAGER = ("dense", "int8_weight_only", "eager_upcast", "native_float8")
BLOCKED = ("e3m2-g128", "e2m1-g32", "mxfp8_e4m3fn", "mxfp4", "nvfp4")


def trial(implementation, scheme, *, m=3, n=24, k=96, activation="bf16"):
    case = Case(
        implementation=implementation, scheme=scheme, workload="canary.ragged", m=m, n=n, k=k, activation=activation
    )
    return run_trial(TrialRequest(case=case, seed=0))


@pytest.mark.parametrize("k", [1, 5, 33, 203])
@pytest.mark.parametrize("scheme", BLOCKED)
def test_a_k_that_the_block_does_not_divide_works(scheme, k):
    verdict = trial("eager_upcast", scheme, k=k).verdict
    assert verdict.status is Status.OK, verdict.summary


@pytest.mark.parametrize(("implementation", "scheme"), [
    ("dense", "bf16"), ("int8_weight_only", "int8-row"), ("eager_upcast", "e3m2-row"), ("native_float8", "e4m3fn-row"),
])
def test_no_tokens_is_a_product_like_any_other(implementation, scheme):
    result = trial(implementation, scheme, m=0)
    assert result.verdict.status is Status.OK, result.verdict.summary
    assert result.timing is None and "no tokens" in result.no_timing or "canary" in result.no_timing


@pytest.mark.parametrize("implementation", EAGER)
def test_a_single_weight_works_or_is_refused_with_a_reason(implementation):
    for scheme in ("bf16", "int8-row", "e4m3fn-row", "mxfp4"):
        verdict = trial(implementation, scheme, m=1, n=1, k=1).verdict
        assert verdict.status is Status.OK or (verdict.status is Status.UNSUPPORTED and verdict.summary), (
            verdict.summary
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("implementation", EAGER)
def test_a_weight_that_is_not_finite_is_refused_with_its_place(implementation, bad):
    scheme = {"dense": "bf16", "int8_weight_only": "int8-row"}.get(implementation, "e4m3fn-row")
    weight = torch.ones(4, 32)
    weight[2, 17] = bad
    with pytest.raises(ValueError, match=rf"not finite: {bad} at row 2, column 17"):
        discover()[0][implementation]().quantize(weight, scheme_named(scheme))


@pytest.mark.parametrize("scheme", ["bf16", "e4m3fn-row", "e3m2-g128", "nvfp4"])
def test_a_weight_that_is_not_contiguous_is_stored_as_its_elements_say(scheme):
    weight = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    for view in (weight.t(), weight[::2], weight[:, 3:35], weight[:1].expand(5, 40)):
        stored, same = (Implementation().quantize(w, scheme_named(scheme)) for w in (view, view.contiguous()))
        assert torch.equal(stored.dequantize(), same.dequantize()) and stored.packed.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_weight_of_another_float_dtype_works(dtype):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = Implementation().quantize(weight, scheme_named("e4m3fn-row"))
    assert torch.equal(
        stored.dequantize(), Implementation().quantize(weight.float(), scheme_named("e4m3fn-row")).dequantize()
    )


@pytest.mark.parametrize("scheme", ["bf16", "e4m3fn-row"])
@pytest.mark.parametrize(("weight", "error", "says"), [
    (torch.ones(4, 4, dtype=torch.int32), TypeError, "not torch.int32"),
    (torch.ones(4, 4, dtype=torch.bool), TypeError, "not torch.bool"),
    (torch.ones(4, 4).to(torch.float8_e4m3fn), TypeError, "not torch.float8_e4m3fn"),
    (torch.ones(4), ValueError, r"this one has shape \[4\]"),
    (torch.ones(2, 3, 4), ValueError, r"this one has shape \[2, 3, 4\]"),
    (torch.ones(0, 4), ValueError, r"shape \[0, 4\] has no elements"),
    (torch.ones(4, 0), ValueError, r"shape \[4, 0\] has no elements"),
])
def test_what_is_no_weight_is_refused_by_its_dtype_or_shape(scheme, weight, error, says):
    with pytest.raises(error, match=says):
        Implementation().quantize(weight, scheme_named(scheme))


@pytest.mark.parametrize(("field", "value"), [("activation", "fp32"), ("m", -1), ("n", 0), ("k", 0), ("m", 1.5)])
def test_a_case_that_cannot_be_is_refused_by_its_field(field, value):
    fields = {
        "implementation": "dense",
        "scheme": "bf16",
        "workload": "w",
        "m": 1,
        "n": 8,
        "k": 8,
        "activation": "bf16",
    }
    with pytest.raises(ValidationError, match=field):
        Case.model_validate({**fields, field: value})


def test_an_implementation_that_is_not_there_is_missing_and_named():
    verdict = trial("tritn_fused", "bf16").verdict
    assert verdict.status is Status.MISSING and "'tritn_fused'" in verdict.summary


RUN = ("run", "--device", "cpu", "--implementation", "dense", "--scheme", "bf16", "--workload", "canary.seed")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*RUN, "--scheme", "e4m3fn-rov"), "no scheme 'e4m3fn-rov'"),
        ((*RUN, "--implementation", "dens"), "no implementation 'dens'; did you mean dense?"),
        ((*RUN, "--implementation", "my_kernel"), "no implementation 'my_kernel'; there are"),
        (("run", "--impls", "broken.py", "-i", "mine"), "broken.py could not be loaded: SyntaxError"),
        (("inspect", "mine", "mxfp4", "--impls", "broken.py"), "broken.py could not be loaded: SyntaxError"),
        (
            ("run", "--cases", "garbage.jsonl"),
            "garbage.jsonl:1: not a case as `fpxbench records | jq -c .case` prints it: Invalid JSON",
        ),
        (("run", "--cases", "."), "--cases .: Is a directory"),
        (("run", "--cases", "/absent"), "--cases /absent: No such file or directory"),
        (("inspect", "eager_upcast", "mxfp4", "--device", "tpu"), "no device 'tpu': cpu or cuda"),
        ((*RUN, "--device", "tpu"), "no device 'tpu': cpu or cuda"),
        ((*RUN, "--workload", "llama2-7b.kqv"), "llama2-7b.qkv"),
        ((*RUN, "--impls", "/absent"), "--impls /absent: no such file or folder"),
        ((*RUN, "--device", "gpu"), "gpu"),
        ((*RUN, "--memory-limit", "lots"), "--memory-limit 'lots'"),
        ((*RUN, "--fail-on", "wrogn"), "--fail-on 'wrogn'"),
        ((*RUN, "--machine", "../up"), "../up"),
        (("records", "--results", "/absent"), "--results /absent: no such folder"),
        (("report", "--results", "/absent"), "--results /absent: no such folder"),
        (("show", "not-an-id"), "'not-an-id' is not a case id"),
        (("show", "dense/bf16/canary.seed/m1/bf16"), "--results results: no such folder"),
        (("show", "dense/bf16/canary.seed/m1/bf16", "--results", "."), "no record of 'dense/bf16/canary.seed/m1/bf16'"),
        (("report", "--results", "a-file"), "--results a-file: this is a file; give the folder"),
        (("records", "--results", "a-file"), "--results a-file: this is a file; give the folder"),
        (("report", "--results", ".", "--output", "a-file"), "a-file is a file; give a folder"),
        ((*RUN, "--results", "a-file"), "a-file: cannot be made a folder of records: a file is there"),
        (
            (*RUN, "--results", "/proc/absent"),
            "/proc/absent: cannot be made a folder of records: No such file or directory",
        ),
        (
            ("numerics", "-c", "finfo/*", "--results", "a-file"),
            "a-file: cannot be made a folder of records: a file is there",
        ),
        (("targets", "diff", "3.8.0", "3.9.0", "--matrix", "/absent"), "/absent: No such file or directory"),
        (("list", "kernels"), "cannot list 'kernels'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_status_2(
    tmp_path, monkeypatch, capsys, arguments, says
):
    (tmp_path / "a-file").touch()
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "garbage.jsonl").write_text("garbage\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpxbench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert says in said and "Traceback" not in said
    assert len(said.splitlines()) == 1, said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", [RUN, ("inspect", "eager_upcast", "e4m3fn-row")])
def test_a_gpu_that_is_not_there_is_said_so(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpxbench", *command, "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "'cuda'" in said and len(said.splitlines()) == 1


def test_a_folder_without_records_is_called_one_and_not_right(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpxbench", "report", "--results", "."])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "no records in ." in said and "nothing wrong" not in said


def test_a_reader_that_stops_reading_is_no_mistake(monkeypatch, capsys):
    def stopped() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "app", stopped)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 141


def test_a_listed_case_of_an_implementation_that_is_not_here_is_recorded_and_said(tmp_path, monkeypatch, capsys):
    case = Case(implementation="absent", scheme="e4m3fn-row", workload="w", m=1, n=8, k=32, activation="bf16")
    (tmp_path / "cases.jsonl").write_text(case.model_dump_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpxbench", "run", "--cases", "cases.jsonl", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "not run: 1 case: no implementation 'absent'" in capsys.readouterr().out
    record, = Store(tmp_path / "results").read_all()[0]
    assert record.verdict.status is Status.MISSING


@pytest.mark.parametrize(("scheme", "value", "dtype"), [
    ("e4m3fn-row", 1e300, torch.float64), ("mxfp4", -1e39, torch.float64), ("fp16", 1e5, torch.float32)])
def test_a_weight_that_is_finite_until_it_is_narrowed_is_refused(scheme, value, dtype):
    weight = torch.ones(2, 64, dtype=dtype)
    weight[1, 5] = value
    with pytest.raises(ValueError, match="not finite in float(32|16): .* at row 1, column 5"):
        quantize(weight, scheme)


@pytest.mark.parametrize(("asked", "message"), [
    ("implementations -i nope*", "no implementation 'nope\\*'"), ("workloads -w canary", "no workload 'canary'"),
    ("schemes -s e4m3fn-rwo", "e4m3fn-rwo"), ("schemes --device tpu", "no device 'tpu'")])
def test_a_filter_of_list_that_matches_nothing_is_refused(asked, message):
    run = command("list", *asked.split())
    assert isinstance(run.exception, (UsageError, ValueError)), run.output
    assert re.search(message, str(run.exception))


def test_list_shows_what_its_filters_match():
    def shown(*asked):
        return [next(iter(row.values())) for row in json.loads(command("list", *asked, "--json").stdout)]

    assert shown("implementations", "-i", "int*") == ["int8_weight_only", "int_mm"]
    schemes = shown("schemes", "-s", "mx*")
    assert {"mxfp4", "mxfp8_e4m3fn"} <= set(schemes) and all(name.startswith("mx") for name in schemes)
    assert shown("workloads", "-w", "llama3-70b.down.tp8") == ["llama3-70b.down.tp8"]


@pytest.mark.parametrize("asked", ["run -w canary.seed", "rank", "generate smollm2"])
def test_a_machine_name_that_is_no_folder_is_refused_before_anything_runs(asked):
    run = command(asked, "--machine", "my gpu/1")
    assert isinstance(run.exception, UsageError) and "--machine 'my gpu/1'" in str(run.exception)


def test_an_encoder_that_divides_zeros_by_zero_is_no_error_of_the_diagnosis():
    codes = encoded(torch.zeros(2, 4), lambda weight: weight / weight, FORMATS["int8"])
    assert codes.shape == (2, 4) and not codes.any()


def test_weights_that_an_object_holds_are_not_stacked():
    held = QuantizedWeight.holding(object(), scheme_named("mxfp4"), (8, 32))
    with pytest.raises(CannotStack, match="object"):
        QuantizedExperts.stack([held, held])
