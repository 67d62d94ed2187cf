"""The command line, run in this process or in one of its own."""

import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from fpxbench.cli import app


def command(line: str, *arguments: Any) -> Result:
    """Run ``fpxbench`` in this process, with the words of `line` and what they cannot hold: paths, texts."""
    return CliRunner().invoke(app, [*line.split(), *map(str, arguments)])


def fpxbench(line: str, *arguments: Any, python=sys.executable, **options) -> subprocess.CompletedProcess[str]:
    """Run the same in a process of its own."""
    words = [str(python), "-m", "fpxbench", *line.split(), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **options)
