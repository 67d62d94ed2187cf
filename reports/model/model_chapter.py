"""Write the chapter of models: pages of each machine and build, of each machine's history, and of tensor classes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from fpxbench.model.generate_record import GenerationRecord
from fpxbench.model.ranking_record import RankingRecord
from fpxbench.model.recommendation import MixedRecord
from fpxbench.model.tensor_record import TensorOperationRecord
from fpxbench.records.store import BrokenLine, R, Store, folder_of
from fpxbench.reports.model.generation_table import ModelPage, model_page
from fpxbench.reports.model.model_history import MachineModels, machine_histories
from fpxbench.reports.model.tensor_table import TensorPage, tensor_pages

if TYPE_CHECKING:
    from fpxbench.reports.pages import Pages


@dataclass(frozen=True)
class ModelChapter:
    """The written pages, for the pages that link to them.

    broken_lines : lines that are not records
    """

    models: list[ModelPage] = field(default_factory=list)
    histories: list[MachineModels] = field(default_factory=list)
    tensors: list[TensorPage] = field(default_factory=list)
    broken_lines: list[BrokenLine] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.models and not self.tensors

    def of(self, machine: str) -> ModelChapter:
        """Return the part about one machine, the newest build's tensor classes first."""
        return ModelChapter([page for page in self.models if page.folder[0] == machine],
                            [history for history in self.histories if history.name == machine],
                            [page for page in self.tensors[::-1] if page.folder[0] == machine])

    @property
    def newest_tensors(self) -> list[TensorPage]:
        """The page of each machine's newest build."""
        return list({page.folder[0]: page for page in self.tensors}.values())


def write_models(results: Path, pages: Pages, machines: Collection[str]) -> ModelChapter:
    """Write the chapter's pages. `machines` : folders of the machines that have a page"""
    chapter = ModelChapter()
    tables, rankings = Store(results, GenerationRecord), Store(results, RankingRecord)
    mixed = Store(results, MixedRecord)
    files = [*tables.files(), *rankings.files(), *mixed.files()]
    for folder, paths in groupby(sorted(files, key=folder_of), folder_of):
        rows: list[GenerationRecord] = []
        ranked: list[RankingRecord] = []
        budgets: list[MixedRecord] = []
        for path in paths:
            if path.parent.name == RankingRecord.FOLDER:
                ranked = _newest(rankings, path, chapter)
            elif path.parent.name == MixedRecord.FOLDER:
                budgets = _newest(mixed, path, chapter)
            else:
                rows = _newest(tables, path, chapter)
        if rows or ranked or budgets:
            chapter.models.append(model_page(folder, rows, ranked, budgets))
    chapter.histories.extend(machine_histories(chapter.models))
    tensors = Store(results, TensorOperationRecord)
    checked = {folder_of(path): records for path in tensors.files() if (records := _newest(tensors, path, chapter))}
    chapter.tensors.extend(tensor_pages(checked))
    for page in chapter.models:
        pages.write(page.path, pages.models, page, chapter.of(page.folder[0]), page.folder[0] in machines)
    for history in chapter.histories:
        pages.write(history.path, pages.model_history, history, history.name in machines)
    for shown in chapter.tensors:
        pages.write(shown.path, pages.tensors, shown, shown.folder[0] in machines)
    return chapter


def _newest(store: Store[R], path: Path, chapter: ModelChapter) -> list[R]:
    """Return the newest record of each row in a file, and add its broken lines to the chapter."""
    records, broken = store.read_newest(path)
    chapter.broken_lines.extend(broken)
    return records
