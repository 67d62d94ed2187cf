"""The command line, run in this process or in one of its own."""

import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from fpxbench.cli import app
from fpxbench.cli.common import user_message


def command(line: str, *arguments: Any) -> Result:
    """Run ``fpxbench`` in this process, with the words of `line` and what they cannot hold: paths, texts.

    A user's mistake has the exit code 2, as outside; it is in the result's `exception`. Any other error is raised:
    typer's runner would give either the exit code 1, which is that of a problem found.
    """
    result = CliRunner().invoke(app, [*line.split(), *map(str, arguments)])
    if isinstance(result.exception, Exception):
        if user_message(result.exception) is None:
            raise result.exception
        result.exit_code = 2
    return result


def fpxbench(line: str, *arguments: Any, python=sys.executable, **options) -> subprocess.CompletedProcess[str]:
    """Run the same in a process of its own."""
    words = [str(python), "-m", "fpxbench", *line.split(), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **options)
