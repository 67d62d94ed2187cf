"""The schema of ``targets.json``: the outcome of every probe on every architecture with every Triton build.

`docs/targets.md` documents it for readers without this package.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fpxbench.records.kinds import Kind
from fpxbench.records.store import first_mistake
from fpxbench.records.verdict import BROKEN, Status
from fpxbench.targets.architectures import Architecture
from fpxbench.whole_file import write_whole

SCHEMA = 1
_MOST_BYTES = 64 << 20


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


Check = Literal["table", "inputs", "instruction", "none"]
"""How the object was checked: ``table``, a decode executed on all codes; ``inputs``, a kernel executed on chosen
inputs; ``instruction``, its conversion instruction compared; ``none``, only compiled.
"""


class CellOutcome(_Model):
    """The outcome of a cell on one build. Cells with the same cause (and the same evidence, if wrong) share one."""

    status: Status
    """``ok`` compiles (and is right as far as `check` states), ``wrong`` is miscompiled: it compiles and computes
    something else; ``unsupported`` refused with a reason, ``error`` raised, ``crash`` ended the process, ``timeout``;
    ``missing`` is unknown to the build.
    """
    kind: Kind | None = None
    cause: str = ""
    """One sentence, the same in all cells with this cause: it names types and targets only if they are the cause."""
    check: Check = "none"
    message: str = Field(default="", alias="words")
    """The compiler's output from one of the cells, without paths; or the evidence for a wrong result."""
    signal: str | None = None
    flags: tuple[str, ...] = ()
    """``unfused``: several kernels where one was requested."""


class KernelMetrics(_Model):
    """Properties of a compiled kernel."""

    registers: int | None = None
    """Per thread."""
    stack_bytes: int | None = None
    """Local memory per thread: spills, or arrays indexed at run time."""
    shared_bytes: int | None = None
    """Per block."""
    spills: int | None = None
    """Vector registers (AMD); on NVIDIA see `stack_bytes`."""
    load_bits: int | None = None
    """The widest load of a thread from global memory."""
    matrix: list[str] = []
    """Matrix instructions: ``wgmma.mma_async``, ``v_mfma``, …"""
    conversions: list[str] = []
    """Instructions that convert from or to formats of at most 8 bits."""
    instructions_a_weight: float | None = None
    """Of a decode: machine instructions per weight, loads and stores not counted."""


class Run(_Model):
    """Consecutive builds on which a cell had the same outcome."""

    builds: tuple[int, int]
    """First and last, as positions in the matrix's `builds`."""
    outcome: int
    """Position in the matrix's `outcomes`."""
    metrics: KernelMetrics | None = Field(default=None, alias="figures")
    """On the last of them."""


class Probe(_Model):
    """One kernel with its format and options."""

    id: str
    """``decode/e4m3fnuz/bf16``: operation, format, and the rest."""
    operation: str
    format: str
    """A format's name; for two operands ``e4m3fn×e5m2``, for a scheme its name."""
    cells: dict[str, list[Run]]
    """Its history by architecture, oldest run first. A build in no run was not tried."""


class TritonBuild(_Model):
    """One Triton, and how the matrix was made with it."""

    triton: str
    key: str = ""
    """Digest of Triton's own key of its sources and libraries."""
    python: str = ""
    torch: str = ""
    """The PyTorch beside it, if an operation needed it (`inductor`)."""
    linker: str = ""
    """For AMD's objects: ``built in``, or the name of the substitute for ROCm's."""
    cells: int = 0
    seconds: float = 0.0
    """Processor time of the compilations, whenever they ran."""
    unusable: str = ""
    """Why there are no outcomes of this build; empty if there are."""


class CompilingMachine(_Model):
    """The machine that compiled; it needs no GPU."""

    system: str
    processor: str
    cores: int


class OperationSummary(_Model):
    name: str
    title: str
    about: str


def _supported(schema: int) -> int:
    if schema > SCHEMA:
        raise ValueError(f"written by a newer fpxbench than this one (which reads schema {SCHEMA} and older)")
    return schema


class Matrix(_Model):
    """All outcomes, over builds in order of their versions."""

    schema_: Annotated[int, AfterValidator(_supported)] = Field(default=SCHEMA, alias="schema")
    generator: str
    """``fpxbench 0.1.0``."""
    generated: datetime
    machine: CompilingMachine
    builds: list[TritonBuild]
    architectures: list[Architecture]
    operations: list[OperationSummary]
    outcomes: list[CellOutcome]
    probes: list[Probe]

    @model_validator(mode="after")
    def _positions_exist(self) -> Self:
        known = {architecture.name for architecture in self.architectures}
        for probe in self.probes:
            for name, runs in probe.cells.items():
                if name not in known:
                    raise ValueError(f"probe {probe.id} has a cell on {name}, which is not among the architectures")
                last = -1
                for run in runs:
                    if not (last < run.builds[0] <= run.builds[1] < len(self.builds)
                            and 0 <= run.outcome < len(self.outcomes)):
                        raise ValueError(f"probe {probe.id} on {name}: run {run.builds} with outcome {run.outcome} is "
                                         "out of order or range")
                    last = run.builds[1]
        return self

    def outcome_of(self, probe: Probe, architecture: str, build: int) -> CellOutcome | None:
        """Return the outcome of a cell on the build at that position; None if it was not tried."""
        for run in probe.cells.get(architecture, ()):
            if run.builds[0] <= build <= run.builds[1]:
                return self.outcomes[run.outcome]
        return None

    def broken(self, build: int) -> int:
        """Return the number of broken cells on the build at that position."""
        return sum(
            self.outcomes[run.outcome].status in BROKEN
            for probe in self.probes for runs in probe.cells.values()
            for run in runs if run.builds[0] <= build <= run.builds[1]
        )

    def write(self, path: Path) -> None:
        """Write the matrix to a file, whole or not at all."""
        write_whole(path, self.to_json())

    def to_json(self) -> str:
        """Return the matrix as text with one probe a line, so that a diff shows what a new build changed."""
        whole = self.model_dump(mode="json", by_alias=True, exclude_defaults=True,
                                exclude={"probes", "outcomes"}) | {"schema": self.schema_}
        lines = [json.dumps(whole, ensure_ascii=False)[:-1]]
        for field in ("outcomes", "probes"):
            items = (item.model_dump_json(by_alias=True, exclude_defaults=True) for item in getattr(self, field))
            lines.append(f', "{field}": [\n' + ",\n".join(items) + "\n]")
        return "".join(lines) + "}\n"


def read_matrix(path: Path) -> Matrix:
    """Return the matrix in a file. Raises ValueError (naming the file) for anything else, and FileNotFoundError."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_BYTES >> 20} MiB: not a matrix of targets")
    try:
        return Matrix.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a matrix of targets: {first_mistake(error)}") from None
