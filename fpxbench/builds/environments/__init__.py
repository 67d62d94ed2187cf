"""Environments of builds: one each, made once, cheap to come back to (docs/asv.md, "Environments").

Two builds can then be measured alternately, and what differs between them is the build: fpxbench and the libraries that it works
with are shared with the Python that makes the environment (`shared`), and only PyTorch, Triton and what these bring are installed
(`installer`). `Builds` is what commands and asv ask for a build's Python.
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
from fpxbench.builds.environments.installer import NoInstaller
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

UNAVAILABLE = (IndexUnreachable, DiskFull, NoInstaller, NotInstalled)
"""Why there is no environment, other than for what the build is: nothing is known of the build."""

REFUSED = (CannotInstall, NotOffered)
"""Why a build cannot be measured here. The next one can."""

__all__ = [
    "PARTS", "REFUSED", "UNAVAILABLE", "Builds", "CannotInstall", "DiskFull", "Environment", "Environments", "InUse", "IndexUnreachable", "Installation",
    "Interpreter", "NoInstaller", "NotInstalled", "NotOffered", "EnvironmentState", "EnvironmentSpec", "current_build", "default_root", "parts_named", "environment_spec",
]
