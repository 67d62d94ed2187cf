"""PyTorch builds for asv: its repository is the timeline, and each of its environments holds one build.

Named in ``asv.conf.json``; asv imports it before it opens the repository. Nothing here imports PyTorch.
"""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import psutil
from asv import util
from asv.console import log
from asv.environment import Environment, EnvironmentUnavailable
from asv.machine import Machine, MachineCollection
from asv.plugins.git import Git
from asv.publishing import OutputPublisher

from fpxbench.builds.environments import (
    PARTS,
    REFUSED,
    UNAVAILABLE,
    Builds,
    Environments,
    NotOffered,
    current_build,
    parts_named,
)
from fpxbench.builds.environments.folder import ROOT_VARIABLE
from fpxbench.builds.installed import NoPyTorch, installed_build
from fpxbench.builds.installer import isolated_environment
from fpxbench.builds.timeline import CHANNELS, Timeline, TimelineError
from fpxbench.builds.timeline.measured import measured
from fpxbench.sweep.plan import SHARED_PLAN_VARIABLE

_NAMING = ("FPX_VARIANT", "FPX_PARTS", "FPX_DEVICE")
"""Variables of the process, or of asv's matrix, that select parts of a build."""
_INTERRUPTED = "Interrupted. What was measured is kept; the next run goes on from there."
_NAV_ANCHOR = '<li id="nav-li-regressions">'
_NAV_LINK = '<li id="nav-li-fpxbench"><a href="fpxbench/index.html">fpxbench report</a></li>\n        '


def setup() -> None:
    """Set up this plugin; asv calls it once, on loading."""
    # Benchmarks run in a temporary folder, so that paths must be whole before they get there.
    os.environ["FPX_RESULTS"] = os.path.abspath(os.environ.get("FPX_RESULTS", "results"))
    if implementations := os.environ.get("FPX_IMPLS"):
        os.environ["FPX_IMPLS"] = ",".join(map(os.path.abspath, implementations.split(",")))
    if cases := os.environ.get("FPX_CASES"):
        os.environ["FPX_CASES"] = os.path.abspath(cases)
    _share_plan()
    # asv takes PYTHONPATH from its benchmarks, and with it perhaps the PyTorch that the plugin sees.
    if paths := os.environ.get("PYTHONPATH"):
        os.environ.setdefault("ASV_PYTHONPATH", paths)
    # By default asv would end at once and leave the sweep running in its own process group.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    _introduce_machine()


def _open_progress() -> None:
    """Let the sweep report to asv's own standard error, for asv keeps to itself what a benchmark prints.

    A terminal is handed on as it is, so that a progress bar can be drawn. Anything else goes through a pipe: a file
    that is opened twice would be overwritten, not appended to.
    """
    if "FPX_PROGRESS" in os.environ:
        return
    number = 2
    if not os.isatty(number):
        source, number = os.pipe()

        def copy() -> None:
            while chunk := os.read(source, 1 << 16):
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()

        threading.Thread(target=copy, daemon=True, name="progress").start()
    os.environ["FPX_PROGRESS"] = f"/proc/{os.getpid()}/fd/{number}"


def _share_plan() -> None:
    """Plan the same cases for every build of this run.

    asv names a case to a benchmark by its place in the list that it was given first, and two builds may support
    different ones.
    """
    folder = tempfile.mkdtemp(prefix="fpxbench-plan-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[SHARED_PLAN_VARIABLE] = os.path.join(folder, "cases.json")


def _introduce_machine() -> None:
    """Describe this machine to asv, unless somebody has, with nothing that an update of the system would change.

    Every field is part of the path of a graph: a kernel's version or the last megabyte of memory would start a new
    series.
    """
    Machine.hardcoded_machine_name = os.environ.get("FPX_MACHINE")
    name = Machine.get_unique_machine_name()
    try:
        MachineCollection.load(name)
    except util.UserError:
        facts = Machine.get_defaults() | {"machine": name}
        facts["os"] = platform.system()
        facts["ram"] = f"{round(psutil.virtual_memory().total / 2**30)} GiB"
        MachineCollection.save(name, facts)


class TimelineRepo(Git):
    """The timeline as asv's repository (``"dvcs": "timeline"``). It holds the installed build, and those of all
    records."""

    dvcs = "timeline"

    def __init__(self, url: str, mirror_path: str) -> None:
        timeline = Timeline(url)
        try:
            here = [installed_build()]
        except NoPyTorch as error:  # records from other machines can be shown and published all the same
            log.warning(str(error))
            here = []
        try:
            # Results from elsewhere are published only if their commits are here.
            timeline.add([*here, *(one.build for one in measured(Path(os.environ["FPX_RESULTS"])))])
            for build in here:
                timeline.point_at(build)
        except TimelineError as error:
            raise util.UserError(str(error)) from error
        self._branches = {entry.channel for entry in timeline.entries()}
        super().__init__(url, mirror_path)

    def get_hash_from_name(self, name: str | None) -> str:
        """Return the commit of a name; a channel that has no build yet stands for the installed build, for asv insists
        on every branch it is told of."""
        return super().get_hash_from_name("HEAD" if name in CHANNELS and name not in self._branches else name)

    def get_branch_commits(self, branch: str | None) -> list[str]:
        return [] if branch in CHANNELS and branch not in self._branches else super().get_branch_commits(branch)

    def get_new_branch_commits(self, branches: list[str], existing: list[str]) -> set[str]:
        """Return what `asv run NEW` and `ALL` mean: builds of one channel only, where FPX_CHANNEL names one."""
        if channel := os.environ.get("FPX_CHANNEL"):
            if channel not in CHANNELS:
                raise util.UserError(f"FPX_CHANNEL={channel!r}: one of {', '.join(CHANNELS)}")
            branches = [channel]
        return super().get_new_branch_commits(branches, existing)


class PyTorchEnvironment(Environment):
    """A build of the timeline: in the interpreter that runs asv where that has it, else in an environment made for it.

    Its name holds the Python, the variant and what else was asked for, and no path, so that a series goes on in another
    folder or on a new disk, whichever interpreter a build was measured in.

    A build that cannot be installed fails all its benchmarks, as a build that fails to import does, and asv goes on to
    the next.
    """

    tool_name = "pytorch"

    def __init__(self, conf, python: str, requirements: dict, tagged_env_vars: dict) -> None:
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if python not in (here, "same"):
            raise EnvironmentUnavailable(f"Python {python} was asked for, and this is {here}: run that Python's asv")
        of_matrix = {name: value for (_, name), value in tagged_env_vars.items()}
        asked = {name: os.environ[name] for name in _NAMING if os.environ.get(name)} | of_matrix
        try:
            parts = parts_named(asked["FPX_PARTS"]) if "FPX_PARTS" in asked else PARTS
        except ValueError as error:
            raise util.UserError(str(error)) from None
        current = current_build()
        if current is None and "FPX_VARIANT" not in asked:
            raise EnvironmentUnavailable(
                "no PyTorch is installed for this Python, so that the variant is to be named: FPX_VARIANT=cpu, cu130, …"
            )
        # of the process it says what is walked: a build that is named is measured
        self._channel = of_matrix.get("FPX_CHANNEL")
        self._builds = Builds(timeline=Timeline(conf.repo),
                              environments=Environments(Path(os.environ.get(ROOT_VARIABLE) or conf.env_dir), _say),
                              results=Path(os.environ["FPX_RESULTS"]), variant=asked.get("FPX_VARIANT"), parts=parts,
                              machine=os.environ.get("FPX_MACHINE") or None, device=asked.get("FPX_DEVICE"),
                              here=current)
        self._open = ExitStack()
        self._python_path: Path | None = Path(sys.executable) if current else None
        self._refusal = ""
        variant = asked.get("FPX_VARIANT") or (current.variant if current is not None else None)
        variables = {("nobuild", "FPX_VARIANT"): variant, **tagged_env_vars}
        if parts != PARTS:
            variables["nobuild", "FPX_PARTS"] = ",".join(parts)
        if "FPX_DEVICE" in asked:  # times on a GPU and on the CPU beside it are two series
            variables["nobuild", "FPX_DEVICE"] = asked["FPX_DEVICE"]
        _open_progress()
        self._requirements = requirements  # asv names the environment by these while it sets them
        self._installed = (
            current.key if current and self._builds.variant in (None, current.variant) and parts == PARTS else None
        )
        super().__init__(conf, here, requirements, variables)

    @classmethod
    def matches(cls, python: str) -> bool:
        return True

    @property
    def installed_commit_hash(self) -> str | None:
        return self._installed

    def check_presence(self) -> bool:
        return True

    def create(self) -> None:
        """Do nothing: the current interpreter exists, and others are made when their build is run."""

    def install_project(self, conf, repo, commit_hash: str) -> None:
        """Make ready for the build of `commit_hash`. One that is refused leaves this environment without an
        interpreter.

        Raises asv's UserError where nothing is known of the build (no network, no room): the run ends, and the next
        goes on.
        """
        self._open.close()
        self._installed, self._python_path, self._refusal = None, None, ""
        try:
            entry = self._builds.timeline.find(commit_hash)
            if self._channel and entry.channel != self._channel:
                raise NotOffered(
                    f"{entry.tag} is of the channel {entry.channel}, and this environment of the matrix is for "
                    f"{self._channel}"
                )
            self._python_path = self._open.enter_context(self._builds.interpreter(entry)).python
        except REFUSED as refusal:
            self._refusal = str(refusal)
            log.warning(self._refusal)
        except (TimelineError, *UNAVAILABLE) as error:
            raise util.UserError(str(error)) from error
        except KeyboardInterrupt:
            raise util.UserError(_INTERRUPTED) from None
        self._installed = commit_hash
        self._set_commit_hash(commit_hash)

    def run(self, args: list[str], **kwargs):
        log.debug(f"Running '{' '.join(args)}' in {self.name}")
        if self._python_path is None:
            return self._run_refused(args, **kwargs)
        if self._python_path != Path(sys.executable):
            kwargs["env"] = isolated_environment(kwargs.get("env"))
        try:
            return util.check_output([str(self._python_path), *args], **kwargs)
        except KeyboardInterrupt:
            raise util.UserError(_INTERRUPTED) from None

    def _run_refused(self, args: list[str], **kwargs):
        """Answer as a build whose benchmarks all fail: asv has no other answer for a build that is not installed.

        asv looks for benchmarks in another build then. Its fork server is given a folder without benchmarks, so that
        nothing is measured in another build's place, and the sweep, which they all wait for, ends with the reason.
        """
        action = args[1] if len(args) > 1 else ""
        if action == "setup_cache":
            return self._refusal, "", 1
        if action != "run_server":
            raise util.ProcessError(args, 1, "", self._refusal)
        empty = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="fpxbench-empty-")))
        (empty / "__init__.py").touch()
        return util.check_output([sys.executable, args[0], action, str(empty), *args[3:]], **kwargs)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class ReportPage(OutputPublisher):
    """fpxbench's report, beside asv's own pages and linked from them."""

    name = "fpxbench"
    button_label = "fpxbench report"
    description = "What is wrong, the matrix of verdicts, a page a case"
    order = 100

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions) -> None:
        from fpxbench.reports.site import build_site  # with its templates and charts, no other command needs it

        target = Path(conf.html_dir) / "fpxbench"
        build_site(Path(os.environ["FPX_RESULTS"]), target, Timeline(conf.repo))
        index = Path(conf.html_dir) / "index.html"
        page = index.read_text(encoding="utf-8")
        if _NAV_ANCHOR in page:
            index.write_text(page.replace(_NAV_ANCHOR, _NAV_LINK + _NAV_ANCHOR, 1), encoding="utf-8")
        else:
            log.warning(f"asv's page has changed, and no link was put on it: the report is {target}/index.html")
