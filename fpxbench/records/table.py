"""Load records in Python, as objects or as a table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpxbench.records.record import Record
from fpxbench.records.store import BrokenLine, Store, latest as latest_of

if TYPE_CHECKING:
    import pandas
    import pyarrow


class Records(list[Record]):
    """A list of records that can be turned into a table.

    broken_lines : lines of the files that could not be read
    """

    def __init__(self, records: Iterable[Record] = (), broken_lines: Iterable[BrokenLine] = ()) -> None:
        super().__init__(records)
        self.broken_lines = list(broken_lines)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one dict per record, flattened except for lists: ``case.scheme``, ``timing.median_us``, …"""
        return [_flat(record.model_dump(mode="json")) for record in self]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per record. Raise ImportError if pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("records as a DataFrame need pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_rows())

    def to_arrow(self) -> pyarrow.Table:
        """Return an Arrow table with a row per record. Raise ImportError if pyarrow is not installed."""
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError("records as an Arrow table need pyarrow: pip install pyarrow") from error
        rows = self.to_rows()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        return pyarrow.table({name: _column([row.get(name) for row in rows]) for name in columns})


def load_records(results: str | Path = "results", *, latest: bool = True) -> Records:
    """Return the records under a results folder.

    latest : only the newest record of each case, build and machine

    Lines that are not records are in `Records.broken_lines`. Raise FileNotFoundError if the folder does not exist.
    """
    folder = Path(results)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of records {str(folder)!r}: `fpxbench run --results {folder}` creates it")
    records, broken = Store(folder).read_all()
    return Records(latest_of(records) if latest else records, broken)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        # Evidence and a machine's facts have different keys in each record, so each becomes one column of text.
        if isinstance(entry, dict) and name in ("evidence", "facts"):
            flat[prefix + name] = ", ".join(f"{key}: {content}" for key, content in entry.items())
        elif isinstance(entry, dict):
            flat |= _flat(entry, f"{prefix}{name}.")
        else:
            flat[prefix + name] = entry
    return flat


def _column(values: list[Any]) -> list[Any]:
    """Return values of one type: integers among floats become floats."""
    if any(isinstance(value, float) for value in values):
        return [float(value) if isinstance(value, int) else value for value in values]
    return values
