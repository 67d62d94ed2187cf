"""Which Python runs a build?

Each build has an environment, made once and kept (docs/asv.md, "Environments"), so that two builds can be measured
interleaved and differ in nothing else: fpxbench and the libraries that it uses are shared with the Python that makes
the environment (`shared_packages`); only PyTorch, Triton and their own requirements are installed
(`fpxbench.builds.installer`). Commands and asv get a build's Python from `Builds`.
"""

from fpxbench.builds.environments.folder import (
    CannotInstall,
    DiskFull,
    Environment,
    Environments,
    IndexUnreachable,
    InUse,
    default_root,
)
from fpxbench.builds.environments.installations import Installation
from fpxbench.builds.environments.interpreters import Builds, Interpreter, current_build
from fpxbench.builds.environments.shared_packages import NotInstalled
from fpxbench.builds.environments.specification import (
    PARTS,
    EnvironmentSpec,
    EnvironmentState,
    NotOffered,
    environment_spec,
    parts_named,
)
from fpxbench.builds.installer import NoInstaller

UNAVAILABLE = (IndexUnreachable, DiskFull, NoInstaller, NotInstalled)
"""Reasons for a missing environment although the build may be fine."""

REFUSED = (CannotInstall, NotOffered)
"""Reasons why this build, but maybe not others, cannot be measured here."""

__all__ = [
    "PARTS", "REFUSED", "UNAVAILABLE", "Builds", "CannotInstall", "DiskFull", "Environment", "EnvironmentSpec",
    "EnvironmentState", "Environments", "InUse", "IndexUnreachable", "Installation", "Interpreter", "NoInstaller",
    "NotInstalled", "NotOffered", "current_build", "default_root", "environment_spec", "parts_named",
]
