"""The documentation agrees with the code: its commands and paths exist, its links lead somewhere, its map is right."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shlex
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import typer
from commands import command
from places import CHECKOUT

import fpxbench
from fpxbench.cli import app

PAGES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")])
SCRIPTS = CHECKOUT / ".github/workflows/nightly.yml", CHECKOUT / "tools/bench.sh"
PACKAGES = sorted(path.parent for top in ("fpxbench", "impls", "reports", "benchmarks")
                  for path in (CHECKOUT / top).rglob("__init__.py")
                  if path.parent.name != "child" and not path.parent.is_symlink()
                  and not any(parent.is_symlink() for parent in path.parents))


def question(package: Path) -> str:
    """Return the first line of a package's docstring."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def test_every_folder_answers_a_question_and_the_map_has_it_word_for_word() -> None:
    folders = [package for package in PACKAGES if package != CHECKOUT / "fpxbench"]
    shown = dict(re.findall(r"^\| `([\w/]+)/` \| (.+) \|$",
                            (CHECKOUT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE))
    rows = {str(folder.relative_to(CHECKOUT)).removeprefix("fpxbench/"): question(folder) for folder in folders}
    assert all(row.endswith("?") for row in rows.values()), "a package's docstring begins with its folder's question"
    assert shown == rows, "docs/architecture.md has a row `| `folder/` | question |` for each package"


def test_the_map_has_the_folders_in_the_order_of_the_layers() -> None:
    tools = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    [layers] = [one["layers"] for one in tools["importlinter"]["contracts"] if one["name"] == "layers"]
    place = {name.strip(" ()"): -at for at, layer in enumerate(layers) for name in layer.split("|")}
    text = (CHECKOUT / "docs/architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    assert shown == sorted(shown, key=place.__getitem__), "the lowest layer of pyproject.toml's contract comes first"


def test_the_map_has_every_module_beside_the_folders_and_every_folder_of_records() -> None:
    text = (CHECKOUT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = {path.name for path in (CHECKOUT / "fpxbench").glob("*.py")} - {"__init__.py", "__main__.py"}
    files = text.partition("| file | contents |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+\.py)`", files)) == modules
    sources = (path.read_text(encoding="utf-8") for path in (CHECKOUT / "fpxbench").rglob("*.py"))
    folders = {name for source in sources for name in re.findall(r' FOLDER: ClassVar\[str\] = "(\w+)"', source)}
    shown = set(re.findall(r"(\w+)/[^`/]*`", text.partition("| path | contents |")[2]))
    assert len(folders) > 8 and folders - shown == set()


def test_every_extra_is_in_the_guide() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    guide = (CHECKOUT / "docs/guide/install.md").read_text(encoding="utf-8")
    names = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.+?) \|", guide, re.MULTILINE)))
    assert sorted(names) == sorted(project["optional-dependencies"])


def test_no_two_python_files_have_the_same_name() -> None:
    tops = ("fpxbench", "impls", "benchmarks", "reports", "tests", "tools")
    files = {path.resolve() for top in tops for path in (CHECKOUT / top).rglob("*.py")}
    assert len(files) > 500
    several = {name for name, count in Counter(path.name for path in files).items() if count > 1}
    assert several == {"__init__.py", "__main__.py"}, "rename one of them (docs/architecture.md)"


def test_no_two_classes_have_the_same_name() -> None:
    tops = ("fpxbench", "impls", "benchmarks", "reports")
    files = {path.resolve() for top in tops for path in (CHECKOUT / top).rglob("*.py")}
    names = Counter(name for path in files
                    for name in set(re.findall(r"^ *class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)))
    several = {name for name, count in names.items() if count > 1}
    assert len(names) > 400 and not several, "a class's name has one meaning (docs/glossary.md)"


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (CHECKOUT / "docs/reference").iterdir())
    assert sorted(re.findall(r"^::: fpxbench\.(\w+)$", pages, re.MULTILINE)) == sorted(fpxbench.__all__)


def fenced(language: str, page: Path) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


def code_spans(page: Path) -> list[str]:
    """Return what a page sets as code within its text: without fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def commands() -> list[tuple[str, str]]:
    """Return every fpxbench command line of the documentation, in a block or in a sentence, and of the scripts that it
    describes; with its page."""
    found = []
    for page in [*PAGES, CHECKOUT / "reports/samples/README.md", *SCRIPTS]:
        blocks = [block for language in ("sh", "console", "") for block in fenced(language, page)]
        lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [span for span in code_spans(page) if "…" not in span]
        if page in SCRIPTS:
            lines = [line.strip().removeprefix("run: ") for line in page.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            for part in re.split(r"&&|\|| > |;", line.partition(" #")[0]):
                if part.strip().startswith("fpxbench ") and "$(" not in part:
                    found.append((str(page.relative_to(CHECKOUT)), part.strip()))
    return list(dict.fromkeys(found))


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_in_the_documentation_exists_with_its_options(page: str, line: str) -> None:
    command, name, context = typer.main.get_command(app), "fpxbench", None
    arguments = shlex.split(line)[1:]
    while arguments:
        context = command.make_context(name, arguments, parent=context)     # raises for an option that is none
        arguments = [*getattr(context, "_protected_args", []),
                     *context.args] if hasattr(command, "resolve_command") else []
        if arguments:
            name, command, arguments = command.resolve_command(context, arguments)
            assert command is not None, f"{line}: there is no command {name!r}"


def test_every_make_target_in_the_documentation_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for block in fenced("sh", page) for name in re.findall(r"\bmake ([a-z]+)", block)}
    assert {"bench", "test"} <= named <= targets


def test_every_page_is_in_the_navigation() -> None:
    def files(entries: list) -> list[str]:
        return [file for entry in entries for value in entry.values()
                for file in (files(value) if isinstance(value, list) else [value])]

    site = tomllib.loads((CHECKOUT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(files(site["nav"])) == sorted(str(page.relative_to(CHECKOUT / "docs"))
                                                for page in PAGES if page.parent != CHECKOUT)


def test_every_relative_link_leads_to_a_file() -> None:
    dead = [f"{page.name}: {target}" for page in PAGES
            for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
            if "://" not in target and not (page.parent / target).exists()]
    assert dead == []


TOPS = ("fpxbench", "impls", "benchmarks", "reports", "tests", "tools", "docs", ".github")
FOREIGN = {"my_kernel.py"}
"""Source files that the text names and that are the reader's own."""


def missing_paths(text: str) -> list[str]:
    """Return the words of `text` that begin with a folder of the checkout and lead nowhere; ``*`` is a wildcard."""
    words = [word.partition("::")[0].rstrip("/") for word in text.split() if not set(word) & set("<>…$")]
    return [word for word in words if word.partition("/")[0] in TOPS and "/" in word
            and not any(CHECKOUT.glob(word))]


def test_every_path_in_the_documentation_exists() -> None:
    assert missing_paths("reports/targets/targets.json impls/_*.py reports/nothing.py -t tests/none::a") == [
        "reports/nothing.py", "tests/none"]
    texts = [(page, text) for page in PAGES
             for text in [*code_spans(page), *fenced("sh", page), *fenced("console", page), *fenced("", page)]]
    assert [f"{page.name}: {path}" for page, text in texts for path in missing_paths(text)] == []


def test_every_source_file_that_the_documentation_names_exists() -> None:
    named = {(page.name, span) for page in PAGES for span in code_spans(page) if re.fullmatch(r"\w+\.(py|cpp)", span)}
    files = {path.name for top in TOPS for path in (CHECKOUT / top).rglob("*.*")} | FOREIGN
    assert len(named) > 20 and [name for name in sorted(named) if name[1] not in files] == []


def test_every_test_that_the_documentation_names_exists() -> None:
    named = {span for page in PAGES for span in code_spans(page) if re.fullmatch(r"test_\w+", span)}
    tests = {name for path in (CHECKOUT / "tests").rglob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert len(named) > 5 and named - tests == set()


def test_every_module_and_name_in_the_documentation_exists() -> None:
    dotted = {span for page in PAGES for span in code_spans(page)
              if re.fullmatch(r"fpxbench(\.\w+)+", span)} - {"fpxbench.implementations"}     # the entry points' group
    assert len(dotted) > 5
    for name in sorted(dotted):
        pkgutil.resolve_name(name)      # raises for one that is none


@pytest.mark.usefixtures("few_targets")
def test_the_first_report_of_the_guide_prints_what_the_guide_shows(tmp_path: Path) -> None:
    [shown] = fenced("console", CHECKOUT / "docs/guide/first-report.md")
    line, *printed = shown.splitlines()
    assert line == "$ fpxbench report --results reports/samples --output sample-report"
    shutil.copytree(CHECKOUT / "reports/samples", tmp_path / "samples")      # an index is written beside records
    run = command("report --results", tmp_path / "samples", "--output", tmp_path / "sample-report")
    assert run.exit_code == 0, run.output
    assert run.stdout.replace(tmp_path.as_uri(), "file:///…").splitlines() == printed


def test_the_kernel_of_the_guide_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    fpxbench.discover()     # the shipped ones stay registered; this one does not
    for name, empty in (("_registry", {}), ("_sources", {}), ("_loaded_paths", set())):
        monkeypatch.setattr(importlib.import_module("fpxbench.implementation"), name, empty)
    [code] = fenced("python", CHECKOUT / "docs/guide/write-a-kernel.md")
    (tmp_path / "my_kernel.py").write_text(code)
    known, _ = fpxbench.discover([tmp_path / "my_kernel.py"])
    kernel = known["my_kernel"]()
    scheme, weight = fpxbench.scheme_named("e4m3fn-row"), torch.randn(64, 128)
    assert kernel.supports(scheme, torch.device("cpu")).supported and not kernel.supports(
        fpxbench.scheme_named("mxfp4"), torch.device("cpu")).supported
    stored, x = kernel.quantize(weight, scheme), torch.randn(3, 128, dtype=torch.bfloat16)
    exact = x.double() @ stored.dequantize().double().T
    assert torch.linalg.norm(kernel.matmul(x, stored).double() - exact) < 0.01 * torch.linalg.norm(exact)
