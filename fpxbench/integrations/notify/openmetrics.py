"""The newest records of every machine as OpenMetrics text, for Prometheus' textfile collector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fpxbench.integrations.notify.delivery import MissingPackage
from fpxbench.records.record import Record
from fpxbench.regressions.change_report import ChangeReport
from fpxbench.regressions.movements import Movement

_OF_CASE = ("machine", "device", "variant", "channel", "implementation", "scheme", "workload", "m", "activation")


def openmetrics(records: Iterable[Record], moved: Sequence[Movement]) -> str:
    """Return the records and the counts of movements by cause. Raise MissingPackage without prometheus-client."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.openmetrics.exposition import generate_latest
    except ImportError:
        raise MissingPackage("--openmetrics: prometheus-client is missing: pip install 'fpxbench[notify]'") from None

    class Newest:
        def collect(self) -> Iterator:
            yield from _families(list(records), moved)

    registry = CollectorRegistry()
    registry.register(Newest())
    return generate_latest(registry).decode()


def _families(records: list[Record], moved: Sequence[Movement]) -> Iterator:
    from prometheus_client.core import GaugeMetricFamily

    def of_case(name: str, text: str, unit: str, value) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=_OF_CASE, unit=unit)
        for record in records:
            if (number := value(record)) is not None:
                family.add_metric(_labels(record), number)
        return family

    yield of_case("fpxbench_case_time", "Median time of one call.", "seconds",
                  lambda record: record.timing and record.timing.median_us / 1e6)
    yield of_case("fpxbench_case_speedup", "Time of the dense 16-bit product over that of the case.", "ratio",
                  lambda record: record.timing and record.timing.speedup)
    yield of_case("fpxbench_case_energy", "Energy of one call.", "joules",
                  lambda record: record.device_state and record.device_state.joules_per_call)
    status = GaugeMetricFamily("fpxbench_case_status", "1 for the status that the case has.",
                               labels=(*_OF_CASE, "status", "kind"))
    builds = GaugeMetricFamily("fpxbench_build", "The newest build that was measured: always 1.",
                               labels=("machine", "device", "variant", "channel", "torch", "triton"))
    seen = set()
    for record in records:
        status.add_metric((*_labels(record), str(record.verdict.status), str(record.verdict.kind or "")), 1)
        seen.add((*_labels(record)[:4], record.build.torch, record.build.triton or ""))
    for labels in sorted(seen):
        builds.add_metric(labels, 1)
    yield status
    yield builds
    counts = Counter((str(one.cause), str(one.change.direction) if isinstance(one.change, ChangeReport) else "other",
                      "yes" if one.calls else "no") for one in moved)
    movements = GaugeMetricFamily("fpxbench_movements", "What changed, by cause.",
                                  labels=("cause", "direction", "calls"))
    for labels, count in sorted(counts.items()):
        movements.add_metric(labels, count)
    yield movements


def _labels(record: Record) -> tuple[str, ...]:
    case, machine, build = record.case, record.machine, record.build
    return (machine.name, machine.device, build.variant, build.channel, case.implementation, case.scheme, case.workload,
            str(case.m), case.activation)
