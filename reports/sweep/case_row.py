"""One case of a sweep as tables, charts and messages show it: a small row instead of its record."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Flag, Record
from fpxbench.records.verdict import BROKEN, Status
from fpxbench.reports.formatting import joules
from fpxbench.reports.history.status_history import StatusHistory
from fpxbench.reports.words import at_least_something, unquoted
from fpxbench.workloads import is_canary

DOUBTFUL_SPEEDUP = frozenset({Flag.OVER_ROOFLINE, Flag.SLOW_BASELINE, Flag.SHARED_DEVICE})
"""Flags of speedups that do not come from the kernel: they are left out of rankings and charts."""
DENSE_SCHEMES = frozenset({"bf16", "fp16"})

SLOW_BELOW = 0.95
"""A speedup over dense below this counts as slower if it has no confidence interval."""
WIDE_HALF_WIDTH = 0.05
"""A speedup whose 95% interval is wider than ± this fraction of it is ranked by the interval's lower end."""

MAX_PAGE_NAME = 180
"""Longest file name of a case's page in characters: file systems allow 255 bytes, and foreign names can be long."""


@dataclass(frozen=True)
class CaseRow:
    """One case of a sweep."""

    case: Case
    page: str
    """File name of its page, in the sweep's folder."""
    status: Status
    kind: Kind | None
    signal: str | None
    summary: str
    flags: tuple[Flag, ...]
    no_timing: str | None
    median_us: float | None
    baseline_us: float | None
    speedup: float | None
    speedup_ci95: tuple[float, float] | None
    packed_bytes: int | None
    bytes_min: int | None
    gb_per_s: float | None
    read_gb_per_s: float | None
    roofline_fraction: float | None
    bottleneck: str
    sqnr_db: float | None
    about: str
    joules_per_call: float | None = None
    joules_per_gb: float | None = None
    library: str = ""
    """The library that provides the kernel, with its version; empty for the implementation's own."""
    status_history: StatusHistory | None = None
    """None if its build cannot be on the timeline."""

    @classmethod
    def of(cls, record: Record, status_history: StatusHistory | None = None) -> CaseRow:
        timing, traffic, verdict = record.timing, record.traffic, record.verdict
        return cls(
            case=record.case, page=page_of_id(record.case.id), status=verdict.status, kind=verdict.kind,
            signal=verdict.signal, summary=unquoted(" ".join(verdict.summary.split())[:600]),
            flags=tuple(record.flags), no_timing=record.no_timing,
            median_us=timing.median_us if timing else None, baseline_us=timing.baseline_us if timing else None,
            speedup=timing.speedup if timing else None, speedup_ci95=timing.speedup_ci95 if timing else None,
            packed_bytes=traffic.packed_bytes, bytes_min=traffic.bytes_min,
            gb_per_s=traffic.gb_per_s, read_gb_per_s=record.machine.read_gb_per_s,
            roofline_fraction=traffic.roofline_fraction, bottleneck=_bottleneck(record),
            sqnr_db=record.accuracy.sqnr_db, about=record.about,
            joules_per_call=record.device_state.joules_per_call if record.device_state else None,
            joules_per_gb=record.device_state.joules_per_gb if record.device_state else None,
            library=record.properties.library or "", status_history=status_history,
        )

    @property
    def ranked(self) -> bool:
        """Whether its speedup can be compared with others."""
        return self.speedup is not None and DOUBTFUL_SPEEDUP.isdisjoint(self.flags)

    @property
    def energy_message(self) -> str:
        """``1.25 mJ, 74.5 J/GB``; empty if the energy was not measured."""
        if self.joules_per_call is None or self.joules_per_gb is None:
            return ""
        return f"{joules(self.joules_per_call)}, {joules(self.joules_per_gb)}/GB"

    @property
    def is_canary(self) -> bool:
        return is_canary(self.case.workload)

    @property
    def quantized(self) -> bool:
        return self.case.scheme not in DENSE_SCHEMES

    @property
    def broken(self) -> bool:
        return self.status in BROKEN

    @property
    def since(self) -> str:
        """``since 2.12.0 (3 builds)`` for a broken case, else empty."""
        return self.status_history.summary if self.status_history and self.broken else ""

    @property
    def bits_per_weight(self) -> float | None:
        """Measured bits of the stored weight over the number of weights."""
        return 8 * self.packed_bytes / self.case.weights if self.packed_bytes else None

    @property
    def marks(self) -> list[str]:
        """Names by which a filter selects it: its kind, its flags, ``slow``."""
        return [str(mark) for mark in (self.kind, *self.flags) if mark] + (["slow"] if self.slower else [])

    @property
    def refusal(self) -> str:
        """Why it was not run, without the scheme's name, so that "takes int8-row only, not mxfp4" is one reason for all
        schemes. "int8-row+int8-row" does not name int8-row."""
        scheme = re.escape(self.case.scheme)
        reason = re.sub(rf" \({scheme}\)", "", self.summary)
        reason = re.sub(rf"(?<![\w+-]){scheme}(?![\w+-])", "this scheme", reason)
        return reason or str(self.kind or self.status)

    @property
    def times_dense(self) -> float:
        """The speedup. Raise ValueError for a case without one."""
        if self.speedup is None:
            raise ValueError(f"{self.case.id} has no speedup")
        return self.speedup

    @property
    def slower(self) -> bool:
        """Whether it is slower than dense by more than its noise."""
        if self.speedup is None or not self.quantized:
            return False
        return self.speedup_ci95[1] < 1 if self.speedup_ci95 else self.speedup < SLOW_BELOW

    @property
    def certain_speedup(self) -> float:
        """The lower end of the speedup's 95% interval. Raise ValueError for a case without a speedup."""
        return self.speedup_ci95[0] if self.speedup_ci95 else self.times_dense

    @property
    def ranking_speedup(self) -> float:
        """The number for ranking and display, rounded to hundredths: the speedup, or the lower end of its 95% interval
        if that is wider than ±5%. Raise ValueError for a case without a speedup.
        """
        return round(self.certain_speedup if self._wide else self.times_dense, 2)

    @property
    def ranking_text(self) -> str:
        """``1.74×``, or ``≥ 1.01×`` if the lower end of the interval is ranked."""
        return f"{'≥ ' if self._wide else ''}{self.ranking_speedup:.2f}×"

    @property
    def _wide(self) -> bool:
        low, high = self.speedup_ci95 or (self.times_dense, self.times_dense)
        return high - low > 2 * WIDE_HALF_WIDTH * self.times_dense

    @property
    def faster(self) -> bool:
        """Whether it is faster than dense by more than its noise."""
        return self.speedup is not None and self.quantized and self.certain_speedup > 1

    @property
    def hidden_by_noise(self) -> bool:
        """Whether it is noisy, and neither faster nor slower than dense by more than its noise."""
        return Flag.NOISY in self.flags and not self.faster and not self.slower


def _bottleneck(record: Record) -> str:
    """Return what limits a case; nothing if an older record says arithmetic far below the dense product's rate."""
    text, speedup = record.traffic.bottleneck, record.timing.speedup if record.timing else None
    return "" if text.startswith("arithmetic:") and speedup and speedup < 0.5 else at_least_something(text)


def page_of_id(case_id: str) -> str:
    """Return the file name of a case's page: its slug, with a digest if the slug is too long or not unique."""
    slug = case_id.replace("/", "__")
    if len(slug) <= MAX_PAGE_NAME and slug.count("__") == 4:
        return f"{slug}.html"
    digest = hashlib.sha256(case_id.encode()).hexdigest()[:12]
    return f"{slug[:MAX_PAGE_NAME]}-{digest}.html"
