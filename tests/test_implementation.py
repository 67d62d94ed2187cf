"""The interface, and how implementations are found: beside the others, by path, by entry point; the broken ones
reported."""

import sys
import textwrap

import pytest
import torch

from fpxbench import implementation as implementations
from fpxbench.implementation import Implementation, Support, discover, find, source_digest, summary
from fpxbench.numbers.scheme import scheme_named

pytestmark = pytest.mark.usefixtures("one_thread")

MINE = '''
import torch.nn.functional as F
from fpxbench.implementation import Implementation, Support, implementation

@implementation("NAME")
class Mine(Implementation):
    """Decodes, then
    multiplies.

    The second paragraph is for readers of the file.
    """

    def supports(self, scheme, device):
        return Support.yes()

    def matmul(self, x, weight):
        return F.linear(x, weight.dequantize().to(x.dtype))
'''


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Return a folder in the place of `impls/`, and nothing registered yet."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(implementations, "shipped_folder", lambda: folder)
    for registry in ("_registry", "_sources"):
        monkeypatch.setattr(implementations, registry, {})
    monkeypatch.setattr(implementations, "_loaded_paths", set())
    ours = ("fpxbench_impls_", "fpxbench.impls")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in [name for name in sys.modules if name.startswith(ours)]:
        del sys.modules[name]


def write(folder, name, text=None):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text) if text is not None else MINE.replace("NAME", name))
    return path


def test_a_file_beside_the_others_is_found_without_editing_a_list(shipped):
    write(shipped, "mine")
    known, failures = discover()
    assert list(known) == ["mine"] and not failures


def test_a_file_or_a_folder_is_found_by_path(shipped, tmp_path):
    file = write(tmp_path / "one", "by_file")
    write(tmp_path / "two", "in_folder")
    known, failures = discover([file, tmp_path / "two"])
    assert set(known) == {"by_file", "in_folder"} and not failures


def test_an_implementation_of_twenty_lines_multiplies_the_oracles_codes(shipped):
    write(shipped, "mine")
    mine = discover()[0]["mine"]()
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    stored = mine.quantize(weight, scheme_named("e3m2-row"))
    codes, scales = scheme_named("e3m2-row").quantize(weight)
    assert torch.equal(stored.codes(), codes) and torch.equal(stored.scales, scales.stored)
    assert mine.matmul(torch.ones(2, 64, dtype=torch.bfloat16), stored).shape == (2, 5)
    dense = mine.quantize(weight, scheme_named("bf16"))
    assert torch.equal(dense.dequantize(), weight.bfloat16().float())


@pytest.mark.parametrize(("text", "says"), [
    ("def broken(:", "SyntaxError"),
    ("import a_library_that_nobody_has", "No module named 'a_library_that_nobody_has'"),
    ("raise RuntimeError('no driver here')", "RuntimeError: no driver here"),
    ("raise SystemExit(3)", "SystemExit: 3"),
])
def test_a_broken_file_is_reported_with_its_reason_and_the_others_are_found(shipped, tmp_path, text, says):
    write(shipped, "mine")
    broken = write(tmp_path / "theirs", "broken", text)
    write(tmp_path / "theirs", "whole")
    known, failures = discover([tmp_path / "theirs"])
    assert set(known) == {"mine", "whole"}
    assert [failure.path for failure in failures] == [str(broken)] and says in failures[0].error


def test_what_a_broken_file_registered_before_it_broke_is_removed(shipped):
    write(shipped, "half", MINE.replace("NAME", "half") + "\nraise RuntimeError('later')\n")
    assert discover()[0] == {}


def test_two_files_cannot_register_one_name(shipped, tmp_path):
    write(shipped, "taken")
    rival = write(tmp_path / "theirs", "rival", MINE.replace("NAME", "taken"))
    known, failures = discover([rival])
    assert known["taken"].__module__ == "fpxbench.impls.taken"
    assert (
        len(failures) == 1
        and "two implementations are named 'taken'" in failures[0].error
        and "rename one" in failures[0].error
    )


@pytest.mark.parametrize("name", ["a-b", "a/b", "", "1st", "<b>"])
def test_a_name_that_is_no_identifier_is_refused(shipped, name):
    write(shipped, "mine", MINE.replace("NAME", name))
    known, failures = discover()
    assert known == {} and f"implementation name {name!r}" in failures[0].error


def test_private_files_are_helpers_of_those_beside_them(shipped, tmp_path):
    for folder, name in ((shipped, "one"), (tmp_path / "theirs", "two")):
        write(folder, "_shared", f"NAME = {name!r}")
        write(folder, name, "from ._shared import NAME\n" + MINE.replace('"NAME"', "NAME"))
    known, failures = discover([tmp_path / "theirs"])
    assert set(known) == {"one", "two"} and not failures


def test_a_file_loaded_twice_is_loaded_once(shipped, tmp_path):
    file = write(tmp_path / "theirs", "mine")
    first = discover([file])[0]["mine"]
    known, failures = discover([tmp_path / "theirs" / ".." / "theirs", file])
    assert known["mine"] is first and not failures


@pytest.mark.parametrize(
    "make", [lambda p: p / "absent.py", lambda p: p, lambda p: (p / "notes.md").write_text("x") and p / "notes.md"]
)
def test_a_path_that_leads_to_no_python_file_is_named(shipped, tmp_path, make):
    folder = tmp_path / "empty"
    folder.mkdir()
    path = make(folder)
    with pytest.raises(FileNotFoundError, match="--impls") as refusal:
        discover([path])
    assert str(path) in str(refusal.value)


def test_an_installed_package_registers_by_entry_point(shipped, tmp_path, monkeypatch):
    site = tmp_path / "site"
    write(site, "their_kernels", MINE.replace("NAME", "theirs"))
    write(site, "their_broken", "import a_library_that_nobody_has")
    meta = site / "their_kernels-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kernels\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[fpxbench.implementations]\ngood = their_kernels\nbad = their_broken\n")
    monkeypatch.syspath_prepend(site)
    known, failures = discover()
    assert "theirs" in known
    assert [(f.path, "a_library_that_nobody_has" in f.error) for f in failures] == [("entry point bad", True)]
    del sys.modules["their_kernels"]


def test_the_digest_of_a_file_changes_with_it_and_with_its_private_neighbours(shipped, monkeypatch):
    digests = []
    for text, private in (("", "A = 1"), ("# edited", "A = 1"), ("# edited", "A = 2")):
        for registry in (implementations._registry, implementations._loaded_paths, implementations._sources):
            registry.clear()
        write(shipped, "_shared", private)
        write(shipped, "mine", MINE.replace("NAME", "mine") + text)
        discover()
        digests.append(source_digest("mine"))
    assert len(set(digests)) == 3 and all(len(digest) == 12 for digest in digests)
    assert source_digest("unheard_of") == ""


def test_an_unknown_name_names_the_nearest(shipped):
    write(shipped, "triton_fused")
    known, _ = discover()
    assert find("triton_fused", known) is known["triton_fused"]
    with pytest.raises(ValueError, match="no implementation 'triton_fusde'; did you mean triton_fused"):
        find("triton_fusde", known)
    with pytest.raises(ValueError, match="no implementation 'zzz'; there are triton_fused"):
        find("zzz", known)


def test_the_summary_is_the_docstrings_first_paragraph_on_one_line(shipped):
    write(shipped, "mine")
    assert summary(discover()[0]["mine"]) == "Decodes, then multiplies."


def test_a_refusal_needs_its_reason():
    with pytest.raises(ValueError, match="needs a reason"):
        Support.no("")


def test_a_missing_method_is_named():
    class Unfinished(Implementation):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished needs a method supports"):
        Unfinished().supports(scheme_named("bf16"), "cpu")
    with pytest.raises(NotImplementedError, match="Unfinished needs a method matmul"):
        Unfinished().matmul(None, None)


def test_the_shipped_implementations_all_load():
    known, failures = discover()
    assert not failures
    assert {"dense", "int8_weight_only", "eager_upcast", "native_float8", "compiled_mixed_mm", "triton_fused"} <= set(
        known
    )
    assert [name for name, cls in known.items() if cls.baseline and cls.__module__.startswith("fpxbench.")] == ["dense"]
