"""No planted mistake is taken for another, alone or two at once: a sample of `python -m tests.confusion`, whose tables docs/diagnosis.md holds."""

from __future__ import annotations

import pytest
from confusion import NAMED, PART, UNSEEN, WRONG, matrix, outcome_of, pair_table, pairs, singles
from places import DOCS
from planting import Plant, plants

from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

SINGLES = [(scheme, planted) for number, (scheme, planted) in enumerate(
    (scheme, planted) for scheme in ("e4m3fn-row", "e5m2-g32", "mxfp6_e3m2", "mxfp4", "nvfp4", "int8-row") for planted in singles(scheme))
    if number % 4 == 0]
PAIRS = [(scheme, planted) for scheme, every in (("e4m3fn-row", 37), ("mxfp6_e2m3", 41), ("nvfp4", 37))
         for number, planted in enumerate(pairs(scheme)) if number % every == 7]


def label(value) -> str:
    if isinstance(value, str):
        return value
    return " and ".join(f"{plant.about}{' when stored' if plant.storing else ''}" for plant in value)


@pytest.mark.parametrize(("scheme", "planted"), SINGLES, ids=label)
def test_a_planted_mistake_is_named(scheme, planted) -> None:
    found = outcome_of(scheme, planted, shape=(33, 40, 104))
    assert found.outcome == NAMED, found


@pytest.mark.parametrize(("scheme", "planted"), PAIRS, ids=label)
def test_of_two_mistakes_at_once_both_are_named_or_none_is_claimed(scheme, planted) -> None:
    found = outcome_of(scheme, planted, shape=(33, 40, 104))
    assert found.outcome != WRONG, found


@pytest.mark.parametrize("activation", ["bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["e4m3fn-tensor", "e3m2-g32", "mxfp4"])
def test_a_sweep_names_no_mistake_that_was_not_made(scheme, activation) -> None:
    """It has the case's own N(0, 1) weight to go by, on which some mistakes make no difference."""
    for planted in list(singles(scheme))[::4]:
        found = outcome_of(scheme, planted, shape=(16, 48, 160), activation=activation, sweep=True)
        assert found.outcome in (NAMED, UNSEEN), found


def test_a_wrong_name_would_be_counted() -> None:
    """A plant that says it is another mistake than the one that it makes stands off the diagonal."""
    mislabelled = Plant(Kind.TIES_AWAY, "no scale", {"no_scale": True})
    found = outcome_of("mxfp4", (mislabelled,), shape=(33, 40, 104))
    assert (found.outcome, found.said) == (WRONG, "scale_missing")
    assert "| 1 `ties_away` | 1 |" in matrix([found])
    assert "| mxfp4 | 1 | · | · | · | · | 1 |" in pair_table([found])
    pair = (mislabelled, Plant(Kind.SIGN_LOST, "sign dropped", {"sign_lost": True}))
    assert outcome_of("mxfp4", pair, shape=(33, 40, 104)).outcome == WRONG


def test_one_of_two_is_enough_where_the_other_leaves_no_trace() -> None:
    by_about = {plant.about: plant for plant in plants(scheme_named("mxfp4"))}
    found = outcome_of("mxfp4", (by_about["no scale"], by_about["grid transposed"]), shape=(33, 40, 104))
    assert (found.outcome, found.said) == (PART, "scale_missing")


def test_every_kind_that_a_weight_can_show_is_planted() -> None:
    planted = {plant.kind for scheme in ("e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "mxfp8_e5m2", "mxfp8_e4m3fn", "mxfp6_e3m2", "nvfp4", "int8-row")
               for plant in plants(scheme_named(scheme))}
    of_calls_and_sums = {Kind.WRONG_SHAPE, Kind.WRONG_DTYPE, Kind.UNWRITTEN_OUTPUT, Kind.STALE_OUTPUT, Kind.INPUT_MODIFIED,
                         Kind.NOT_REPEATABLE, Kind.CONFIG_DEPENDENT, Kind.GIBBERISH, Kind.INACCURATE}      # tests/faulty_impls
    of_compilers = {kind for kind in Kind if kind.startswith("unsupported_")} | {
        Kind.ASSEMBLER_ERROR, Kind.COMPILER_ABORT, Kind.PASS_FAILED, Kind.EMPTY_OBJECT}
    assert planted == set(Kind) - of_calls_and_sums - of_compilers


def test_the_tables_in_the_docs_hold_no_wrong_name() -> None:
    text = (DOCS / "diagnosis.md").read_text()
    assert text.count(" 0 wrong names") >= 2
    assert WRONG in text        # as the column that is empty
