"""The record's schema: what can be written down, what cannot, and who may read it."""

import json
import math

import pytest
from pydantic import ValidationError
from sample_records import BUILD, CPU, case, record

from fpxbench.records.case import Case, split_id
from fpxbench.records.record import Accuracy, Build, Machine, Record, Timing
from fpxbench.records.verdict import Status, Verdict

SCHEMA = Record.SCHEMA
TIMING = Timing(samples_us=[1.0, 2.0, 3.0], median_us=2.0, ci95_us=(1.0, 3.0))
MINIMAL = {
    "schema": 1,
    "case": {
        "implementation": "a",
        "scheme": "e4m3fn-row",
        "workload": "canary.seed",
        "m": 1,
        "n": 32,
        "k": 32,
        "activation": "bf16",
    },
    "build": {"torch": "2.9.0+cpu", "channel": "release", "variant": "cpu"},
    "machine": {"name": "m", "device": "d", "arch": "x"},
    "verdict": {"status": "unsupported"},
}


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_a_case_that_is_not_right_has_no_timing(status):
    with pytest.raises(ValidationError, match=f"a case that is {status} has no timing"):
        Record(case=case(), build=BUILD, machine=CPU, verdict=Verdict(status=status), timing=TIMING)


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_nor_is_one_read_back_from_a_file(status):
    line = json.loads(record(case(), speedup=1.2).to_json())
    line["verdict"]["status"] = str(status)
    with pytest.raises(ValidationError, match="has no timing"):
        Record.model_validate_json(json.dumps(line))


def test_a_right_case_without_a_timing_says_why():
    with pytest.raises(ValidationError, match="needs a reason"):
        Record(case=case(), build=BUILD, machine=CPU, verdict=Verdict(status=Status.OK))
    assert (
        Record(
            case=case(), build=BUILD, machine=CPU, verdict=Verdict(status=Status.OK), no_timing="an interpreter"
        ).timing
        is None
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_cannot_be_stored(value):
    with pytest.raises(ValidationError, match="JSON has no such number"):
        Accuracy(relative_error=value)
    with pytest.raises(ValidationError, match="JSON has no such number"):
        Timing(samples_us=[value], median_us=1.0, ci95_us=(1.0, 1.0))


def test_a_record_is_one_line_of_strict_json_that_reads_back_equal():
    log = 'first\nsecond\r\n\u2028 "quoted" <script>\x00\x1b[31m'
    one = record(
        case(),
        Verdict(status=Status.CRASH, signal="SIGSEGV", log_tail=log, evidence={"worst_at": [0, 1], "bound": math.inf}),
    )
    line = one.to_json()
    assert "\n" not in line and "\r" not in line
    parsed = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert parsed["schema"] == SCHEMA and parsed["case"]["id"] == one.case.id
    again = Record.model_validate_json(line)
    assert again.verdict.log_tail == log and again.to_json() == line


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_records_of_every_schema_so_far_are_read_with_what_they_have(schema):
    read = Record.model_validate({**MINIMAL, "schema": schema})
    assert read.timing is None and read.case.id == "a/e4m3fn-row/canary.seed/m1/bf16"


@pytest.mark.parametrize("schema", [SCHEMA + 1, 99, 0, -1])
def test_records_of_a_newer_schema_or_of_none_are_refused(schema):
    with pytest.raises(ValidationError, match="schema"):
        Record.model_validate({**MINIMAL, "schema": schema})


def test_fields_that_are_not_known_are_left_aside():
    read = Record.model_validate({**MINIMAL, "colour": "red", "machine": {**MINIMAL["machine"], "fans": 3}})
    assert "colour" not in read.to_json() and "fans" not in read.to_json()


SMUGGLED = ("../../etc/passwd", "a/b", "<script>", "a b", "", "-rf", ".hidden", "a\n", "a\x00", 'x"onclick=', "é",
            "x" * 200)


@pytest.mark.parametrize("name", SMUGGLED)
@pytest.mark.parametrize("field", ["implementation", "scheme", "workload"])
def test_an_id_cannot_carry_a_path_or_a_tag(field, name):
    with pytest.raises(ValidationError, match=field):
        Case.model_validate({**MINIMAL["case"], field: name})


@pytest.mark.parametrize("name", SMUGGLED)
def test_nor_can_the_names_that_folders_and_links_are_made_of(name):
    with pytest.raises(ValidationError, match="name"):
        Machine(name=name, device="d", arch="a")
    with pytest.raises(ValidationError, match="torch"):
        Build(torch=name, channel="release", variant="cpu")
    with pytest.raises(ValidationError, match="variant"):
        Build(torch="2.13.0", channel="release", variant=name)


def test_a_stored_id_that_belies_its_parts_is_not_believed():
    read = Record.model_validate({**MINIMAL, "case": {**MINIMAL["case"], "id": "../../x"}})
    assert read.case.id == "a/e4m3fn-row/canary.seed/m1/bf16"


def test_a_case_id_comes_apart_into_what_it_was_made_of():
    one = case("triton_fused", "mxfp4", "llama2-7b.qkv", 16, 12288)
    assert one.id == "triton_fused/mxfp4/llama2-7b.qkv/m16/bf16"
    assert split_id(one.id) == {
        "implementation": "triton_fused",
        "scheme": "mxfp4",
        "workload": "llama2-7b.qkv",
        "m": "16",
        "activation": "bf16",
    }
    assert one.slug == one.id.replace("/", "__")


@pytest.mark.parametrize("text", ["", "a/b/c", "a/b/c/m1/fp32", "a/b/c/mx/bf16", "a/b/c/m1/bf16/more"])
def test_what_is_no_case_id_is_refused_by_name(text):
    with pytest.raises(ValueError, match="is not a case id") as refusal:
        split_id(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(("torch", "channel", "label"), [
    ("2.13.0+cpu", "release", "2.13.0"),
    ("2.14.0.dev20261120+cu130", "nightly", "2.14.0.dev20261120"),
    ("2.14.0a0+gitcf30153", "source", "2.14.0a0+gitcf30153"),
])
def test_a_builds_label_leaves_out_the_variant_but_not_a_source_commit(torch, channel, label):
    assert Build(torch=torch, channel=channel, variant="cpu").label == label
