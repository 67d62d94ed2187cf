"""Quality of the rule that finds regressions, for asv: `setup_cache` runs `fpxbench detector`, and each metric is a
look-up.

asv treats larger as worse, so missed steps and false alarms are tracked. The series are those of the table in
docs/decision-rule.md, so a metric moves only when the rule does. The profile `smoke` has a sixth of their builds.
"""

from fpxbench.regressions import synthetic
from fpxbench.regressions.evaluation import SEED, EvaluationRun
from fpxbench.sweep.settings import Settings

from .tracking import silent_for, tracked

SERIES = 100
DETECTORS = ["rule", "rule + confirmation"]
STEPS = {
    f"{step:.0%} at {noise:.0%} noise": (step, noise)
    for step, noise in ((0.03, 0.01), (0.05, 0.01), (0.05, 0.02), (0.05, 0.03), (0.10, 0.03))
}
BUILDS = 60 if Settings.from_environment().profile == "smoke" else 365


@silent_for(1800)
def setup_cache() -> dict[str, float]:
    """Run the evaluations; return their metrics by detector and series."""
    metrics = {}
    for detector in DETECTORS:
        for name, (step, noise) in STEPS.items():
            metrics[f"{detector}/{name}"] = (
                1 - EvaluationRun(detector, SERIES, SEED, step=step, noise=noise).detection().within[-1]
            )
        for kind in synthetic.FLAT:
            metrics[f"{detector}/{kind}"] = (
                EvaluationRun(detector, SERIES, SEED, kind=kind, builds=BUILDS).false_alarms().per_1000
            )
    return metrics


@tracked("1", "step", list(STEPS))
def track_missed_by_the_rule(cache, step):
    """Share of steps that the rule does not suspect within 5 builds."""
    return cache[f"rule/{step}"]


@tracked("1", "step", list(STEPS))
def track_missed_after_confirmation(cache, step):
    """Share of steps that are not confirmed within 5 builds."""
    return cache[f"rule + confirmation/{step}"]


@tracked("suspects", "series", list(synthetic.FLAT))
def track_suspects(cache, series):
    """Suspects in 1,000 series in which no case changed."""
    return cache[f"rule/{series}"]


@tracked("alarms", "series", list(synthetic.FLAT))
def track_false_alarms(cache, series):
    """Confirmed suspects in 1,000 series in which no case changed."""
    return cache[f"rule + confirmation/{series}"]
