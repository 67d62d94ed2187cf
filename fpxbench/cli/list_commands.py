"""What there is: `fpxbench list`, and what this machine can do with it: `fpxbench doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fpxbench.cli.common import (
    DeviceOption,
    ImplementationOption,
    ImplsOption,
    JsonOption,
    ProfileOption,
    SchemeOption,
    UsageError,
    WorkloadOption,
    new_app,
    out,
)
from fpxbench.sweep.settings import Settings

app = new_app()


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="implementations, schemes, workloads or cases.")] = "implementations",
    profile: ProfileOption = "quick",
    implementation: ImplementationOption = None,
    scheme: SchemeOption = None,
    workload: WorkloadOption = None,
    device: DeviceOption = None,
    impls: ImplsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what there is: implementations, schemes, workloads, or the cases that a profile would run."""
    listings = {"implementations": _implementations, "schemes": _schemes, "workloads": _workloads, "cases": _cases}
    if what not in listings:
        raise UsageError(f"there is no list of {what!r}: one of {', '.join(listings)}")
    settings = Settings(profile=profile, implementation=tuple(implementation or ()), scheme=tuple(scheme or ()),
                         workload=tuple(workload or ()), device=device, impls=tuple(impls or ()))
    rows = listings[what](settings)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    out.print(table)


@app.command()
def doctor(
    impls: ImplsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can and cannot do, and what to install."""
    from fpxbench.sweep.doctor import examine

    findings = examine(tuple(impls or ()))
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
        return
    marks = {"yes": "[green]✓[/]", "no": "[red]✗[/]", "note": "[yellow]·[/]"}
    for finding in findings:
        line = f"{marks[finding.state]} [bold]{escape(finding.what)}[/]: {escape(finding.said)}"
        out.print(line + (f"  [dim]→ {escape(finding.advice)}[/]" if finding.advice else ""))


def _implementations(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.implementation import discover, summary

    known, failures = discover(settings.impls)
    rows = [{"implementation": name, "baseline": "yes" if cls.baseline else "", "about": summary(cls)} for name, cls in sorted(known.items())]
    return rows + [{"implementation": failure.path, "baseline": "", "about": f"not loaded: {failure.error}"} for failure in failures]


def _schemes(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.numbers.formats import Format
    from fpxbench.numbers.scheme import SCHEMES, USED_BY, scheme_named

    rows = []
    for name in settings.scheme or dict.fromkeys((*SCHEMES, *USED_BY)):
        scheme = scheme_named(name)
        fmt, scaling = scheme.format, scheme.scaling
        exponent = isinstance(fmt, Format) and not fmt.is_integer
        rows.append({
            "scheme": scheme.name,
            "format": f"E{fmt.exponent_bits}M{fmt.mantissa_bits} bias {fmt.bias}" if exponent else fmt.name if fmt else "16 bits",
            "scales": scaling.name if scaling else "",
            "scale format": scaling.scale_format.format.name + ", fp32" * scaling.has_tensor_scale if scaling else "",
            "activations": scheme.activation.name if scheme.activation else "16 bits",
            "bits a weight": f"{scheme.bits_per_weight(4096, 4096):.3f}",
            "used by": USED_BY.get(scheme.name, ""),
            **({"source": scaling.source if scaling else ""} if settings.profile == "full" else {}),
        })
    return rows


def _workloads(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.workloads import workloads

    return [
        {"workload": w.name, "N": str(w.n), "K": str(w.k), "M": " ".join(map(str, w.m)), "about": w.about}
        for w in workloads().values()
    ]


def _cases(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.sweep.selection import make_plan

    return [{"case": planned.case.id, "refused": planned.refused} for planned in make_plan(settings).cases]
