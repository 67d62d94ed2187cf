"""The decision rule (docs/decision-rule.md), on made-up series: what it finds, what it does not, and that it stands by
what it said."""

import numpy as np
import pytest

from fpxbench.regressions import evaluation, recorded_series as recorded, synthetic
from fpxbench.regressions.decision_rule import LEAST_CHANGE, detect, level_and_noise


def series(builds=60, noise=0.02, seed=1, rows=1):
    """Return noise. One draw in ten raises a suspect by itself, as it should; that of this seed does not."""
    return np.exp(np.random.default_rng(seed).normal(0, noise, (rows, builds)))


def stepped(at, factor, **more):
    values = series(**more)
    values[:, at:] *= factor
    return values


def suspects(values, control=None, **more):
    return [change for change in detect(values, control, **more) if not change.machine]


# ---- what is found


@pytest.mark.parametrize("at", [30, 41, 50])
def test_a_tenth_more_time_is_found_at_its_build_within_four(at):
    change, = suspects(stepped(at, 1.10, noise=0.01))
    assert (change.first, change.last_before) == (at, at - 1)
    assert change.surely_before < at <= change.raised <= at + 3
    assert change.size == pytest.approx(np.log(1.10), abs=3 * change.error)
    assert change.z > 0


def test_a_twentieth_at_2_percent_noise_is_found_within_5_builds_in_95_of_100_series():
    found = evaluation.EvaluationRun("rule + confirmation", 1000, seed=8, step=0.05, noise=0.02).detection()
    assert found.within[-1] > 0.94      # 0.96 is measured, with a standard error of 0.007
    assert found.placed > 0.6


def test_less_time_is_found_too_and_its_direction_told():
    change, = suspects(stepped(40, 0.9, noise=0.01))
    assert change.first == 40 and change.z < 0 and change.size < 0


def test_a_change_is_found_once_and_the_change_back_is_another():
    values = stepped(40, 1.1, builds=80, noise=0.01)
    values[:, 50:] /= 1.1
    assert [(change.first, np.sign(change.size)) for change in suspects(values)] == [(40, 1), (50, -1)]


def test_builds_without_a_time_are_no_points_and_columns_stay_those_of_the_builds():
    values = stepped(40, 1.1, noise=0.01)
    values[0, [3, 17, 39, 40]] = np.nan
    change, = suspects(values)
    assert (change.first, change.last_before) == (41, 38)


def test_each_series_is_read_by_itself():
    values = stepped(40, 1.1, rows=5, noise=0.01)
    values[2] = np.nan
    values[4, 30:] = np.nan
    alone = [[(change.first, change.z) for change in detect(values[row:row + 1])] for row in range(5)]
    together = detect(values)
    assert alone == [[(change.first, change.z) for change in together if change.row == row] for row in range(5)]
    assert [len(found) for found in alone] == [1, 1, 0, 1, 0]


def test_a_z_score_alarms_on_quiet_series_where_the_rule_with_confirmation_does_not():
    alarms = {name: evaluation.EvaluationRun(name, 300, seed=8, builds=365).false_alarms().per_1000
              for name in ("z-score", "rule + confirmation")}
    assert alarms["z-score"] > 1000 and alarms["rule + confirmation"] < 10


# ---- what is not


def unquiet(builds=60):
    """Return ±2% by turns: noise in which nothing stands out."""
    return np.exp(0.02 * (-1.0) ** np.arange(builds))[None, :]


@pytest.mark.parametrize("factor", [1.2, 2, 100, 0.5])
def test_one_slow_build_is_no_change_however_slow_it_is(factor):
    values = np.repeat(unquiet(), 60, axis=0)
    values[np.diag_indices(60)] *= factor       # in each series another build
    assert not suspects(values)


def test_without_the_bound_on_a_points_say_a_single_one_would_do(monkeypatch):
    monkeypatch.setattr("fpxbench.regressions.decision_rule.CLIP", 1e9)
    monkeypatch.setattr("fpxbench.regressions.decision_rule.PERSISTENT", -1e9)
    monkeypatch.setattr("fpxbench.regressions.decision_rule.LEAST_CHANGE", -1e9)
    values = unquiet()
    values[0, 40] *= 2
    assert suspects(values)


def test_what_the_baseline_did_too_is_the_machine():
    values, control = stepped(40, 1.1, noise=0.01), stepped(40, 1.1, noise=0.01, seed=4)
    change, = detect(values, control)
    assert change.machine and change.control == pytest.approx(np.log(1.1), abs=0.03)


def test_what_the_baseline_did_not_do_is_the_case():
    change, = detect(stepped(40, 1.1, noise=0.01), series(noise=0.01, seed=4))
    assert not change.machine and abs(change.control) < 0.03


def test_a_case_that_slows_down_more_than_the_machine_is_a_suspect():
    change, = detect(stepped(40, 1.2, noise=0.01), stepped(40, 1.05, noise=0.01, seed=4))
    assert not change.machine


def test_too_small_a_change_is_not_reported_however_sure():
    assert not suspects(stepped(40, 1 + LEAST_CHANGE / 2, noise=0.0005))
    assert suspects(stepped(40, 1 + LEAST_CHANGE * 2, noise=0.0005))


def test_a_series_that_is_too_young_has_no_noise_to_compare_with():
    assert not detect(stepped(20, 1.5, builds=24))


def test_a_clock_that_ticks_is_not_taken_for_exactness():
    values = np.full((1, 60), 1.0)
    assert not detect(values)
    values[0, 40:] = 1.001
    assert not detect(values)


def test_what_a_series_does_all_the_time_is_usual_for_it():
    """A case that goes between two levels of its own: once that is its history, it is no finding any more."""
    levels = np.where(np.arange(365) // 4 % 2, 1.08, 1.0)
    changes = suspects(series(builds=365) * levels)
    assert not [change for change in changes if change.raised > 100]


def test_level_and_noise_are_mean_and_deviation_and_a_spike_hardly_moves_them():
    clean = np.random.default_rng(3).normal(5, 2, (400, 30))
    level, noise, count = level_and_noise(clean)
    assert np.abs(level - clean.mean(axis=1)).max() < 0.5
    assert noise.mean() == pytest.approx(2, rel=0.05)
    spiked = clean.copy()
    spiked[:, 7] = 1e6
    assert np.abs(level_and_noise(spiked)[0] - level).max() < 1.0
    gaps = np.hstack([clean, np.full((400, 4), np.nan)])
    assert all(np.allclose(one, other) for one, other in zip(level_and_noise(gaps), (level, noise, count), strict=True))


# ---- it stands by what it said


def test_what_was_found_does_not_depend_on_what_is_measured_later():
    case, baseline = synthetic.two_levels(40, 120, 0.02, np.random.default_rng(11))
    case[::3, 70:] *= 1.07
    whole = detect(case, baseline)
    assert len(whole) > 40
    for builds in (60, 75, 90):
        assert detect(case[:, :builds], baseline[:, :builds]) == [change for change in whole if change.raised < builds]


def test_a_refuted_change_leaves_the_level_where_it_was():
    values = series(noise=0.01)
    values[:, 40:44] *= 1.1       # four slow nights, and a rerun that finds nothing
    values[:, 48:] *= 1.1
    assert [change.first for change in detect(values, believe=lambda change: change.first > 44)] == [40, 48]


def test_what_is_refuted_twice_is_how_it_is_measured_there_now_and_is_not_found_for_ever():
    found = detect(stepped(40, 1.1, builds=120, noise=0.01), believe=lambda change: False)
    assert [change.first for change in found[:1]] == [40] and len(found) == 2


# ---- the evaluation


@pytest.mark.parametrize("kind", list(synthetic.FLAT))
def test_nothing_is_confirmed_where_nothing_changed(kind):
    flat = evaluation.EvaluationRun("rule + confirmation", 60, seed=9, kind=kind, builds=365).false_alarms()
    assert flat.per_1000 == 0
    assert evaluation.EvaluationRun("rule", 60, seed=9, kind=kind, builds=365).false_alarms().per_1000 < 1500


def test_a_confirmation_finds_what_is_there_and_refutes_what_is_not():
    rng = np.random.default_rng(2)
    assert sum(evaluation.rerun(np.log(1.05), 0.05, 0.02, rng) for _ in range(100)) >= 98
    assert sum(evaluation.rerun(0.0, 0.05, 0.02, rng) for _ in range(300)) == 0


def test_asv_finds_large_steps_and_few_small_ones():
    large = evaluation.EvaluationRun("asv", 20, seed=9, step=0.10, noise=0.01).detection()
    small = evaluation.EvaluationRun("asv", 20, seed=9, step=0.05, noise=0.02).detection()
    assert large.within[-1] > 0.8 and small.within[-1] < 0.3


def test_otava_is_asked_in_the_same_way():
    pytest.importorskip("otava")
    assert evaluation.EvaluationRun("Otava", 20, seed=9, step=0.10, noise=0.01).detection().within[-1] > 0.9


def test_every_detector_is_put_to_the_same_series(monkeypatch):
    seen = []
    for name in ("one", "another"):
        monkeypatch.setitem(evaluation.DETECTORS, name, lambda times, *_: seen.append(times) or [])
        evaluation.EvaluationRun(name, 10, seed=3, kind="slow drift", builds=35).false_alarms()
    assert np.array_equal(seen[0], seen[1])


def test_a_step_claimed_too_early_too_far_off_or_as_an_improvement_is_not_found(monkeypatch):
    claims = [
        evaluation.Alarm(0, 30, 31, True),
        evaluation.Alarm(1, 30, 31, False),
        evaluation.Alarm(2, 20, 31, True),
        evaluation.Alarm(3, 28, 29, True),
    ]
    monkeypatch.setitem(evaluation.DETECTORS, "claimant", lambda *_: claims)
    found = evaluation.EvaluationRun("claimant", 4, seed=1, step=0.05).detection()
    assert found.within == (0, 0.25, 0.25, 0.25, 0.25) and found.placed == 1


# ---- recorded series


def test_recorded_series_are_times_of_one_build_each_with_its_baseline():
    known = recorded.recordings()
    assert len(known) >= 4 and len({one.build for one in known}) == 1
    for one in known:
        assert len(one.times_us) == len(one.baseline_us) >= synthetic.BEFORE + synthetic.AFTER
        assert (one.times_us > 0).all() and (one.baseline_us > 0).all()
        assert len(set(one.times_us.tolist())) > 10        # measured, not repeated


@pytest.mark.parametrize("where", recorded.places())
def test_a_window_is_what_was_recorded_and_takes_the_step_from_the_31st_run_on(where):
    flat, stepped = recorded.windows(where, 0.0), recorded.windows(where, 0.10)
    there = [one for one in recorded.recordings() if one.where == where]
    builds = synthetic.BEFORE + synthetic.AFTER
    assert flat[0].shape == (sum(len(one.times_us) - builds + 1 for one in there), builds)
    first = there[0].times_us[:builds]
    assert np.allclose(flat[0][0] * np.median(first), first)
    assert np.array_equal(flat[1], stepped[1]) and np.array_equal(flat[0][:, :30], stepped[0][:, :30])
    assert np.allclose(stepped[0][:, 30:] / flat[0][:, 30:], 1.1)


@pytest.mark.parametrize("where", recorded.places())
def test_the_rule_is_put_to_recorded_series_as_to_made_up_ones(where):
    real = [one for one in evaluation.evaluation_runs(10, ["rule"]) if one.kind == where]
    assert [one.step for one in real] == [0.0, *synthetic.STEPS]
    quiet, large = real[0].run(), real[-1].run()
    assert quiet.series == large.series == len(recorded.windows(where, 0.0)[0])
    assert large.noise == recorded.noise(where)
    assert quiet.per_1000 >= 0 and list(large.within) == sorted(large.within)
