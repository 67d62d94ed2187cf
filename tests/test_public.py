"""``import fpxbench``: what it gives, what it loads, and the page that documents it."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from places import DOCS, HELPERS
from sample_records import case, record

import fpxbench
from fpxbench.records.store import Store
from fpxbench.records.table import Records, load_records

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def python(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], capture_output=True, text=True, check=False
    )


def test_importing_and_listing_loads_neither_torch_nor_pydantic():
    done = python("""
        import sys
        import fpxbench
        assert set(fpxbench.__all__) <= set(dir(fpxbench))
        print(sorted(name for name in ("torch", "numpy", "pydantic", "scipy") if name in sys.modules))
    """)
    assert done.stdout == "[]\n", done.stderr


def test_records_and_sweeps_load_no_torch():
    done = python("""
        import sys
        from fpxbench import Format, Records, Scaling, Scheme, format_named, load_records, run, scheme_named
        assert scheme_named("mxfp4").format.max == 6
        print("torch" in sys.modules)
    """)
    assert done.stdout == "False\n", done.stderr


def test_every_public_name_is_there_and_no_other():
    for name in fpxbench.__all__:
        assert getattr(fpxbench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        fpxbench.quantise  # noqa: B018


def test_the_decorator_and_its_module_share_a_name():
    done = python("""
        from fpxbench import implementation as before
        from fpxbench.implementation import Implementation
        import fpxbench

        for number, decorator in enumerate((before, fpxbench.implementation)):
            decorator(f"shared_{number}")(type(f"Shared{number}", (Implementation,), {}))
        print(sorted(name for name in fpxbench.discover()[0] if name.startswith("shared_")))
    """)
    assert done.stdout == "['shared_0', 'shared_1']\n", done.stderr


def test_type_checkers_and_the_interpreter_see_the_same_names():
    source = Path(fpxbench.__file__).read_text(encoding="utf-8")
    block = source.partition("if TYPE_CHECKING:")[2].partition("\n\n")[0]
    stubs = {
        (module, name) for module, names in re.findall(r"from (\S+) import (.+)", block) for name in names.split(", ")
    }
    assert stubs == {(module, name) for name, module in fpxbench._MODULE_OF.items()}
    assert {name for _, name in stubs} == set(fpxbench.__all__)


def test_the_examples_of_the_page_run_in_order(tmp_path):
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert {name for name in fpxbench.__all__ if f"fpxbench.{name}" in "".join(examples)} == set(fpxbench.__all__)
    # A file, not -c: the sweep's own processes do not run it again.
    (tmp_path / "page.py").write_text("\n".join(examples))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "eager_upcast/e4m3fn-row/canary.seed/m1/bf16 ok" in done.stdout


# Records as a table.


@pytest.fixture
def results(tmp_path):
    store = Store(tmp_path)
    store.append(record(case("dense", "bf16"), speedup=1.0))
    store.append(record(case("triton_fused", "mxfp4")))
    store.append(record(case("triton_fused", "mxfp4"), speedup=2.0))
    with open(store.files()[0], "a", encoding="utf-8") as file:
        file.write('{"case": 7}\n')
    return tmp_path


def test_records_are_loaded_with_the_newest_of_each_case_and_the_lines_that_are_none(results):
    records = load_records(results)
    assert [(one.case.scheme, one.timing is not None) for one in records] == [("bf16", True), ("mxfp4", True)]
    assert len(load_records(results, latest=False)) == 3
    assert len(records.broken_lines) == 1 and ":4: " in str(records.broken_lines[0])
    with pytest.raises(FileNotFoundError, match="absent"):
        load_records(results / "absent")


def test_a_row_is_flat(results):
    row = load_records(results).to_rows()[0]
    assert row["case.id"] == "dense/bf16/llama2-7b.o/m1/bf16" and row["build.torch"] == "2.13.0+cpu"
    assert row["timing.speedup"] > 0 and isinstance(row["timing.samples_us"], list)
    assert not any(isinstance(value, dict) for value in row.values())


def test_records_become_a_data_frame(results):
    pytest.importorskip("pandas")
    frame = load_records(results).to_pandas()
    assert list(frame["case.scheme"]) == ["bf16", "mxfp4"] and frame["timing.median_us"].gt(0).all()


def test_records_become_an_arrow_table_also_where_only_some_are_timed(results):
    pytest.importorskip("pyarrow")
    table = load_records(results, latest=False).to_arrow()
    assert table.num_rows == 3 and table["timing.median_us"].null_count == 1
    assert Records().to_arrow().num_rows == 0


@pytest.mark.parametrize(("library", "method"), [("pandas", "to_pandas"), ("pyarrow", "to_arrow")])
def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(library, method, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        getattr(Records(), method)()


def test_a_build_with_this_interface_has_a_marker_for_type_checkers():
    assert (HELPERS.parents[1] / "fpxbench" / "py.typed").exists()
