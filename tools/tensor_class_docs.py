"""Write the table of tensor classes into docs/tensors.md from records of `fpxbench tensor-check`.

With ``--check``, fail if the page is stale.

``python tools/tensor_class_docs.py [--results DIR]``; by default the records are those of reports/samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import docs_page

from fpxbench.model.tensor_record import OperationOutcome, TensorOperationRecord
from fpxbench.records.store import Store
from fpxbench.reports.model.tensor_table import TensorPage, tensor_pages

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tensors.md"


def newest(results: Path) -> TensorPage:
    """Return the page of the newest build that has records. Raise SystemExit if none has."""
    store = Store(results, TensorOperationRecord)
    found = {(path.parent.parent.name, path.stem): store.read(path)[0] for path in store.files()}
    pages = tensor_pages({folder: records for folder, records in found.items() if records})
    if not pages:
        sys.exit(f"{results} holds no records of tensor classes: run fpxbench tensor-check --results {results}")
    return max(pages, key=lambda page: page.as_of)


def markdown(page: TensorPage) -> str:
    """Return the table of classes, then operation by class, then what is not right."""
    table = page.table
    lines = [f"PyTorch {page.build.torch}:", "", "| | class | library | right |", "|---|---|---|---|"]
    lines += [f"| {number} | {name} | {table.library(name) or 'fpxbench'} | {table.done(name)} |"
              for number, name in enumerate(table.classes, 1)]
    lines += ["", "| operation | " + " | ".join(str(number + 1) for number in range(len(table.classes)))
              + " | needed by |", "|---|" + "---|" * (len(table.classes) + 1)]
    for operation in table.operations:
        outcomes = [table.outcome(name, operation) for name in table.classes]
        signs = " | ".join("" if outcome is None else outcome.sign for outcome in outcomes)
        lines.append(f"| {operation} | {signs} | {table.needed_by(operation)} |")
    lines += ["", "; ".join(f"{outcome.sign} {outcome.meaning}" for outcome in OperationOutcome)
              + "; an empty cell was not asked.", "", "What is not right:", ""]
    lines += [f"- {name} refuses every operation: {reason}" for name, reason in table.refusals().items()]
    lines += [f"- {record.result.outcome.sign} {record.result.tensor}, {record.result.operation}:"
              f" {_code(record.result.message or record.result.outcome.meaning)}" for record in table.notable()]
    return "\n".join(lines)


def _code(text: str) -> str:
    """Return a message of a library as code, cut to a line."""
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line if len(line) <= 200 else line[:199] + '…'}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "reports" / "samples")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    return docs_page.write(PAGE, {"classes": markdown(newest(asked.results))}, __file__, check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
