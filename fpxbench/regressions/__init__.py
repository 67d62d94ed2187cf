"""What changed from build to build, and how sure is that?

`series_index` stores the metrics of each record that series need; `series` arranges them by case and build; `events`
finds changes that need no statistics, `detector` those that do (docs/decision-rule.md); `result_changes` returns both.
`confirm` and `bisect` run builds again, `compare` reads two; `evaluation` measures how good the rule is.
"""
