"""What each Triton build gained and lost, as the support pages show it."""

from __future__ import annotations

from dataclasses import dataclass

from fpxbench.reports.targets.support_table import Support, file_name
from fpxbench.targets.build_diff import CellChange, changes
from fpxbench.targets.matrix import TritonBuild


@dataclass(frozen=True)
class Step:
    """A build against the one before it that could be asked."""

    build: TritonBuild
    before: str
    """Version of the build before; empty for the first."""
    changes: tuple[CellChange, ...]
    page: str
    """File name, beside the support table's; empty for the first."""

    def of(self, verdict: str) -> list[CellChange]:
        """``lost``, ``gained`` or ``other``."""
        return [change for change in self.changes if change.verdict == verdict]

    def cells(self, verdict: str) -> int:
        return sum(len(change.cells) for change in self.of(verdict))


def steps(support: Support) -> list[Step]:
    """One for each build, oldest first."""
    found: list[Step] = []
    taken = {row.page.removesuffix(".html") for row in support.rows}
    before: int | None = None
    for at, build in enumerate(support.matrix.builds):
        if build.unusable or before is None:
            found.append(Step(build, "", (), ""))
        else:
            different = changes(support.matrix, before, support.matrix, at)
            found.append(Step(build, support.matrix.builds[before].triton, tuple(different), f"{file_name(f'triton-{build.triton}', taken)}.html"))
        before = before if build.unusable else at
    return found
