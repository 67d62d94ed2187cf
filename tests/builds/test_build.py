"""The installed PyTorch is identified from its files: build, channel and variant."""

import subprocess
import sys
import textwrap

import pytest
from packaging.requirements import Requirement

from fpxbench.builds.installed import NoPyTorch, installed_build, read_build

GIT = "cf30153c4c131c8164ee7798e5022d810682e2cb"


def version_file(folder, version, **facts):
    """Return a version.py as PyTorch's build writes it, annotations included."""
    lines = [f"__version__ = {version!r}", "debug = False", f"git_version = {facts.pop('git', GIT)!r}"]
    lines += [f"{name}: Optional[str] = {facts.get(name)!r}" for name in ("cuda", "hip", "rocm", "xpu")]
    path = folder / "version.py"
    path.write_text("from typing import Optional\n\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("version", "facts", "channel", "variant", "date"), [
    ("2.13.0+cpu", {}, "release", "cpu", None), ("2.13.0+cu130", {"cuda": "13.0"}, "release", "cu130", None),
    ("2.13.0", {"cuda": "12.8"}, "release", "cu128", None), ("2.13.0", {}, "release", "cpu", None),
    ("2.14.0rc2+cu130", {"cuda": "13.0"}, "release", "cu130", None),
    ("2.13.0+rocm7.2", {"hip": "7.2.43482-0f2d60242"}, "release", "rocm7.2", None),
    ("2.13.0", {"hip": "7.2.43482-0f2d60242"}, "release", "rocm7.2", None),
    ("2.13.0+xpu", {"xpu": "20250302"}, "release", "xpu", None),
    ("2.15.0.dev20261120+cu130", {"cuda": "13.0"}, "nightly", "cu130", "2026-11-20"),
    ("2.15.0.dev20261120", {"cuda": "13.0"}, "nightly", "cu130", "2026-11-20"),
    ("2.15.0a0+gitcf30153", {"cuda": "13.0"}, "source", "cu130", None),
    ("2.15.0a0+cf30153c4c.nv26.10", {"cuda": "13.1"}, "source", "cu131", None),
    ("2.15.0.dev3+local", {}, "source", "cpu", None), ("2.15.0.dev20261399", {}, "source", "cpu", None)
])
def test_channel_variant_and_date_are_read_from_the_version(tmp_path, version, facts, channel, variant, date):
    build = read_build(version_file(tmp_path, version, **facts))
    assert (build.torch, build.channel, build.variant, build.date) == (version, channel, variant, date)
    assert build.git == GIT


def test_a_build_made_outside_git_has_no_commit(tmp_path):
    assert read_build(version_file(tmp_path, "2.13.0", git="Unknown")).git is None


def test_a_release_with_another_triton_than_its_own_is_a_build_of_its_own(tmp_path):
    path = version_file(tmp_path, "2.13.0+cu130", cuda="13.0")
    declared = Requirement("triton==3.7.1")
    own, foreign = (read_build(path, triton=version, declared_triton=declared) for version in ("3.7.1", "3.9.0"))
    assert (own.channel, foreign.channel) == ("release", "source")
    assert own.key != foreign.key


def test_a_release_that_asks_for_no_triton_takes_any(tmp_path):
    path = version_file(tmp_path, "2.13.0+cpu")
    assert {read_build(path, triton=version).key for version in (None, "3.7.1", "3.9.0")} == {read_build(path).key}


@pytest.mark.parametrize("text", ["", "__version__ = 'main'", "__version__ = None", "__version__ = ("])
def test_a_version_file_that_says_too_little_is_named(tmp_path, text):
    path = tmp_path / "version.py"
    path.write_text(text)
    with pytest.raises(NoPyTorch, match="version.py"):
        read_build(path)


def test_a_version_file_is_read_and_never_run(tmp_path):
    path = tmp_path / "version.py"
    path.write_text(f"__version__ = '2.13.0'\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    assert read_build(path).torch == "2.13.0"
    assert not (tmp_path / "ran").exists()


def test_the_installed_build_is_what_pytorch_says_of_itself_and_is_found_without_importing_it():
    code = """
        import sys
        from fpxbench.builds.installed import installed_build
        build = installed_build()
        assert "torch" not in sys.modules and "triton" not in sys.modules
        import torch
        assert build.torch == torch.__version__, (build.torch, torch.__version__)
        assert build.git == torch.version.git_version
        print(build.key)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == installed_build().key


@pytest.fixture
def other_python(tmp_path):
    """Return an interpreter with nothing installed, fpxbench included."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return tmp_path / "venv/bin/python"


def install(python, version, requires="", triton=None):
    """Write what identifies a PyTorch, in the site-packages of `python`."""
    (site_packages,) = python.parent.parent.glob("lib/python*/site-packages")
    (site_packages / "torch").mkdir()
    (site_packages / "torch/__init__.py").write_text("raise ImportError('no test imports this')\n")
    version_file(site_packages / "torch", version, cuda="13.0")
    for name, number, more in (("torch", version, requires), ("triton", triton, "")):
        if number:
            (site_packages / f"{name}-{number}.dist-info").mkdir()
            (site_packages / f"{name}-{number}.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: "
                f"{name}\nVersion: {number}\n{more}")


def test_the_build_of_another_interpreter_is_found_without_fpxbench_there(other_python):
    install(other_python, "2.14.1+cu130", "Requires-Dist: triton~=3.8.0\n", triton="3.8.0")
    build = installed_build(str(other_python))
    assert (build.torch, build.channel, build.variant, build.triton, build.git) == ("2.14.1+cu130", "release", "cu130",
                                                                                    "3.8.0", GIT)


def test_the_triton_that_another_interpreters_pytorch_asks_for_is_heeded(other_python):
    install(other_python, "2.14.1+cu130", "Requires-Dist: triton~=3.8.0\n", triton="3.9.0")
    assert installed_build(str(other_python)).channel == "source"


def test_a_pytorch_in_the_current_folder_is_not_mistaken_for_the_interpreters(other_python, tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoPyTorch, match="no PyTorch is installed for .*venv/bin/python"):
        installed_build(str(other_python))


@pytest.mark.parametrize("python", ["/nowhere/python", "no-such-python", "/bin/true", "/bin/false"])
def test_what_is_no_interpreter_is_named(python):
    with pytest.raises(NoPyTorch, match=python):
        installed_build(python)


def test_without_pytorch_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoPyTorch, match="pip install torch"):
        installed_build()
