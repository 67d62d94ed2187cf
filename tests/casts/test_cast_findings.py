"""Records of casts become findings, disagreements between engines, and changes from build to build."""

import pytest
from pydantic import ValidationError
from sample_casts import EXAMPLE, before_and_after, conversion, overflowing, record

from fpxbench.casts.cast_changes import CastSnapshot, changes
from fpxbench.casts.cast_findings import disagreements, find
from fpxbench.casts.cast_record import Behaviour, CastRecord, DifferingInputs, InputKind
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict


def test_engines_that_overflow_differently_are_one_message_over_all_the_sources_that_show_it():
    records = [overflowing(how, engine, f"cast/{source}/e4m3fn")
               for source in ("fp32", "bf16") for how, engine in (("nan", "eager"), ("saturate", "compiled"))]
    (one,) = disagreements(
        [*records, overflowing("nan", what="cast/fp32/e5m2"), overflowing("nan", "compiled", "cast/fp32/e5m2")]
    )
    assert one.ways == {"nan": ("eager/cpu",), "saturate": ("compiled/cpu",)}
    assert (
        one.message
        == "cast fp32, bf16 → e4m3fn: past the maximum nan in eager/cpu; saturate in compiled/cpu (all round alike)"
    )


def test_infinity_alone_may_be_what_engines_disagree_on():
    (one,) = disagreements([overflowing("saturate"), overflowing("saturate", "compiled", infinity="nan")])
    assert set(one.ways) == {"saturate", "saturate, but infinity: nan"}


def scaled(engine, rules, **more):
    kept = DifferingInputs(kind=InputKind.UNROUNDED_PRODUCT, count=390, permitted=rules >= 3, examples=[EXAMPLE])
    told = {"taken_as": "exact product"} if engine == "compiled" else {}
    return record(
        conversion("scale_then_cast/bf16/e4m3fn", engine),
        **{
            "rules": rules,
            "behaviour": Behaviour(**told),
            "differences": [kept] if told else [],
            "differing": 390 if told else 0,
            **more,
        },
    )


def test_a_product_that_is_rounded_in_one_engine_only_is_a_disagreement_and_no_fault():
    records = [scaled("eager", 3), scaled("compiled", 3)]
    (one,) = disagreements(records)
    assert one.message.startswith(
        "scale, then cast bf16 → e4m3fn: the product is rounded to its dtype first in eager/cpu; not rounded before"
        " the cast in compiled/cpu"
    )
    assert "emulate_precision_casts" in one.message
    assert find(records) == []
    assert disagreements([scaled("eager", 3)]) == []


def test_a_record_of_rules_by_which_an_unrounded_product_was_wrong_is_read_by_the_current_rules():
    before = scaled("compiled", 3).model_dump(mode="json", by_alias=True) | {
        "rules": 2,
        "verdict": {"status": "wrong", "summary": "keeps the product"},
    }
    before["differences"][0]["permitted"] = False
    read = CastRecord.model_validate(before)
    assert read.verdict.status is Status.OK and read.differences[0].permitted and read.rules == 2
    assert (
        read.verdict.summary == "all 65,536 inputs; 390 of them only if the product is not rounded to its dtype"
    )
    before["differences"].append(
        DifferingInputs(kind=InputKind.TIE, count=7, permitted=False, examples=[EXAMPLE]).model_dump(mode="json")
    )
    assert CastRecord.model_validate(before).verdict.summary == "keeps the product"      # a tie is wrong by any rules
    with pytest.raises(ValueError, match="is not ok"):
        CastRecord.model_validate(before | {"rules": 3, "verdict": {"status": "ok"}})


@pytest.mark.parametrize("other", [
    overflowing("nan", "compiled"),                                 # the same
    overflowing("saturate", "triton_interpreter"),                  # nobody's results come from it
    overflowing("mixture of saturate and nan", "compiled"),         # wrong, which is another finding
    overflowing("saturate", "compiled", "cast_rtz/fp32/e4m3fn"),    # another operation
    overflowing("saturate", "compiled", "cast/fp32/e5m2"),          # another target
], ids=["the same", "interpreted", "mixture", "another operation", "another target"])
def test_what_is_no_disagreement(other):
    assert disagreements([overflowing("nan"), other]) == []


def test_one_fault_in_many_conversions_is_one_finding_and_the_interpreter_comes_last():
    wrong = Verdict(status=Status.WRONG, kind=Kind.DOUBLE_ROUNDING, evidence={"mistake": "rounds twice"})
    records = [record(conversion("cast/fp32/e5m2", "triton_interpreter"), Status.WRONG)] + [
        record(conversion(f"cast/fp64/{target}", engine), Status.WRONG, verdict=wrong)
        for engine in ("eager", "compiled") for target in ("e5m2", "e4m3fn")]
    found = find([*records, record(conversion("cast/fp32/e4m3fn"))])
    assert [(one.what, one.runs_on) for one in found] == [
        ("cast fp64 → e4m3fn, e5m2", ["eager/cpu", "compiled/cpu"]), ("cast fp32 → e5m2", ["triton_interpreter/cpu"])]


def test_a_changed_overflow_is_one_event_and_its_count_is_not_another():
    old, new = before_and_after()
    assert [one.message for one in changes(map(CastSnapshot.of, old), map(CastSnapshot.of, new))] == [
        "cast fp32, bf16 → e4m3fn in eager/cpu: overflow nan → saturate"]
    assert changes(map(CastSnapshot.of, new), map(CastSnapshot.of, new)) == []


def test_other_inputs_are_no_change():
    old, new = before_and_after()
    new = [one.model_copy(update={"inputs_digest": "other"}) for one in new]
    assert changes(map(CastSnapshot.of, old), map(CastSnapshot.of, new)) == []


@pytest.mark.parametrize("odd", [{"differences": None}, {"differences": 5}, {"differences": [{}]}, {"inputs": None},
                                 {"rules": -1}, {"rules": True, "differences": None}])
def test_an_odd_record_of_old_rules_is_refused_as_any_other(odd):
    old = scaled("compiled", 3).model_dump(mode="json", by_alias=True) | {"rules": 2}
    with pytest.raises(ValidationError):
        CastRecord.model_validate(old | odd)
