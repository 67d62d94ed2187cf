"""What the rule found is kept, and found again only for exactly what it was given."""

import pytest
from nights import EAGER, FUSED, nights, slower
from sample_records import GPU

from fpxbench.records.store import Store
from fpxbench.regressions import kept_changes, result_changes
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome
from fpxbench.regressions.kept_changes import FILE
from fpxbench.regressions.result_changes import find_changes
from fpxbench.regressions.series_index import NAME


@pytest.fixture
def slowed(tmp_path):
    nights(tmp_path, 40, (FUSED, EAGER), edit=slower(1.08, 34), noise=0.015)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """Return the shapes of series as the rule is asked about them."""
    shapes = []
    really = result_changes.detect
    monkeypatch.setattr(result_changes, "detect", lambda values, *more: shapes.append(values.shape) or really(
        values, *more))
    return shapes


def place(results):
    return results / GPU.name / NAME / FILE


def found(results):
    changes = find_changes(results)
    return changes.suspects, changes.events, changes.machine


def test_who_asks_again_gets_the_same_without_the_rule(slowed, asked):
    first = found(slowed)
    assert first[0] and asked == [(2, 40)]
    assert found(slowed) == first and asked == [(2, 40)]


def answered(results, outcome):
    suspect, = find_changes(results).suspects
    Store(results, Confirmation).append(Confirmation(
        suspect=suspect.id, case=FUSED, metric="time", machine=GPU, good=suspect.surely_good, build=suspect.raised_at,
        outcome=outcome, said="+8.1% [7.0, 9.2]"))


@pytest.mark.parametrize("happens", [
    lambda results, patch: answered(results, ConfirmationOutcome.REFUTED),
    lambda results, patch: nights(results, 1, (FUSED, EAGER), first=40),
    lambda results, patch: patch.setattr(kept_changes, "_rule", lambda: "another")])
def test_the_rule_is_asked_again_where_what_it_is_given_differs(slowed, asked, monkeypatch, happens):
    found(slowed)
    happens(slowed, monkeypatch)
    asked.clear()
    again = found(slowed)
    assert len(asked) == 1
    place(slowed).unlink()
    assert found(slowed) == again, "what is kept says what the rule says"


def test_a_confirmation_that_refutes_nothing_changes_the_outcome_and_asks_no_rule(slowed, asked):
    answered(slowed, ConfirmationOutcome.CONFIRMED)
    asked.clear()
    assert find_changes(slowed).suspects[0].outcome is ConfirmationOutcome.CONFIRMED and asked == []


@pytest.mark.parametrize("text", ['{"0123": ', '{"0123": {"suspects": [{"row": "no"}]}}', "[]"])
def test_a_damaged_file_is_made_anew(slowed, asked, text):
    first = found(slowed)
    place(slowed).write_text(text)
    assert found(slowed) == first and len(asked) == 2
    assert found(slowed) == first and len(asked) == 2


def test_where_nothing_can_be_written_the_rule_is_asked_each_time(tmp_path, asked):
    nights(tmp_path, 40, (FUSED,), edit=slower(1.08, 34), noise=0.015)
    (tmp_path / GPU.name / NAME).write_text("a file in the folder's place")
    assert found(tmp_path) == found(tmp_path) and len(asked) == 2


def test_what_is_of_builds_before_is_not_kept(slowed):
    found(slowed)
    nights(slowed, 1, (FUSED, EAGER), first=40)
    found(slowed)
    assert place(slowed).read_text().count('"suspects"') == 1
