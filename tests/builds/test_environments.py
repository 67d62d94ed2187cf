"""A build's environment is made once, complete or not at all, and has that build and nothing of the current one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy
import pytest
from commands import command
from small_index import offline, write_torch, write_wheel

from fpxbench.builds.environments import (
    Builds,
    CannotInstall,
    DiskFull,
    Environments,
    IndexUnreachable,
    Installation,
    InUse,
    NotOffered,
    environment_spec,
    parts_named,
    shared_packages,
)
from fpxbench.builds.environments.shared_packages import distributions
from fpxbench.builds.index.pip_settings import PipSettings
from fpxbench.builds.installer import isolated_environment, uv_options
from fpxbench.builds.timeline import Entry, IndexedBuild, Timeline, Wheel
from fpxbench.cli.common import UsageError
from fpxbench.records.record import Build
from fpxbench.records.store import Store

TRITON_ONLY = ("triton",)
GIT = "c" * 40


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return a folder of wheels that is all that the installer knows of."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "FPX_"))]:
        monkeypatch.delenv(name)
    for name, value in offline(tmp_path).items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def pip(index, monkeypatch):
    """Have pip install from the index."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("FPX_INSTALLER", "pip")


@pytest.fixture
def environments(tmp_path):
    return Environments(tmp_path / "environments")


def nightly(day, triton=None, **more):
    return Entry(channel="nightly", torch=f"2.15.0.dev202611{day:02}", date=f"2026-11-{day:02}", triton=triton, **more)


def small(day=1, triton="9.1"):
    """Return the Triton of a build, which is a few bytes here: most tests of environments need no more."""
    return environment_spec(nightly(day, triton), parts=TRITON_ONLY)


def write_small(index, version="9.1", requires=(), text="value = 1"):
    write_wheel(index, "triton", version, {"triton/__init__.py": text}, requires)


def python(environment, code):
    done = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, env=isolated_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installations(environments, request):
    """Return how often the installer was started for it."""
    return (environments.root / request.name / "install.log").read_text().count("$ uv pip install")


def fake_uv(tmp_path, script):
    """Write a uv that does what `script` says."""
    (tmp_path / "bin/uv").write_text(f"#!/bin/sh\n{script}\n")


# What it holds.


def test_an_environment_has_its_own_pytorch_and_shares_what_fpxbench_works_with(index, pip, environments):
    write_torch(index, "2.15.0.dev20261101+cpu", GIT)
    with environments.lease(environment_spec(nightly(1), "cpu")) as environment:
        build = environment.build
        assert (build.torch, build.git, build.channel) == ("2.15.0.dev20261101+cpu", GIT, "nightly")
        seen = json.loads(python(environment, """
            import importlib.metadata, json, numpy, fpxbench, fpxbench.builds.environments
            print(json.dumps([importlib.metadata.version("torch"), numpy.__version__, fpxbench.__file__]))
        """.replace("\n            ", "\n")))
        assert seen[:2] == ["2.15.0.dev20261101+cpu", numpy.__version__]
        assert environment.size < 30e6, "libraries are linked, not copied"


def test_an_environment_of_one_part_does_not_see_the_current_pythons_other_part(index, environments):
    write_small(index)
    with environments.lease(small()) as environment:
        assert python(environment, "import triton; print(triton.value)") == "1"
        assert python(environment, "import importlib.util; print(importlib.util.find_spec('torch'))") == "None"


def test_nothing_of_the_current_build_is_shared():
    names = {distribution.name.lower() for distribution in distributions()}
    assert {"fpxbench", "numpy", "pydantic", "asv_runner"} <= {name.replace("-", "_") for name in names}
    assert not names & {"torch", "triton", "sympy"}, "sympy is only PyTorch's"


def test_what_reads_models_is_shared_and_a_wheel_of_model_files_without_what_it_requires(monkeypatch):
    names = {distribution.name.lower() for distribution in distributions()}
    for name in ("gguf", "accelerate"):
        assert (name in names) == (importlib.util.find_spec(name) is not None)
    monkeypatch.setattr(shared_packages, "OF_MODELS", ("ml-dtypes",))
    monkeypatch.setattr(shared_packages, "_requirements", lambda distribution, extras: [])
    assert "ml_dtypes" in {distribution.name for distribution in distributions()}


def test_the_second_time_nothing_is_installed(index, environments):
    write_small(index)
    request = small()
    with environments.lease(request):
        pass
    index.rename(index.with_name("index-that-is-gone"))
    with environments.lease(request) as environment:
        assert python(environment, "import triton; print(triton.value)") == "1"


def test_libraries_that_changed_are_linked_anew_and_the_build_is_kept(index, environments):
    write_small(index)
    request = small()
    with environments.lease(request) as environment:
        state = environment.folder / "environment.json"
    state.write_text(state.read_text().replace(environment.state.shared, "of another day"))
    (environment.folder / "shared" / "numpy").unlink()
    with environments.lease(request) as environment:
        python(environment, "import numpy, triton")
    assert installations(environments, request) == 1


def test_two_processes_that_want_one_environment_make_it_once(index, environments, tmp_path):
    write_small(index)
    request = small()
    (tmp_path / "request.json").write_text(request.model_dump_json())
    code = f"""
from pathlib import Path
from fpxbench.builds.environments import Environments, EnvironmentSpec
request = EnvironmentSpec.model_validate_json(Path({str(tmp_path / 'request.json')!r}).read_text())
with Environments(Path({str(environments.root)!r})).lease(request) as environment:
    print(environment.state.status)
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=600)[0].strip() for process in both] == ["ready", "ready"]
    assert installations(environments, request) == 1


# What goes wrong.


def test_a_build_that_does_not_install_keeps_pips_last_lines_and_is_not_retried_the_same_day(index, pip, environments):
    write_small(index, requires=("nothing-is-called-this==99",))
    request = small()
    with pytest.raises(CannotInstall,
                       match="found for nothing-is-called-this==99") as first, environments.lease(request):
        pass
    assert "nothing-is-called-this" in first.value.state.log_tail
    assert not (environments.root / request.name / "venv").exists(), "what is no use takes no room"

    write_small(index)   # the index is mended
    with pytest.raises(CannotInstall), environments.lease(request):
        pass
    with environments.lease(request, retry=True) as environment:
        assert environment.state.status == "ready"


def test_after_a_day_a_build_that_did_not_install_is_tried_again(index, environments):
    write_small(index, requires=("nothing-is-called-this==99",))
    request = small()
    with pytest.raises(CannotInstall), environments.lease(request):
        pass
    write_small(index)
    file = environments.root / request.name / "environment.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"made_at": (datetime.now(UTC) - timedelta(hours=25)).isoformat()}))
    with environments.lease(request) as environment:
        assert environment.state.status == "ready"


def test_a_build_that_cannot_be_imported_is_refused_with_its_message(index, environments):
    write_small(index, text="raise ImportError('libcudart.so.13: cannot open shared object file')")
    imported = pytest.raises(CannotInstall, match="cannot be imported: ImportError: libcudart.so.13")
    with imported, environments.lease(small()):
        pass


def test_a_wheel_that_holds_another_build_than_it_says_is_refused(index, environments):
    path = write_torch(index, "2.15.0.dev20261101+cpu", GIT)
    other = "__version__ = '2.15.0.dev20261101+cpu'\n"
    write_wheel(index, "torch", "2.15.0.dev20261102+cpu", {"torch/__init__.py": "", "torch/version.py": other})
    assert path.exists()
    spec = environment_spec(nightly(2), "cpu")
    with pytest.raises(CannotInstall, match="gave PyTorch 2.15.0.dev20261101"), environments.lease(spec):
        pass


def test_an_index_that_is_down_says_nothing_of_the_build(index, pip, environments, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(IndexUnreachable, match="did not answer") as down, environments.lease(small()):
        pass
    assert "secret" not in str(down.value)
    assert not (environments.root / small().name).exists()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    write_small(index)
    with environments.lease(small()) as environment:     # and the next try goes on
        assert environment.state.status == "ready"


def test_a_full_disk_leaves_nothing_half_made_and_says_how_to_make_room(index, environments, tmp_path):
    fake_uv(tmp_path, "echo 'error: failed to write: No space left on device (os error 28)'; exit 1")
    with pytest.raises(DiskFull, match="fpxbench environments remove"), environments.lease(small()):
        pass
    assert environments.all() == []


def test_a_creation_that_is_killed_leaves_nothing_that_looks_complete(index, environments, tmp_path):
    request = small()
    (tmp_path / "request.json").write_text(request.model_dump_json())
    fake_uv(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 300")
    code = f"""
from pathlib import Path
from fpxbench.builds.environments import Environments, EnvironmentSpec
request = EnvironmentSpec.model_validate_json(Path({str(tmp_path / 'request.json')!r}).read_text())
with Environments(Path({str(environments.root)!r})).lease(request):
    pass
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 600
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait(600)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert environments.all() == [(request.name, None)]

    offline(tmp_path)
    write_small(index)
    with environments.lease(request) as environment:
        assert environment.state.status == "ready"


# Room.


def test_what_is_in_use_is_not_removed_and_what_is_not_is(index, environments):
    write_small(index)
    request = small()
    with environments.lease(request), pytest.raises(InUse, match="in use"):
        environments.remove(request.name)
    assert environments.remove(request.name) > 0
    assert environments.all() == []
    with pytest.raises(FileNotFoundError, match="no environment"):
        environments.remove(request.name)


@pytest.mark.parametrize("name", ["..", "../x", "", "."])
def test_only_an_environment_can_be_removed(environments, name):
    environments.root.mkdir()
    with pytest.raises(FileNotFoundError):
        environments.remove(name)
    assert environments.root.exists()


def test_the_commands_show_sizes_and_make_room(index, environments):
    write_small(index)
    with environments.lease(small()) as environment:
        name, size = environment.folder.name, environment.size
    listed = json.loads(ask("list", "--environments", str(environments.root), "--json"))
    assert [(each["name"], each["status"], each["bytes"]) for each in listed] == [(name, "ready", size)]
    assert name in ask("list", "--environments", str(environments.root))

    assert "0.0 MB freed" in ask("remove", "--unused-for", "1", "--environments", str(environments.root))
    os.utime(environments.root / f"{name}.lock", (0, 0))     # as if it had been used last in 1970
    assert "0.0 MB freed" not in ask("remove", "--unused-for", "1", "--environments", str(environments.root))
    assert environments.all() == []
    with pytest.raises(UsageError, match="nothing to remove"):
        ask("remove")


def ask(*arguments):
    done = command("environments", *arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


# Which environment.


def listed(*filenames, **more):
    wheels = tuple(Wheel(filename=name) for name in filenames)
    return nightly(1, sources={"https://x": IndexedBuild(wheels=wheels)}, **more)


def test_an_environment_is_named_after_build_variant_python_and_parts():
    entry = listed("torch-2.15.0.dev20261101+cu130-cp311-cp311-linux_x86_64.whl", triton="3.9.0")
    here = f"py{sys.version_info.major}.{sys.version_info.minor}"
    assert environment_spec(entry, "cu130").name == f"nightly-20261101-cu130-{here}"
    assert environment_spec(entry, "cu130", TRITON_ONLY).name == f"nightly-20261101-cu130-{here}-triton"
    assert environment_spec(entry, "cu130").requirements == ("torch==2.15.0.dev20261101+cu130", "triton==3.9.0")
    assert environment_spec(entry, "cu130", TRITON_ONLY).requirements == ("triton==3.9.0",)


def test_what_no_index_has_is_not_tried():
    with pytest.raises(NotOffered, match="no variant 'cpu'.*cu130"):
        environment_spec(listed("torch-2.15.0.dev20261101+cu130-cp311-cp311-linux_x86_64.whl"), "cpu")
    with pytest.raises(NotOffered, match="built from source"):
        environment_spec(Entry(channel="source", torch="2.15.0a0+gitabc", git=GIT, triton="3.9.0"))
    with pytest.raises(NotOffered, match="the Triton of .* is unknown"):
        environment_spec(nightly(1), parts=TRITON_ONLY)
    with pytest.raises(ValueError, match="FPX_PARTS='torhc'"):
        parts_named("torhc")


def test_uv_looks_where_pip_is_configured_to_look():
    settings = PipSettings(index_url="https://mirror/simple", extra_index_urls=("file:///a",), find_links=("/wheels",),
                           trusted_hosts=("mirror",))
    assert list(uv_options(settings)) == [
        "--index-strategy", "unsafe-best-match", "--index-url", "https://mirror/simple", "--extra-index-url",
        "file:///a",
        "--find-links", "/wheels", "--allow-insecure-host", "mirror",
    ]
    assert "--no-index" in list(uv_options(PipSettings(no_index=True)))


# Findings.


@pytest.fixture
def builds(tmp_path, environments):
    timeline = Timeline(tmp_path / "timeline")
    timeline.merge([nightly(1, triton="9.1")])
    return Builds(timeline, environments, tmp_path / "results", variant="cpu", parts=TRITON_ONLY, machine="here",
                  here=None)


def test_a_build_that_does_not_install_is_a_finding_on_the_timeline_and_in_the_results_until_it_does(index, builds):
    write_small(index, requires=("nothing-is-called-this==99",))
    for _ in range(2):      # the second time it is known, and recorded only once
        with pytest.raises(CannotInstall), builds.interpreter(builds.timeline.find("nightly-20261101")):
            pass
    entry = builds.timeline.find("nightly-20261101")
    assert "nothing-is-called-this" in entry.failures["cpu"].log_tail
    read, broken = Store(builds.results, Installation).read_all()
    found = {(each.status, each.machine.name, each.build.key) for each in read}
    assert not broken and found == {("failed", "here", entry.key)}
    assert "nothing-is-called-this" in read[0].why
    assert read[0].machine.device != "unknown", "the current PyTorch describes the machine"

    write_small(index)
    builds.retry = True
    with builds.interpreter(entry) as interpreter:
        assert not interpreter.own
    assert builds.timeline.find("nightly-20261101").failures == {}
    assert Store(builds.results, Installation).read_all()[0][-1].status == "ready"


def test_the_current_build_is_used_without_an_environment(builds, tmp_path):
    from fpxbench.builds.installed import installed_build

    here = installed_build()
    builds.timeline.add([here])
    own = Builds(builds.timeline, builds.environments, tmp_path / "results")
    with own.interpreter(builds.timeline.find(here.key)) as interpreter:
        assert interpreter.own and interpreter.python == Path(sys.executable)
    assert not builds.environments.root.exists()


def test_a_failure_is_not_recorded_for_another_build_that_is_leased(index, builds):
    write_small(index)
    write_small(index, "9.2", requires=("nothing-is-called-this==99",))
    builds.timeline.merge([nightly(2, triton="9.2")])
    first, second = builds.timeline.entries()
    with ExitStack() as stack, pytest.raises(CannotInstall):
        stack.enter_context(builds.interpreter(first))
        stack.enter_context(builds.interpreter(second))
    assert [bool(entry.failures) for entry in builds.timeline.entries()] == [False, True]


def test_a_build_record_is_no_secret_of_the_index(index, pip, builds, monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://user:secret@127.0.0.1:9/simple")
    write_small(index, requires=("nothing-is-called-this==99",))
    with pytest.raises(CannotInstall), builds.interpreter(builds.timeline.find("nightly-20261101")):
        pass
    assert "secret" not in "".join(path.read_text() for path in builds.results.rglob("*.jsonl"))
    assert Build.model_validate(Store(builds.results, Installation).read_all()[0][0].build)
