"""The gains and losses of each Triton build."""

from __future__ import annotations

from dataclasses import dataclass

from fpxbench.reports.targets.support_table import SupportMatrix, file_name
from fpxbench.targets.build_diff import CellChange, changes
from fpxbench.targets.matrix import TritonBuild


@dataclass(frozen=True)
class BuildDiff:
    """A build compared with the last usable one before it."""

    build: TritonBuild
    before: str
    """Version of the build before; empty for the first."""
    changes: tuple[CellChange, ...]
    page: str
    """File name of the page, in the folder of the support table; empty for the first."""

    def of(self, verdict: str) -> list[CellChange]:
        """Return the changes with this verdict: ``lost``, ``gained`` or ``other``."""
        return [change for change in self.changes if change.verdict == verdict]

    def cells(self, verdict: str) -> int:
        return sum(len(change.cells) for change in self.of(verdict))


def build_diffs(support: SupportMatrix) -> list[BuildDiff]:
    """Return the comparison of each build, oldest first."""
    found: list[BuildDiff] = []
    used = {row.page.removesuffix(".html") for row in support.rows}
    before: int | None = None
    for at, build in enumerate(support.matrix.builds):
        if build.unusable or before is None:
            found.append(BuildDiff(build, "", (), ""))
        else:
            different = changes(support.matrix, before, support.matrix, at)
            found.append(BuildDiff(build, support.matrix.builds[before].triton, tuple(different),
                                   f"{file_name(f'triton-{build.triton}', used)}.html"))
        before = before if build.unusable else at
    return found
