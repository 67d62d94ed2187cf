"""What changed from build to build, and how sure that is (docs/decision-rule.md).

`digest` keeps the few figures of each record that series need; `series` lays them out by case and build; `events` are changes that
need no statistics, `detector` finds those that do; `findings` is both, worst first.
"""
