"""`fpxbench environments`: list and remove the virtual environments of the builds."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape

from fpxbench.cli.common import JsonOption, UsageError, new_app, new_table, out, print_table
from fpxbench.cli.confirm_commands import EnvironmentsOption

app = new_app()

environments_app = typer.Typer(
    no_args_is_help=True,
    help="List and remove the virtual environments of the builds.\n\nOne is created when a build is first measured.",
)
app.add_typer(environments_app, name="environments")


@environments_app.command(name="list")
def list_(environments: EnvironmentsOption = None, as_json: JsonOption = False) -> None:
    """List the environments with size and last use, and the builds that failed to install."""
    from fpxbench.builds.environments import Environments

    folder = Environments(environments)
    found = folder.all()
    if as_json:
        print(json.dumps([_facts(name, environment) for name, environment in found]))
        return
    table = new_table("environment", ">size", "last used", "")
    total = 0
    for name, environment in found:
        facts = _facts(name, environment)
        total += facts["bytes"]
        table.add_row(
            *map(
                escape, (name, _size(facts["bytes"]), (facts["last_used"] or "")[:10], facts["why"] or facts["status"])
            )
        )
    if found:
        print_table(table)
    out.print(f"{len(found) or 'no'} environments in {folder.root}, {_size(total)}", markup=False, style="dim")


@environments_app.command()
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME…]", help="Names as printed by `fpxbench environments list`.")
    ] = None,
    unused_for: Annotated[
        float | None, typer.Option("--unused-for", help="Remove environments unused for this many days.", min=0.0)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all environments.")] = False,
    environments: EnvironmentsOption = None,
) -> None:
    """Remove environments. They are created again when needed; one that is in use is left alone."""
    from fpxbench.builds.environments import Environments, InUse

    if not (names or everything or unused_for is not None):
        raise UsageError("nothing to remove: give NAME…, --unused-for DAYS, or --all")
    folder = Environments(environments)
    chosen = list(names or [])
    for name, environment in folder.all():
        old = environment is not None and unused_for is not None and time.time() - environment.used > unused_for * 86400
        if everything or old:
            chosen.append(name)
    freed, in_use = 0, False
    for name in dict.fromkeys(chosen):
        try:
            freed += folder.remove(name)
        except InUse as error:
            in_use = True
            out.print(str(error), markup=False, style="yellow")
    out.print(f"{_size(freed)} freed", markup=False)
    if in_use:
        raise typer.Exit(1)


def _facts(name: str, environment) -> dict[str, Any]:
    if environment is None:
        return {"name": name, "status": "unfinished", "bytes": 0, "last_used": None, "why": "", "python": None}
    state = environment.state
    return {
        "name": name,
        "status": state.status,
        "bytes": environment.size,
        "why": state.why,
        "python": str(environment.python),
        "last_used": datetime.fromtimestamp(environment.used, UTC).isoformat(timespec="seconds"),
    }


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
