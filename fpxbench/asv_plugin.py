"""What asv needs to know about PyTorch builds: its repository is the timeline, its environment the interpreter at hand.

Named in ``asv.conf.json``; asv imports it before it opens the repository. Nothing here imports PyTorch.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from pathlib import Path

import psutil
from asv import util
from asv.console import log
from asv.environment import Environment, EnvironmentUnavailable
from asv.machine import Machine, MachineCollection
from asv.plugins.git import Git
from asv.publishing import OutputPublisher
from packaging.version import Version

from fpxbench.build import NoPyTorch, installed_build
from fpxbench.record import Build, Record
from fpxbench.store import Store
from fpxbench.timeline import CHANNELS, Timeline, TimelineError

_NAV_ANCHOR = '<li id="nav-li-regressions">'
_NAV_LINK = '<li id="nav-li-fpxbench"><a href="fpxbench/index.html">fpxbench report</a></li>\n        '


def setup() -> None:
    """Called by asv, once, as it loads this plugin."""
    # Benchmarks run in a temporary folder, so that paths must be whole before they get there.
    os.environ["FPX_RESULTS"] = os.path.abspath(os.environ.get("FPX_RESULTS", "results"))
    if implementations := os.environ.get("FPX_IMPLS"):
        os.environ["FPX_IMPLS"] = ",".join(map(os.path.abspath, implementations.split(",")))
    # asv takes PYTHONPATH from its benchmarks, and with it perhaps the PyTorch that the plugin sees.
    if paths := os.environ.get("PYTHONPATH"):
        os.environ.setdefault("ASV_PYTHONPATH", paths)
    # By default asv would end at once and leave the sweep running in its own process group.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    _introduce_machine()


def _open_progress() -> None:
    """Let the sweep report to asv's own standard error, for asv keeps to itself what a benchmark prints.

    A terminal is handed on as it is, so that a progress bar can be drawn. Anything else goes through a pipe: a file that is
    opened twice would be overwritten, not appended to.
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


def _introduce_machine() -> None:
    """Describe this machine to asv, unless somebody has, with nothing that an update of the system would change.

    Every field is part of the path of a graph: a kernel's version or the last megabyte of memory would start a new series.
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
    """The timeline as asv's repository (``"dvcs": "timeline"``). It holds the installed build, and those of all records."""

    dvcs = "timeline"

    def __init__(self, url: str, mirror_path: str) -> None:
        timeline = Timeline(url)
        try:
            here = [installed_build()]
        except NoPyTorch as error:  # records from other machines can be shown and published all the same
            log.warning(str(error))
            here = []
        try:
            timeline.hold([*here, *_recorded_builds()])
            for build in here:
                timeline.point_at(build)
        except TimelineError as error:
            raise util.UserError(str(error)) from error
        self._branches = {entry.channel for entry in timeline.entries()}
        super().__init__(url, mirror_path)

    def get_hash_from_name(self, name: str | None) -> str:
        """A channel that has no build yet stands for the installed build, for asv insists on every branch it is told of."""
        return super().get_hash_from_name("HEAD" if name in CHANNELS and name not in self._branches else name)

    def get_branch_commits(self, branch: str | None) -> list[str]:
        return [] if branch in CHANNELS and branch not in self._branches else super().get_branch_commits(branch)


def _recorded_builds() -> list[Build]:
    """The builds that any record is about: results from elsewhere are published only if their commits are here."""
    builds = []
    for path in Store(os.environ["FPX_RESULTS"]).files():
        with open(path, "rb") as lines:  # a file is about one build, so its first readable line tells
            for line in lines:
                try:
                    build = Record.model_validate_json(line).build
                    Version(build.torch)
                except ValueError:  # sweeps and reports name broken lines; InvalidVersion is a ValueError too
                    continue
                builds.append(build)
                break
    return builds


class PyTorchEnvironment(Environment):
    """The interpreter that runs asv, where its PyTorch is the commit's build.

    Its name holds the Python and the variant and no path, so that a series goes on in another folder or on a new disk.
    """

    tool_name = "pytorch"

    def __init__(self, conf, python: str, requirements: dict, tagged_env_vars: dict) -> None:
        try:
            self._build = installed_build()
        except NoPyTorch as error:
            raise EnvironmentUnavailable(str(error)) from error
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if python not in (here, "same"):
            raise EnvironmentUnavailable(f"Python {python} was asked for, and this is {here}: run that Python's asv")
        variables = {("nobuild", "FPX_VARIANT"): self._build.variant, **tagged_env_vars}
        if device := os.environ.get("FPX_DEVICE"):  # times on a GPU and on the CPU beside it are two series
            variables[("nobuild", "FPX_DEVICE")] = device
        _open_progress()
        self._requirements = requirements  # asv names the environment by these while it sets them
        super().__init__(conf, here, requirements, variables)

    @classmethod
    def matches(cls, python: str) -> bool:
        return True

    @property
    def installed_commit_hash(self) -> str:
        return self._build.key

    def check_presence(self) -> bool:
        return True

    def create(self) -> None:
        """Nothing to do: it is there."""

    def install_project(self, conf, repo, commit_hash: str) -> None:
        """Raises asv's UserError if the commit is another build than the one at hand."""
        if commit_hash != self._build.key:
            raise util.UserError(
                f"{repo.get_decorated_hash(commit_hash)} is not the PyTorch at hand, which is {self._build.torch}: "
                "`asv run HEAD` measures that one; for the other, run the asv of a Python that has it"
            )
        self._set_commit_hash(commit_hash)

    def run(self, args: list[str], **kwargs):
        log.debug(f"Running '{' '.join(args)}' in {self.name}")
        try:
            return util.check_output([sys.executable, *args], **kwargs)
        except KeyboardInterrupt:
            raise util.UserError("Interrupted. What was measured is kept; the next run goes on from there.") from None


class ReportPage(OutputPublisher):
    """fpxbench's report, beside asv's own pages and linked from them."""

    name = "fpxbench"
    button_label = "fpxbench report"
    description = "What is wrong, the matrix of verdicts, a page a case"
    order = 100

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions) -> None:
        from fpxbench.reports.build import build_site  # with its templates and charts, no other command needs it

        target = Path(conf.html_dir) / "fpxbench"
        build_site(Path(os.environ["FPX_RESULTS"]), target)
        index = Path(conf.html_dir) / "index.html"
        page = index.read_text(encoding="utf-8")
        if _NAV_ANCHOR in page:
            index.write_text(page.replace(_NAV_ANCHOR, _NAV_LINK + _NAV_ANCHOR, 1), encoding="utf-8")
        else:
            log.warning(f"asv's page has changed, and no link was put on it: the report is {target}/index.html")
