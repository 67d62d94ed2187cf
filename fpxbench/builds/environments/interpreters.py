"""Choose the Python in which a build is measured: the current one if it has that build, else an environment's."""

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
    """Whether this is the Python that runs fpxbench."""


def current_build() -> Build | None:
    """Return the build that this Python has, or None."""
    try:
        return installed_build()
    except NoPyTorch:
        return None


def current_variant(build: Build) -> str:
    """Return the variant as wheels name it; ``default`` for a version without one."""
    _, _, local = build.torch.partition("+")
    return local if local and build.channel != "source" else DEFAULT_VARIANT


@dataclass
class Builds:
    """The builds of a timeline, installed when they are needed. A failed installation is recorded once."""

    timeline: Timeline
    environments: Environments
    results: Path
    variant: str | None = None
    """None: the current PyTorch's, else what pip would choose."""
    parts: tuple[str, ...] = PARTS
    machine: str | None = None
    device: str | None = None
    retry: bool = False
    here: Build | None = field(default_factory=current_build)

    @contextmanager
    def interpreter(self, entry: Entry) -> Iterator[Interpreter]:
        """Yield the Python that measures `entry`, installing it if necessary and keeping it until the context ends.

        Raise what `Environments.lease` does, and NotOffered for a build or a variant that no index offers.
        """
        if self.here is not None and self.is_current(entry):
            yield Interpreter(Path(sys.executable), self.here, own=True)
            return
        with ExitStack() as stack:
            environment = self._lease(entry, stack)
            yield Interpreter(environment.python, environment.build, own=False)

    def _lease(self, entry: Entry, stack: ExitStack) -> Environment:
        spec = self.spec(entry)
        try:
            environment = stack.enter_context(self.environments.lease(spec, self.retry))
        except CannotInstall as refusal:
            if refusal.state.age_s < _JUST_NOW_S or spec.variant not in entry.failures:
                record_installation(refusal.state, self.results, self.timeline, self.machine, self.device)
            raise
        if spec.variant in entry.failures:     # repaired since
            record_installation(environment.state, self.results, self.timeline, self.machine, self.device)
        return environment

    def is_current(self, entry: Entry) -> bool:
        """Return whether this Python has the build, with all its parts, for the requested variant."""
        if self.here is None or entry.key != self.here.key or self.parts != PARTS:
            return False
        return self.variant in (None, self.here.variant, current_variant(self.here))

    def spec(self, entry: Entry) -> EnvironmentSpec:
        variant = self.variant or (current_variant(self.here) if self.here else None)
        return environment_spec(entry, variant, self.parts)
