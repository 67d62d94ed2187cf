"""The table of kinds agrees with the code that emits them, with the docs, and with records written before."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import pytest
from kind_examples import examples
from places import DOCS
from profile_coverage import NAMED, PAGE, rows_of

import fpxbench
from fpxbench.records.kinds import Group, Kind, Stage, sibling_kind
from fpxbench.records.verdict import Status, Verdict

PACKAGE = Path(fpxbench.__file__).parent
KINDS_TABLE = DOCS.parent / "tools" / "kinds_table.py"

STAGES = (
    ("diagnosis/products.py", Stage.PRODUCT | Stage.STORED),     # `nearness` serves both
    ("diagnosis/*stored*", Stage.STORED),
    ("diagnosis/*encode*", Stage.STORED),
    ("diagnosis/*", Stage.PRODUCT),
    ("casts/*", Stage.CASTS),
    ("targets/causes.py", Stage.COMPILER | Stage.TARGETS),
    ("targets/*", Stage.TARGETS),
    ("checking/*", Stage.CONTRACT),
    ("model/*", Stage.PRODUCT),
    ("sweep/*", Stage.CONTRACT),
    ("records/compiler_messages.py", Stage.COMPILER),
    ("records/verdict.py", Stage.COMPILER),
)
"""The stages that a file of the package belongs to: the first pattern that matches."""

FIRST_KINDS = [
    "fnuz_as_fn", "fn_as_fnuz", "nan_code_lost", "negative_zero", "sign_lost", "subnormal_flushed", "subnormal_wrong",
    "double_rounding", "ties_away", "truncated", "overflow_nan", "overflow_inf", "saturated", "nibble_swap",
    "plane_swap", "scale_missing", "scale_transposed", "scaled", "wrong_max", "block_off_by_one", "gibberish",
    "inaccurate", "wrong_shape", "wrong_dtype", "unwritten_output", "stale_output", "input_modified",
    "not_repeatable", "config_dependent", "unsupported_rounding", "unsupported_conversion", "unsupported_dtype",
    "unsupported_arch", "assembler_error", "compiler_abort", "pass_failed", "empty_object",
]
"""The kinds of schema 1's first records."""


def stages_of(file: str) -> Stage | None:
    return next((stage for pattern, stage in STAGES if fnmatch(file, pattern)), None)


def named_in(source: str) -> set[str]:
    """Return the members of `Kind` that a source names."""
    names = {node.attr for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Kind"}
    return names | ({"FNUZ_AS_FN", "FN_AS_FNUZ"} if "sibling_kind(" in source else set())


def contradictions(sources: dict[str, str]) -> list[str]:
    """Return where `sources` (by path in the package) name a kind that their stage must not emit, or no stage."""
    found = []
    for file, source in sources.items():
        names, stages = named_in(source), stages_of(file)
        if names and stages is None:
            found.append(f"{file} names {sorted(names)} and belongs to no stage: add it to STAGES")
        found += [f"{file} names {name}, whose entry in records/kinds.py does not list {stages}"
                  for name in sorted(names) if stages is not None and not stages & Kind[name].emitted_by]
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    left_out = ("records/kinds.py", "impls/", "reports/", "benchmarks/")
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items() if not name.startswith(left_out)}


def test_what_emits_a_kind_is_allowed_to(sources: dict[str, str]) -> None:
    assert contradictions(sources) == []


@pytest.mark.parametrize(("file", "source", "says"), [
    ("targets/new.py", "Kind.NIBBLE_SWAP", "targets/new.py names NIBBLE_SWAP"),
    ("casts/new.py", "kind = Kind.SCALE_MISSING if x else Kind.TRUNCATED", "casts/new.py names SCALE_MISSING"),
    ("checking/new.py", "sibling_kind(fmt.specials)", "checking/new.py names FNUZ_AS_FN"),
    ("elsewhere/new.py", "Kind.TRUNCATED", "belongs to no stage"),
])
def test_a_kind_of_another_stage_is_noticed(file: str, source: str, says: str) -> None:
    assert any(says in each for each in contradictions({file: source}))


def test_every_kind_is_emitted_by_each_stage_that_it_lists(sources: dict[str, str]) -> None:
    emitting: dict[str, Stage] = defaultdict(lambda: Stage(0))
    for file, source in sources.items():
        for name in named_in(source):
            emitting[name] |= stages_of(file) or Stage(0)
    missing = {str(kind): kind.emitted_by & ~emitting[kind.name] for kind in Kind}
    assert {kind: stages for kind, stages in missing.items() if stages} == {}


def test_every_kind_has_its_words() -> None:
    for kind in Kind:
        assert kind.group in Group and kind.value == kind.name.lower()
        assert kind.seen.endswith(".") and not kind.predicate.endswith(".") and kind.predicate[0].islower()
    assert len({kind.predicate for kind in Kind}) == len(Kind)


@pytest.mark.parametrize("name", FIRST_KINDS)
def test_the_kinds_of_old_records_stay_readable(name: str) -> None:
    line = Verdict(status=Status.WRONG, kind=Kind(name)).model_dump_json()
    assert f'"kind":"{name}"' in line
    assert Verdict.model_validate_json(line).kind is Kind(name)


def test_codes_of_a_format_taken_for_its_siblings_are_named_by_the_format() -> None:
    assert sibling_kind("fnuz") is Kind.FNUZ_AS_FN and sibling_kind("fn") is sibling_kind("ieee") is Kind.FN_AS_FNUZ


def test_the_docs_table_is_the_one_of_the_code() -> None:
    done = subprocess.run([sys.executable, KINDS_TABLE, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kind_has_an_example_and_a_row_of_what_finds_it() -> None:
    """What `smoke`, `quick` and `inspect` say of it, measured by `tests/helpers/profile_coverage.py`."""
    kinds = [str(kind) for kind in Kind if kind.emitted_by]
    assert sorted(kinds) == [str(example.kind) for example in examples()]
    rows = {row["kind"]: row for row in rows_of(PAGE.read_text(encoding="utf-8"))}
    assert sorted(kinds) == sorted(rows)
    for example in examples():
        row = rows[str(example.kind)]
        assert (row["fault"], row["scheme"]) == (example.fault, example.scheme), "measure it again"
        assert NAMED in row.values() or example.elsewhere, f"neither a profile nor `inspect` names {example.kind}"
