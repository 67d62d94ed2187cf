"""The tables of models measured on one machine and build: scheme × implementation, with speed and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpxbench.counted import counted
from fpxbench.model.generate_record import GenerationRecord, TextQuality
from fpxbench.model.ranking_record import RankingRecord
from fpxbench.model.recommendation import MixedRecord
from fpxbench.records.record import Build, Flag, Machine
from fpxbench.records.verdict import BROKEN, Status
from fpxbench.reports.model.mixed_table import MixedTable
from fpxbench.reports.model.ranking_table import RankingTable, ranking_tables
from fpxbench.reports.sweep.problems import ReportProblem, Section

FILE = "models.html"


@dataclass(frozen=True)
class ModelRow:
    """One row as a page shows it."""

    record: GenerationRecord
    plain: GenerationRecord | None
    """The unquantized model's record in the same table and mode (eager or compiled)."""

    @property
    def name(self) -> str:
        """``e4m3fn-row, triton_fused compiled``."""
        return f"{self.record.scheme}, {self.record.kernel}"

    @property
    def quality(self) -> TextQuality | None:
        return self.record.quality[0] if self.record.quality else None

    @property
    def tokens_per_s(self) -> float | None:
        return self.record.speed.tokens_per_s if self.record.speed else None

    @property
    def speedup(self) -> float | None:
        """Speed over that of the unquantized model in the same mode and run."""
        speed, plain = self.record.speed, self.plain.speed if self.plain else None
        if speed is None or plain is None or self.record is self.plain:
            return None
        return speed.tokens_per_s / plain.tokens_per_s

    @property
    def possible(self) -> bool:
        """Whether the row has a speed that the memory bandwidth allows."""
        return self.record.speed is not None and Flag.OVER_ROOFLINE not in self.record.flags

    @property
    def roofline_tokens_per_s(self) -> float | None:
        """Tokens per second that the memory allows: batch size times its read bandwidth over the bytes of a step."""
        traffic, bandwidth = self.record.traffic, self.record.machine.read_gb_per_s
        if traffic is None or not bandwidth or not traffic.step_bytes:
            return None
        return self.record.batch * bandwidth * 1e9 / traffic.step_bytes

    @property
    def remark(self) -> str:
        """The failure in a few words; "" for a correct row."""
        record = self.record
        kind = record.diagnosis.kind if record.diagnosis else None
        if record.verdict.status is Status.OK:
            return ""
        return record.verdict.headline + (f", {kind}" if kind and kind != record.verdict.kind else "")


@dataclass(frozen=True)
class ModelTable:
    """One model at one batch size."""

    rows: list[ModelRow]

    @property
    def first(self) -> GenerationRecord:
        return self.rows[0].record

    @property
    def title(self) -> str:
        model = self.first.model
        merged = ", merged projections" if self.first.merged else ""
        return f"{model.name}, {counted(model.layers, 'layer')}, batch {self.first.batch}{merged}"

    @property
    def plain(self) -> list[GenerationRecord]:
        """The unquantized model's rows that have a speed."""
        return [row.record for row in self.rows if row.record is row.plain and row.record.speed is not None]

    @property
    def samples(self) -> list[ModelRow]:
        return [row for row in self.rows if row.record.sample]

    @property
    def waits(self) -> bool:
        """Whether a row was timed with waiting for each token, too."""
        return any(row.record.speed and row.record.speed.waiting_tokens_per_s for row in self.rows)

    @property
    def texts(self) -> list[str]:
        """The names of texts beyond the first."""
        return list(dict.fromkeys(block.text for row in self.rows for block in row.record.quality[1:]))


@dataclass(frozen=True)
class ModelPage:
    """Every table of one machine and build."""

    folder: tuple[str, str]
    machine: Machine
    build: Build
    as_of: str
    tables: list[ModelTable]
    rankings: list[RankingTable]
    mixed: list[MixedTable]

    @property
    def path(self) -> str:
        return f"machines/{self.folder[0]}/{self.folder[1]}/{FILE}"

    @property
    def right(self) -> int:
        """Number of correct rows."""
        return sum(row.record.verdict.status is Status.OK for table in self.tables for row in table.rows)

    @property
    def ran(self) -> int:
        """Number of rows that ran, without those refused or missing."""
        return sum(row.record.verdict.status not in (Status.UNSUPPORTED, Status.MISSING)
                   for table in self.tables for row in table.rows)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys([*(table.first.model.name for table in self.tables),
                                   *(table.first.model.name for table in self.rankings),
                                   *(table.record.model.name for table in self.mixed)]))


def model_page(folder: tuple[str, str], records: Sequence[GenerationRecord],
               ranked: Sequence[RankingRecord] = (), budgets: Sequence[MixedRecord] = ()) -> ModelPage:
    """Return the page of the newest records (at least one) of one machine and build."""
    groups: dict[tuple, list[GenerationRecord]] = {}
    for record in records:
        groups.setdefault((record.model.name, record.model.layers, record.batch, record.merged), []).append(record)
    every: list[GenerationRecord | RankingRecord | MixedRecord] = [*records, *ranked, *budgets]
    newest = max(every, key=lambda record: record.started_at)
    return ModelPage(folder, newest.machine, newest.build, newest.started_at,
                     [_table(group) for group in groups.values()], ranking_tables(ranked),
                     [MixedTable(record) for record in budgets])


def model_problems(pages: Sequence[ModelPage]) -> list[ReportProblem]:
    """Return a problem for each faulty row, and for each row with an impossible speed."""
    problems = []
    for page in pages:
        for table in page.tables:
            for row in table.rows:
                record, where = row.record, f"{table.title}, {row.name}, PyTorch {page.build.label}"
                if record.verdict.status in BROKEN:
                    problems.append(ReportProblem(
                        Section.WRONG, str(record.verdict.status),
                        f"{where}: {record.verdict.headline}: {record.verdict.summary}.", page.path, (),
                        more="The model's table"))
                elif Flag.OVER_ROOFLINE in record.flags and record.traffic is not None:
                    problems.append(ReportProblem(
                        Section.SLOW, str(Flag.OVER_ROOFLINE),
                        f"{where}: {record.traffic.gb_per_s:.0f} GB/s exceeds the memory's bandwidth: a measurement"
                        " error.", page.path, (), more="The model's table"))
    return problems


def _table(records: list[GenerationRecord]) -> ModelTable:
    plain = {record.compiled: record for record in records if record.scheme == "bf16"}
    rows = [ModelRow(record, plain.get(record.compiled)) for record in records]
    return ModelTable(sorted(rows, key=_order))


def _order(row: ModelRow) -> tuple:
    """Return a row's sort key: baselines first, then correct rows by ascending KL divergence, then the rest."""
    record, quality = row.record, row.quality
    kl = quality.kl.mean.value if quality and quality.kl else 0.0
    return not record.is_baseline, record.verdict.status is not Status.OK, kl, record.id
