"""What a sweep shows becomes problems, worst first, and choices: each in one sentence."""

from __future__ import annotations

import re

import pytest
import sample_records as sample

from fpxbench.records.kinds import Kind
from fpxbench.records.record import Flag
from fpxbench.records.verdict import Status, Verdict
from fpxbench.reports.sweep import problems
from fpxbench.reports.sweep.sweep_table import sweep_of


def sweep(records) -> object:
    return sweep_of(("m", "b"), records)


def sentences(records) -> list[str]:
    return [problem.message for problem in problems.find_problems([sweep(records)])]


def test_a_mistake_in_a_common_scheme_comes_before_a_crash_in_a_rare_one_and_both_before_slowness() -> None:
    records = [sample.record(sample.case("a", "e3m4-row"), Verdict(status=Status.CRASH, summary="died")),
               sample.record(sample.case("b", "mxfp4"), Verdict(status=Status.WRONG, kind=Kind.NIBBLE_SWAP)),
               sample.record(sample.case("c", "e4m3fn-row"), speedup=0.1)]
    found = problems.find_problems([sweep(records)])
    assert [(problem.section, problem.severity) for problem in found] == [("wrong", "wrong"), ("wrong", "crash"),
                                                                          ("slow", "slow")]


def test_schemes_that_nothing_right_runs_as_fast_as_dense_are_one_problem_with_the_closest_and_its_quality() -> None:
    records = [sample.record(sample.case(name, scheme), speedup=speedup)
               for name, scheme, speedup in (("a", "mxfp4", 0.2), ("b", "mxfp4", 0.5), ("b", "e4m3fn-row", 0.8),
                                             ("a", "e5m2-row", 0.3), ("a", "int8-row", 2.0))]
    found = sentences(records)
    [quality] = {record.accuracy.sqnr_db for record in records if record.case.scheme == "e4m3fn-row"}
    assert found[0] == (
        f"On {sample.CPU.device} dense bf16 is faster than every correct implementation of 3 of 4 schemes at M=1 "
                        f"(closest: b on e4m3fn-row, 0.80× at {quality:.1f} dB SQNR).")


def test_a_few_schemes_that_are_slower_than_dense_come_after_what_is_broader() -> None:
    fast = [sample.record(sample.case("c", f"e{e}m{m}-row"), speedup=2.0) for e in (2, 3, 4) for m in (1, 2, 3)]
    slow = [sample.record(sample.case(name, scheme), speedup=0.5) for name, scheme in (("a", "mxfp4"), ("b", "nvfp4"))]

    def minor(records) -> list[bool]:
        return [one.minor for one in problems.find_problems([sweep(records)]) if "every correct" in one.message]

    assert minor(slow) == [False] and minor(slow + fast) == [True]


def test_in_a_report_of_several_devices_each_finding_names_its_own() -> None:
    wrong = sample.record(sample.case("a"), Verdict(status=Status.WRONG, summary="off"))
    right = sample.record(sample.case("a"), speedup=2.0)
    other = right.model_copy(update={"machine": sample.CPU.model_copy(update={"device": "Another"})})
    [alone] = problems.find_problems([sweep([wrong])])
    [beside] = problems.find_problems([sweep([wrong]), sweep_of(("n", "b"), [other])])
    assert f", on {sample.CPU.device}: off" in beside.message and sample.CPU.device not in alone.message


def test_a_decode_mistake_is_named() -> None:
    verdict = Verdict(status=Status.WRONG, kind=Kind.FN_AS_FNUZ, summary="half of every value")
    assert sentences([sample.record(sample.case("x", "e4m3fn-row"), verdict)]) == [
        "x on e4m3fn-row, llama2-7b.o/m1/bf16, takes FN codes for FNUZ codes, off by a factor of 2: half of every "
        "value."
    ]


def test_causes_with_the_same_words_are_one_whichever_implementation_met_them() -> None:
    verdicts = [Verdict(status=Status.ERROR, summary=f"raised RuntimeError: no kernel at 0x{address:x}")
                for address in (4096, 81920)]
    found = sentences([sample.record(sample.case(name), verdict)
                       for name, verdict in zip(("a", "b"), verdicts, strict=True)])
    assert found == [
        "each of a and b on e4m3fn-row raises an error, in 2 of 2 cases: raised RuntimeError: no kernel at 0x1000."]


def test_different_mistakes_of_one_implementation_are_different_sentences() -> None:
    kinds = (Kind.NIBBLE_SWAP, Kind.SIGN_LOST)
    found = sentences([sample.record(sample.case("x", scheme), Verdict(status=Status.WRONG, kind=kind))
                       for kind, scheme in zip(kinds, ("mxfp4", "e4m3fn-row"), strict=True)])
    assert len(found) == 2


def test_a_slow_case_says_how_slow_and_what_holds_it_back() -> None:
    slow = sample.record(sample.case("x", "e5m2-row"), speedup=1 / 12, flags=(Flag.UNFUSED,))
    assert len(sentences([slow])) == 1
    assert sentences([slow])[0].startswith(
        f"x runs e5m2-row 12× slower than dense bf16 at M=1 (llama2-7b.o) on {slow.machine.device} and is not fused: "
        "writes the decoded weight to memory and reads it back (34 MB of scratch); takes 3 kernels")


def test_a_case_within_its_noise_of_dense_is_not_called_slow() -> None:
    even = sample.record(sample.case("x", "e5m2-row"), speedup=0.999)
    even = even.model_copy(update={"timing": even.timing.model_copy(update={"speedup_ci95": (0.98, 1.01)})})
    assert sentences([even]) == []


def test_dense_is_no_finding_against_itself() -> None:
    assert sentences([sample.record(sample.case("dense", "bf16"), speedup=0.9)]) == []


def test_a_number_above_the_roofline_is_called_a_measurement_error() -> None:
    card = sample.GPU.model_copy(update={"read_gb_per_s": 672.0})
    impossible = sample.record(sample.case("x", "e4m3fn-row"), speedup=3.12, machine=card, flags=(Flag.OVER_ROOFLINE,))
    [said] = sentences([impossible])
    assert re.search(
        r"shows 10\d\d GB/s on a machine whose memory reads 672 GB/s: a number above the roofline is a measurement "
        r"error", said)


def test_a_slow_dense_product_is_no_merit_of_the_kernel() -> None:
    [said] = sentences([sample.record(sample.case("x", "e4m3fn-row"), speedup=2.58, flags=(Flag.SLOW_BASELINE,))])
    assert "shows 2.58x dense: the dense product was slow" in said


@pytest.mark.parametrize("flag", [Flag.OVER_ROOFLINE, Flag.SLOW_BASELINE, Flag.SHARED_DEVICE])
def test_an_impossible_figure_never_leads_a_ranking(flag: Flag) -> None:
    impossible = sample.record(sample.case("x"), speedup=9.0, flags=(flag,))
    honest = sample.record(sample.case("y"), speedup=1.5)
    [choice] = sweep([impossible, honest]).choices
    assert choice.fastest[1].case.implementation == "y"


def test_an_implementation_that_is_wrong_anywhere_is_no_choice_for_the_scheme() -> None:
    wrong_elsewhere = sample.record(sample.case("x", workload="canary.codes", n=64, k=256),
                                    Verdict(status=Status.WRONG))
    records = [sample.record(sample.case("x"), speedup=9.0), wrong_elsewhere,
               sample.record(sample.case("y"), speedup=1.5)]
    [choice] = sweep(records).choices
    assert choice.fastest[1].case.implementation == "y" and choice.broken == ("x",)


@pytest.mark.parametrize(("summary", "reason"), [
    ("supports int8-row+int8-row only, not int8-row", "supports int8-row+int8-row only, not this scheme"),
    ("supports scales by row, not blocks of 32 (int8-row)", "supports scales by row, not blocks of 32")])
def test_a_reason_names_the_scheme_only_where_it_stands_alone(summary: str, reason: str) -> None:
    refused = sample.record(sample.case("x", "int8-row"), Verdict(status=Status.UNSUPPORTED, summary=summary))
    assert sweep([refused]).rows[0].refusal == reason


@pytest.mark.parametrize("status", [Status.UNSUPPORTED, Status.MISSING])
def test_a_case_that_is_refused_says_nothing_of_the_others(status: Status) -> None:
    refused = sample.record(sample.case("x", workload="canary.codes", n=64, k=256), Verdict(status=status))
    swept = sweep([sample.record(sample.case("x"), speedup=1.5), refused])
    assert [choice.right for choice in swept.choices] == [("x",)]
    assert swept.matrix["x", "e4m3fn-row"].worst is Status.OK
    assert sweep([refused]).matrix["x", "e4m3fn-row"].worst is status


def test_the_best_choices_are_faster_than_dense_and_each_more_accurate_than_the_one_before() -> None:
    def timed(scheme: str, speedup: float, sqnr_db: float):
        one = sample.record(sample.case("x", scheme), speedup=speedup)
        return one.model_copy(update={"accuracy": one.accuracy.model_copy(update={"sqnr_db": sqnr_db}),
                                      "timing": one.timing.model_copy(update={"speedup": speedup})})

    swept = sweep([timed("mxfp4", 3.0, 18.8), timed("nvfp4", 2.5, 20.4), timed("e2m1-row", 2.4, 18.5),
                   timed("e4m3fn-row", 1.5, 31.5),
                   timed("e4m3fn-g128", 1.4, 31.9), timed("int8-row", 0.9, 41.2)])
    assert [row.case.scheme for row in swept.best_choices(1)] == ["mxfp4", "nvfp4", "e4m3fn-row"]
    assert swept.choice_message == (
        f"{sample.CPU.device}, M=1, speed over dense: mxfp4 (x) 3.00× at 18.8 dB SQNR; nvfp4 (x) 2.50× at 20.4 dB "
        f"SQNR; "
                                    "e4m3fn-row (x) 1.50× at 31.5 dB SQNR")
    assert "dense: no correct implementation of any scheme is faster" in sweep(
        [timed("mxfp4", 0.9, 18.8)]).choice_message
    assert sweep([sample.record(sample.case("x"), Verdict(status=Status.WRONG))]).choice_message == ""
    wrong_elsewhere = sample.record(sample.case("x", workload="canary.codes", n=64, k=256),
                                    Verdict(status=Status.WRONG))
    assert "correct in all its cases" in sweep([timed("mxfp4", 3.0, 18.8)]).without_choice(16)
    assert sweep([sample.record(sample.case("x"), speedup=1.5), wrong_elsewhere]).best_choices(1) == []


def test_no_scheme_to_choose_is_beaten_in_both_numbers_that_are_shown() -> None:
    def timed(scheme: str, speedup: float, interval: tuple[float, float], sqnr_db: float):
        one = sample.record(sample.case("x", scheme), speedup=speedup)
        return one.model_copy(update={"accuracy": one.accuracy.model_copy(update={"sqnr_db": sqnr_db}),
                                      "timing": one.timing.model_copy(update={"speedup_ci95": interval})})

    steady, better = timed("nvfp4", 1.74, (1.73, 1.75), 20.4), timed("e3m2-row", 1.77, (1.70, 1.80), 25.6)
    assert [row.case.scheme for row in sweep([steady, better]).best_choices(1)] == ["e3m2-row"]

    wide = timed("e3m2-row", 56.9, (1.2, 185.0), 18.0)
    swept = sweep([steady, wide])
    assert [row.case.scheme for row in swept.best_choices(1)] == ["nvfp4"], "it ranks by 1.2"
    assert sweep([wide]).choice_message.endswith("e3m2-row (x) ≥ 1.20× at 18.0 dB SQNR")


def test_a_noisy_timing_ranks_by_no_more_than_it_shows() -> None:
    def timed(name: str, scheme: str, speedup: float, low: float, high: float):
        one = sample.record(sample.case(name, scheme), speedup=speedup)
        return one.model_copy(update={"timing": one.timing.model_copy(update={"speedup_ci95": (low, high)})})

    noisy = timed("x", "mxfp4", 56.9, 0.18, 185.0)
    alone = sweep([noisy])
    assert alone.best_choices(1) == [] and "1 of 1 are not clearly slower either" in alone.choice_message
    assert "dense: no scheme is faster by more than the timing noise" in alone.choice_message

    beside = sweep([noisy, timed("y", "mxfp4", 1.5, 1.4, 1.6)])
    assert [row.case.implementation for row in beside.best_choices(1)] == ["y"]

    cell = sweep([noisy.model_copy(update={"flags": [Flag.NOISY]})]).matrix["x", "mxfp4"]
    assert cell.noisy and cell.speedup is None

    slow = [timed(name, scheme, 0.5, 0.4, 0.6)
            for name, scheme in (("a", "mxfp4"), ("b", "nvfp4"), ("c", "e4m3fn-row"))]
    every = "dense bf16 is faster than every correct implementation of "
    assert any(every + "3 of 3 schemes" in one for one in sentences(slow))
    assert any(every + "2 of 3 schemes" in one for one in sentences([*slow, noisy])), "of mxfp4 it is not certain"


def test_schemes_stand_in_one_order_whatever_was_measured_of_them() -> None:
    names = ["bf16", "e4m3fn-row", "int8-row", "e3m2-g128", "mxfp6_e2m3", "mxfp4", "nvfp4", "no-such-thing"]
    untimed = [sample.record(sample.case("x", name, workload="canary.seed", n=32, k=32)) for name in names[::-1]]
    timed = [sample.record(sample.case("x", name), speedup=1.5) for name in ("mxfp4", "e4m3fn-row")]
    assert sweep(untimed).schemes == sweep(untimed + timed).schemes == names


def test_what_only_canaries_showed_of_a_scheme_is_said_to_be_theirs_and_dense_is_no_choice() -> None:
    canary = sample.record(sample.case("x", "mxfp4", workload="canary.seed", n=32, k=32))
    of_canary, timed = sweep([sample.record(sample.case("x"), speedup=1.5), canary,
                              sample.record(sample.case("d", "bf16"), speedup=1.0)]).choices[::-1]
    assert of_canary.scheme == "mxfp4" and of_canary.of_canaries and of_canary.bits_per_weight and of_canary.sqnr_db
    assert timed.scheme == "e4m3fn-row" and not timed.of_canaries


def test_every_status_and_flag_has_its_words() -> None:
    assert len({status.meaning for status in Status} | {status.predicate for status in Status}) == 2 * len(Status)
    assert all(flag.seen.endswith(".") for flag in Flag)


def test_a_flag_without_its_figure_is_no_problem_and_stops_nothing() -> None:
    odd = sample.record(sample.case(), flags=(Flag.SLOW_BASELINE,))
    assert odd.timing is None and not any("slow" in each for each in sentences([odd]))
