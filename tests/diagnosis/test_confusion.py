"""No injected fault is named as another, alone or two at once: a sample of `tests/helpers/confusion_run.py`, whose
tables docs/diagnosis.md holds."""

from __future__ import annotations

import pytest
from confusion import NAMED, PART, UNSEEN, WRONG, outcome_of, pairs, singles
from confusion_run import BEGIN, END, row_of, table, totals
from core import core_of
from injections import Injection, injections
from places import DOCS

from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Group, Kind, Stage

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = ("e4m3fn-row", "e5m2-g32", "mxfp6_e3m2", "mxfp4", "nvfp4", "int8-row")
SAMPLE = [(scheme, injected) for scheme in SCHEMES for injected in singles(scheme)][::4]
SINGLES = {scheme: [one for one in SAMPLE if one[0] == scheme] for scheme in SCHEMES}
SWEPT = {(scheme, activation): list(singles(scheme))[::4]
         for scheme in ("e4m3fn-tensor", "e3m2-g32", "mxfp4") for activation in ("bf16", "fp16")}


def kind_of(injected: tuple[Injection, ...]) -> tuple[Kind, bool]:
    """Return the kind of a single fault, and whether it is made in storing."""
    return injected[0].kind, injected[0].storing


CORE = [one for some in core_of(SINGLES, lambda one: kind_of(one[1]), one_in=24).values() for one in some]
SWEPT_CORE = core_of(SWEPT, kind_of, one_in=8)
PAIRS = [(scheme, injected) for scheme, every in (("e4m3fn-row", 37), ("mxfp6_e2m3", 41), ("nvfp4", 37))
         for number, injected in enumerate(pairs(scheme)) if number % every == 7]


def label(value) -> str:
    if isinstance(value, str):
        return value
    return " and ".join(f"{injection.about}{' when stored' if injection.storing else ''}" for injection in value)


def test_the_core_has_every_kind_and_every_scheme() -> None:
    assert {kind_of(injected) for _, injected in CORE} == {
        kind_of(injected) for each in SINGLES.values() for _, injected in each}
    assert {scheme for scheme, _ in CORE} == set(SINGLES)
    assert {kind_of(injected) for some in SWEPT_CORE.values() for injected in some} == {
        kind_of(injected) for each in SWEPT.values() for injected in each}
    assert all(SWEPT_CORE.values())


@pytest.mark.parametrize(("scheme", "injected"), [
    pytest.param(*one, marks=() if one in CORE else pytest.mark.slow) for each in SINGLES.values() for one in each
], ids=label)
def test_an_injected_fault_is_named(scheme, injected) -> None:
    found = outcome_of(scheme, injected, shape=(33, 40, 104))
    assert found.outcome == NAMED, found


@pytest.mark.parametrize(("scheme", "about", "shape"), [
    ("e4m3fn-b128x128", "grid transposed", (33, 300, 400)), ("e4m3fn-b128x128", "scale squared", (33, 300, 400)),
    ("e2m1-nv16x16", "no tensor scale", (33, 77, 203)), ("nvfp4.div", "divided by the tensor scale", (33, 77, 203)),
])
def test_a_fault_of_scales_is_named_in_two_dimensions_and_under_reciprocal_scales(scheme, about, shape) -> None:
    injected = [each for each in singles(scheme) if each[0].about == about]
    assert len(injected) == 1 and injected[0][0].kind.group is Group.SCALES
    found = outcome_of(scheme, injected[0], shape=shape)
    assert found.outcome == NAMED, found


@pytest.mark.parametrize(("scheme", "injected"), [
    pytest.param(*one, marks=pytest.mark.slow if number % 4 else ()) for number, one in enumerate(PAIRS)
], ids=label)
def test_of_two_faults_at_once_both_are_named_or_none_is_claimed(scheme, injected) -> None:
    found = outcome_of(scheme, injected, shape=(33, 40, 104))
    assert found.outcome != WRONG, found


@pytest.mark.parametrize("faults", [SWEPT_CORE, pytest.param(SWEPT, marks=pytest.mark.slow)], ids=["core", "all"])
@pytest.mark.parametrize(("scheme", "activation"), SWEPT)
def test_a_sweep_names_no_fault_that_was_not_injected(scheme, activation, faults) -> None:
    """It has the case's own N(0, 1) weight to go by, on which some faults make no difference."""
    for injected in faults[scheme, activation]:
        found = outcome_of(scheme, injected, shape=(16, 48, 160), activation=activation, sweep=True)
        assert found.outcome in (NAMED, UNSEEN), found


def test_a_wrong_name_would_be_counted() -> None:
    """A injection that says it is another fault than the one that it makes stands off the diagonal."""
    mislabelled = Injection(Kind.TIES_AWAY, "no scale", {"no_scale": True})
    found = outcome_of("mxfp4", (mislabelled,), shape=(33, 40, 104))
    assert (found.outcome, found.said) == (WRONG, "scale_missing")
    rows = [row_of("inspect", found)]
    assert "| `ties_away` | 0 of 1, 1 WRONG NAME scale_missing |" in table(rows)
    assert "| `inspect` | 1 | 1 | · | · | · | · | 1 |" in totals(rows) and "1 injected, 1 wrong names" in totals(rows)
    pair = (mislabelled, Injection(Kind.SIGN_LOST, "sign dropped", {"sign_lost": True}))
    assert outcome_of("mxfp4", pair, shape=(33, 40, 104)).outcome == WRONG


def test_one_of_two_is_enough_where_the_other_leaves_no_trace() -> None:
    by_about = {injection.about: injection for injection in injections(scheme_named("mxfp4"))}
    found = outcome_of("mxfp4", (by_about["no scale"], by_about["grid transposed"]), shape=(33, 40, 104))
    assert (found.outcome, found.said) == (PART, "scale_missing")


def test_every_kind_that_a_weight_can_show_is_injected() -> None:
    injected = {
        fault.kind
        for scheme in ("e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "mxfp8_e5m2", "mxfp8_e4m3fn", "mxfp6_e3m2", "nvfp4",
                       "int8-row")
        for fault in injections(scheme_named(scheme))
    }
    # test_random_maps.py
    by_random_maps = {Kind.CODE_PERMUTED, Kind.SCALE_PERMUTED, Kind.SCALE_MISREAD, Kind.WEIGHT_TRANSPOSED}
    by_cases = {Kind.SCALE_PADDING_READ, Kind.ZERO_BLOCK, Kind.ROUNDING_BIASED}       # tests/cases
    of_experts = {Kind.EXPERT_BOUNDARY, Kind.EXPERT_MISTAKEN, Kind.EMPTY_EXPERT}    # tests/sweep/test_faulty_impls.py
    of_weights = {kind for kind in Kind if kind.emitted_by & (Stage.PRODUCT | Stage.STORED)
                  and kind.group not in (Group.RESULT, Group.CALL, Group.ACTIVATIONS)}
    assert injected == of_weights - by_random_maps - by_cases - of_experts


def test_the_tables_in_the_docs_hold_no_wrong_name() -> None:
    text = (DOCS / "diagnosis.md").read_text()
    written = text.partition(BEGIN)[2].partition(END)[0]
    assert " injected, 0 wrong names." in written
    assert written.count(WRONG) == 1        # as the column that is empty
    assert "activations" in written and "two at once" in written
