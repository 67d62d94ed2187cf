"""The core of a product of many cases with many faults: what a run without ``-m slow`` tries."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

Group, Member = TypeVar("Group", bound=Hashable), TypeVar("Member")


def core_of(groups: Mapping[Group, Sequence[Member]], form: Callable[[Member], Hashable], one_in: int,
            ) -> dict[Group, list[Member]]:
    """Return some of each group: one in so many, at other places from group to group, and each of a form that no group
    before has. No group that has members, and no form, is left out."""
    seen: set[Hashable] = set()
    chosen: dict[Group, list[Member]] = {}
    for place, (group, members) in enumerate(groups.items()):
        chosen[group] = []
        for number, member in enumerate(members):
            if (number + place) % one_in == 0 or form(member) not in seen or number == len(members) - 1 \
                    and not chosen[group]:
                chosen[group].append(member)
                seen.add(form(member))
    return chosen


def in_turn(*axes: Sequence[object], one_in: int) -> list[ParameterSet]:
    """Return every combination of the members of `axes` as parameters of a test, all but one in so many marked slow.

    Each member is in a combination that is not, if every other axis has `one_in` members.
    """
    numbered = product(*(enumerate(axis) for axis in axes))
    return [pytest.param(*members, marks=pytest.mark.slow if sum(places) % one_in else ())
            for places, members in (zip(*one, strict=True) for one in numbered)]
