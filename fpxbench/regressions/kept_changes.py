"""A cache of the rule's findings in a machine's series: a nightly job needs them several times (regressions, confirm,
notify, report), and the rule takes as long as everything else.

``RESULTS/<machine>/.series/changes.json`` may be deleted. Its keys are digests of the rule and all of its input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fpxbench.regressions import decision_rule
from fpxbench.regressions.decision_rule import LevelChange
from fpxbench.regressions.series import Panel
from fpxbench.whole_file import write_whole

FILE = "changes.json"


@dataclass(frozen=True)
class FoundChanges:
    """The changes of one panel's series.

    suspects : in the order in which the rule raised them, refuted ones too
    moves : changes caused by the machine
    """

    suspects: list[LevelChange] = field(default_factory=list)
    moves: list[LevelChange] = field(default_factory=list)


_FILES = TypeAdapter(dict[str, FoundChanges])


class KeptChanges:
    """The cache file of one machine, read on creation; `write` keeps only what this process asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the cache in the folder of the series index."""
        self._place = folder / FILE
        self._asked: dict[str, FoundChanges] = {}
        try:
            self._known = _FILES.validate_json(self._place.read_bytes())
        except (OSError, ValidationError):      # missing or damaged: computed again
            self._known = {}

    def of(self, panel: Panel, metric: str, refuted: Collection[str], find: Callable[[], FoundChanges]) -> FoundChanges:
        """Return the changes of a panel, from the file or from `find`. refuted : ids of refuted changes"""
        key = _digest(panel, metric, refuted)
        self._asked[key] = self._known.get(key) or find()
        return self._asked[key]

    def write(self) -> None:
        """Replace the file if it changed."""
        if self._asked.keys() != self._known.keys():
            with suppress(OSError):     # the index, in the same folder, reports it
                write_whole(self._place, _FILES.dump_json(self._asked))


def _digest(panel: Panel, metric: str, refuted: Collection[str]) -> str:
    builds = [build.key for build in panel.builds]
    given = (panel.machine, panel.device, panel.variant, panel.channel, metric, panel.cases, builds, sorted(refuted))
    total = hashlib.blake2b(f"{_rule()} {given!r}".encode(), digest_size=16)
    for values in (panel.metrics[metric], panel.metrics["baseline_us"]):
        total.update(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes())
    return total.hexdigest()


@cache
def _rule() -> str:
    return hashlib.sha256(Path(decision_rule.__file__).read_bytes() + np.__version__.encode()).hexdigest()
