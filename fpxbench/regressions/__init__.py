"""What changed from build to build, and how sure is that?

`series_index` keeps the few metrics of each record that series need; `series` lays them out by case and build; `events` are
changes that need no statistics, `detector` finds those that do (docs/decision-rule.md); `examination` returns both.
"""
