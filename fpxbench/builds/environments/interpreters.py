"""The Python in which a build of the timeline is measured: the one at hand where it has that build, else an environment's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fpxbench.builds.environments.folder import CannotInstall, Environment, Environments
from fpxbench.builds.environments.installations import record_installation
from fpxbench.builds.environments.specification import PARTS, EnvironmentSpec, environment_spec
from fpxbench.builds.installed import NoPyTorch, installed_build
from fpxbench.builds.timeline import Entry, Timeline
from fpxbench.builds.timeline.entry import DEFAULT_VARIANT
from fpxbench.records.record import Build

_JUST_NOW_S = 60.0


@dataclass(frozen=True)
class Interpreter:
    """``PYTHON -m fpxbench …`` measures `build`."""

    python: Path
    build: Build
    own: bool
    """The Python at hand, in which nothing was installed."""


def current_build() -> Build | None:
    """The build that this Python has, if it has one."""
    try:
        return installed_build()
    except NoPyTorch:
        return None


def current_variant(build: Build) -> str:
    """The variant as wheels have it: a build whose version names none is what pip takes where nothing is said."""
    _, _, local = build.torch.partition("+")
    return local if local and build.channel != "source" else DEFAULT_VARIANT


@dataclass
class Builds:
    """The builds of a timeline, ready to be measured. What does not install is written down, once."""

    timeline: Timeline
    environments: Environments
    results: Path
    variant: str | None = None
    """None: that of the PyTorch at hand, or what pip would choose."""
    parts: tuple[str, ...] = PARTS
    machine: str | None = None
    device: str | None = None
    retry: bool = False
    here: Build | None = field(default_factory=current_build)

    @contextmanager
    def interpreter(self, entry: Entry) -> Iterator[Interpreter]:
        """Where to measure `entry`, made if need be, and kept until the context ends.

        Raises what `Environments.lease` does, and NotOffered for a build or a variant that cannot be installed from anywhere.
        """
        if self.is_current(entry):
            yield Interpreter(Path(sys.executable), self.here, own=True)
            return
        with ExitStack() as stack:
            environment = self._lease(entry, stack)
            yield Interpreter(environment.python, environment.build, own=False)

    def _lease(self, entry: Entry, stack: ExitStack) -> Environment:
        asked = self.spec(entry)
        try:
            environment = stack.enter_context(self.environments.lease(asked, self.retry))
        except CannotInstall as refusal:
            if refusal.state.age_s < _JUST_NOW_S or asked.variant not in entry.failures:
                record_installation(refusal.state, self.results, self.timeline, self.machine, self.device)
            raise
        if asked.variant in entry.failures:     # mended since
            record_installation(environment.state, self.results, self.timeline, self.machine, self.device)
        return environment

    def is_current(self, entry: Entry) -> bool:
        """The Python at hand has this build, whole and for the variant that is asked for."""
        if self.here is None or entry.key != self.here.key or self.parts != PARTS:
            return False
        return self.variant in (None, self.here.variant, current_variant(self.here))

    def spec(self, entry: Entry) -> EnvironmentSpec:
        variant = self.variant or (current_variant(self.here) if self.here else None)
        return environment_spec(entry, variant, self.parts)
