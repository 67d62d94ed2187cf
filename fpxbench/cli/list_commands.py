"""`fpxbench list`: implementations, schemes, workloads, cases; `fpxbench doctor`: what this machine can run."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fpxbench.cli.common import (
    DeviceOption,
    ImplementationOption,
    ImplsOption,
    JsonOption,
    ProfileOption,
    SchemeOption,
    TpOption,
    UsageError,
    WorkloadOption,
    call_in_child,
    known_workloads,
    new_app,
    new_table,
    out,
    print_table,
    ranks,
)
from fpxbench.did_you_mean import did_you_mean
from fpxbench.sweep.settings import Settings
from fpxbench.workloads import ranks_in

if TYPE_CHECKING:
    from fpxbench.sweep.messages import SetupCheck

app = new_app()


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="implementations, schemes, workloads or cases")] = "implementations",
    profile: ProfileOption = "quick",
    implementation: ImplementationOption = None,
    scheme: SchemeOption = None,
    workload: WorkloadOption = None,
    tp: TpOption = "",
    device: DeviceOption = None,
    impls: ImplsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List implementations, schemes, workloads, or the cases of a profile.

    With --tp, workloads and cases include the shards of tensor-parallel ranks.
    """
    listings = {"implementations": _implementations, "schemes": _schemes, "workloads": _workloads, "cases": _cases}
    if what not in listings:
        raise UsageError(f"cannot list {what!r}: choose one of {', '.join(listings)}")
    settings = Settings(profile=profile, implementation=tuple(implementation or ()), scheme=tuple(scheme or ()),
                         workload=tuple(workload or ()), tp=ranks(tp), device=device, impls=tuple(impls or ()))
    rows = listings[what](settings)
    if as_json:
        print(json.dumps(rows))
        return
    table = new_table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    print_table(table)


@app.command()
def doctor(
    impls: ImplsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine's setup and say what to install.

    Looks at Python, PyTorch, Triton, the devices, the C++ compiler, memory, disk, and every implementation.
    """
    checks = _setup_checks(impls or [])
    if as_json:
        print(json.dumps([check._asdict() for check in checks]))
        return
    marks = {"yes": "[green]✓[/]", "no": "[red]✗[/]", "note": "[yellow]·[/]"}
    for check in checks:
        line = f"{marks[check.state]} [bold]{escape(check.what)}[/]: {escape(check.message)}"
        out.print(line + (f"  [dim]→ {escape(check.advice)}[/]" if check.advice else ""))


def _setup_checks(impls: list[Path]) -> list[SetupCheck]:
    from fpxbench.sweep.messages import SetupCheck

    outcome = call_in_child("fpxbench.sweep.doctor:examine", impls)
    if outcome.value is not None:
        return outcome.read(list[SetupCheck])
    advice = outcome.log_tail.strip().splitlines()[-1:] or ["reinstall it"]
    return [SetupCheck("no", "PyTorch", f"cannot be used: {outcome.failure.summary}", advice[0])]


def _implementations(settings: Settings) -> list[dict[str, str]]:
    outcome = call_in_child("fpxbench.implementation:listed", settings.impls)
    if outcome.value is None:
        raise UsageError(f"the implementations could not be imported: {outcome.failure.summary}")
    rows = outcome.read(list[dict[str, str]])
    chosen = _chosen(settings.implementation, [row["implementation"] for row in rows], "implementation")
    return [row for row in rows if row["implementation"] in chosen]


def _chosen(globs: tuple[str, ...], known: list[str], what: str) -> list[str]:
    """Return the names that any of `globs` matches, all without globs. Raise UsageError for one that matches none."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise UsageError(f"no {what} {glob!r}; {did_you_mean(glob, known, f'`fpxbench list {what}s` prints them')}")
    return [name for name in known if not globs or any(fnmatchcase(name, glob) for glob in globs)]


def _schemes(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.numbers.formats import Format
    from fpxbench.numbers.scheme import SCHEMES, USED_BY, scheme_named

    rows = []
    known = list(dict.fromkeys((*SCHEMES, *USED_BY)))
    found = {glob: [name for name in known if fnmatchcase(name, glob)] for glob in settings.scheme}
    for name in dict.fromkeys(name for glob, names in found.items() for name in names or [glob]) or known:
        scheme = scheme_named(name)
        fmt, scaling = scheme.format, scheme.scaling
        rows.append(
            {
                "scheme": scheme.name,
                "format": f"E{fmt.exponent_bits}M{fmt.mantissa_bits} bias {fmt.bias}"
                if isinstance(fmt, Format) and not fmt.is_integer
                else fmt.name
                if fmt
                else "16 bits",
                "scales": scaling.name if scaling else "",
                "scale format": scaling.scale_format.format.name + ", fp32" * scaling.has_tensor_scale
                if scaling
                else "",
                "activations": scheme.activation.name if scheme.activation else "16 bits",
                "bits a weight": f"{scheme.bits_per_weight(4096, 4096):.3f}",
                "used by": USED_BY.get(scheme.name, ""),
                **({"source": scaling.source if scaling else ""} if settings.profile == "full" else {}),
            }
        )
    return rows


def _workloads(settings: Settings) -> list[dict[str, str]]:
    known = known_workloads((*settings.tp, *ranks_in(settings.workload)))
    return [
        {"workload": w.name, "N": str(w.n), "K": str(w.k), "M": " ".join(map(str, w.m)), "about": w.about}
        for w in map(known.__getitem__, _chosen(settings.workload, list(known), "workload"))
    ]


def _cases(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.sweep.plan import Plan

    outcome = call_in_child("fpxbench.sweep.selection:make_plan", settings)
    if outcome.value is None:
        raise UsageError(f"the cases could not be planned: {outcome.failure.summary}")
    return [{"case": planned.case.id, "refused": planned.refused} for planned in outcome.read(Plan).cases]
