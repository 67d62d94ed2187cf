"""What can be done from the command line?

A command's module is imported when the command runs, so that ``fpxbench --help`` takes a fraction of a second.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from fpxbench import __version__


class Command(NamedTuple):
    """One command: its module in `fpxbench.cli`, and its line in ``fpxbench --help``."""

    module: str
    summary: str
    panel: str


_MEASURE, _READ, _HISTORY, _COMPILERS = "Measure", "Read results", "Compare builds", "Casts and compilers"

COMMANDS = {
    "run": Command("sweep_commands", "Check and time cases. Write one record for each.", _MEASURE),
    "fleet": Command(
        "fleet_commands", "Measure builds on every device of a Ray cluster: run, status, nodes, asv.", _MEASURE
    ),
    "inspect": Command(
        "inspect_commands",
        "Recover by experiment what an implementation computes: decode table, scales, code order.",
        _MEASURE,
    ),
    "checkpoint": Command(
        "checkpoint_commands",
        "Identify the quantization of a checkpoint's weights, and check it for faults.",
        _MEASURE,
    ),
    "tensor-check": Command(
        "tensor_commands",
        "Check quantized tensor classes, operation by operation, against plain tensors.",
        _MEASURE,
    ),
    "generate": Command(
        "model_commands",
        "Measure a language model under each scheme: tokens per second, bandwidth, and output quality.",
        _MEASURE,
    ),
    "recommend": Command(
        "model_commands",
        "Recommend schemes for a model on this machine: quality against bytes against speed, and mixed precision.",
        _MEASURE,
    ),
    "rank": Command(
        "ranking_commands", "Rank schemes by how far they move a sentence encoder's embeddings.", _MEASURE
    ),
    "list": Command("list_commands", "List implementations, schemes, workloads, or the cases of a profile.", _MEASURE),
    "doctor": Command("list_commands", "Check this machine's setup and say what to install.", _MEASURE),
    "report": Command(
        "record_commands", "Build a static HTML report from the records and print the worst findings.", _READ
    ),
    "records": Command("record_commands", "Print the records, one JSON object per line.", _READ),
    "show": Command("record_commands", "Show everything that is recorded about one case.", _READ),
    "repro": Command("record_commands", "Print a standalone script that reproduces one case.", _READ),
    "regressions": Command("regression_commands", "List what changed from build to build, worst first.", _HISTORY),
    "confirm": Command(
        "confirm_commands", "Rerun two builds, interleaved, to confirm or refute a suspected regression.", _HISTORY
    ),
    "bisect": Command(
        "confirm_commands", "Find the first bad build between two builds, and its upstream commits.", _HISTORY
    ),
    "compare": Command("compare_commands", "Compare two builds from their records.", _HISTORY),
    "issues": Command("compare_commands", "Print the text of an issue for each confirmed regression.", _HISTORY),
    "notify": Command(
        "notify_commands",
        "Send each new regression once to each channel. A dry run unless --send is given.",
        _HISTORY,
    ),
    "timeline": Command("timeline_commands", "Manage the timeline of builds: sync, list, show, here.", _HISTORY),
    "environments": Command(
        "environment_commands", "List and remove the virtual environments of the builds.", _HISTORY
    ),
    "detector": Command(
        "regression_commands", "Evaluate the regression detector on synthetic and recorded series.", _HISTORY
    ),
    "numerics": Command(
        "cast_commands", "Check the casts of PyTorch and Triton against the definition of each format.", _COMPILERS
    ),
    "decode": Command(
        "decode_commands", "Time the decode of each format to bf16, fp16 and fp32, beside a copy of as many bytes.",
        _COMPILERS,
    ),
    "targets": Command(
        "target_commands",
        "Compile low-bit kernels for GPUs that need not be present, and show what each supports.",
        _COMPILERS,
    ),
    "codec": Command("codec_commands", "Benchmark encoding, decoding and packing against other libraries.", _COMPILERS),
}


class _LazyGroup(TyperGroup):
    """A group whose commands are imported when they are looked up, and only listed in its own help."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # typer reads `commands` for its suggestions, and get_command for everything else.
        self.commands = {
            name: TyperCommand(name, callback=None, help=command.summary, rich_help_panel=command.panel)
            for name, command in COMMANDS.items()
        }
        self._listing = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.commands.get(cmd_name) if self._listing or cmd_name not in COMMANDS else load(cmd_name)


def load(name: str) -> Any:
    """Return the typer command called `name`, importing its module."""
    module = importlib.import_module(f"fpxbench.cli.{COMMANDS[name].module}")
    return typer.main.get_group(module.app).commands[name]


app = typer.Typer(
    name="fpxbench",
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Is low-bit floating-point matmul still [bold]right[/], and still [bold]fast[/]?

    """
    "fpxbench checks and times weight-only quantized matmul (FP8, FP6, FP4, MX, NVFP4, and any float format of up to 8 "
    "bits) for "
    "every implementation and scheme, on this machine and with the installed PyTorch. A case that is wrong gets a "
    "verdict and no "
    """timing.

    [bold]Start with[/]   fpxbench run --profile smoke && fpxbench report

    """
    "[bold]Terms[/]   A [italic]scheme[/] is a number format with its scales (e4m3fn-row, mxfp4). An "
    "[italic]implementation[/] is one "
    "way to store and multiply such a weight. A [italic]workload[/] is the shape of a real layer with a number of "
    "tokens. A "
    "[italic]case[/] combines the three: eager_upcast/e4m3fn-row/llama2-7b.o/m1/bf16.",
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"fpxbench {__version__}")
        raise typer.Exit()


def main() -> None:
    """Run the command line. A user's mistake ends as one message and exit status 2, without a traceback."""
    try:
        app()
    except BrokenPipeError:     # `fpxbench records | head`; an OSError, so it comes first
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from fpxbench.cli.common import err, user_message

        message = user_message(error)
        if message is None:
            raise
        err.print(f"fpxbench: {message}", markup=False, style="red")
        sys.exit(2)
