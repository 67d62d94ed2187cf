"""What changed from build to build, and how sure is that?

`series_index` stores the metrics of each record; `series` arranges them by case and build; `events` finds changes that
need no statistics, `decision_rule` those that do (docs/decision-rule.md); `result_changes` returns both. `confirm` and
`bisect` rerun builds, `compare` reads the records of two; `evaluation` measures how good the rule is.
"""
