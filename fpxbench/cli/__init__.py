"""The command line: thin words around the modules that do the work. A command is a function in one of the modules imported here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from fpxbench import __version__
from fpxbench.builds.installed import NoPyTorch
from fpxbench.cli.common import UsageError, app, err

# Each brings its commands, and this is their order in `fpxbench --help`.
# isort: off
from fpxbench.cli import sweep_commands as sweeps  # noqa: F401
from fpxbench.cli import record_commands as results  # noqa: F401
from fpxbench.cli import list_commands as listing  # noqa: F401
from fpxbench.cli import target_commands as targets  # noqa: F401
from fpxbench.cli import timeline_commands as timeline  # noqa: F401
from fpxbench.cli import regression_commands as regressions  # noqa: F401
from fpxbench.cli import confirm_commands as builds  # noqa: F401
from fpxbench.cli import environment_commands as environments  # noqa: F401
from fpxbench.cli import codec_commands as codec  # noqa: F401
from fpxbench.cli import cast_commands as numerics  # noqa: F401
from fpxbench.cli import inspect_commands as inspect  # noqa: F401
# isort: on


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(f"fpxbench {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2, never a traceback."""
    try:
        app()
    except BrokenPipeError:     # `fpxbench records | head`; an OSError, so it comes first
        sys.stderr.close()
        sys.exit(141)
    except (UsageError, NoPyTorch, OSError, ValidationError, ValueError) as error:
        err.print(f"fpxbench: {_sentence(error)}", markup=False, style="red")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors(include_url=False))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
