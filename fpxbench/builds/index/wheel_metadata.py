"""Read a wheel's metadata without downloading it: the Triton that it requires, and its upstream commit if cheap."""

from __future__ import annotations

import hashlib
import re
import zipfile
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from typing import cast

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import parse_wheel_filename

from fpxbench.builds.index.fetch import Fetcher, NoRanges, NotThere, Unreachable
from fpxbench.builds.index.listing import ListedWheel
from fpxbench.builds.installed import TRITON_DISTRIBUTIONS, git_commit, string_constants
from fpxbench.builds.timeline.entry import NO_TRITON, UNKNOWN_TRITON

_MAX_MEMBER_BYTES = 4 << 20


@dataclass(frozen=True)
class WheelMetadata:
    """The Triton that a wheel requires, and the commit that it was built from."""

    triton: str
    """``triton==3.7.1``, `NO_TRITON`, or `UNKNOWN_TRITON`."""
    git: str | None = None


def read_wheel_metadata(listed: ListedWheel, fetcher: Fetcher, with_git: bool = False) -> WheelMetadata:
    """Return the metadata of one wheel, from the metadata file beside it if any, else from parts of the wheel.

    with_git : always read the wheel (1.5 MB of PyTorch's), since only it has the upstream commit

    Raise NotThere if the wheel is gone, Unreachable if it cannot be read now.
    """
    if listed.has_metadata is not False and not with_git:
        try:
            page = fetcher.get(f"{listed.url}.metadata")
        except NotThere:  # some indexes announce a file that they do not have; a removed wheel is detected below
            pass
        except Unreachable:
            if listed.has_metadata:
                raise
        else:
            digest = hashlib.sha256(page.body).hexdigest()
            if listed.metadata_sha256 and digest != listed.metadata_sha256:
                raise Unreachable(f"{page.url} differs from the index's hash (sha256 {digest[:12]}…, not "
                                  f"{listed.metadata_sha256[:12]}…)")
            return WheelMetadata(required_triton(page.body, listed.wheel.filename))
    try:
        with fetcher.open(listed.url) as file:
            return _from_wheel(file, listed)
    except NoRanges:
        return WheelMetadata(UNKNOWN_TRITON)


def _from_wheel(file, listed: ListedWheel) -> WheelMetadata:
    name = listed.wheel.filename
    try:
        with zipfile.ZipFile(file) as wheel:
            (metadata,) = (entry for entry in wheel.infolist()
                           if re.fullmatch(r"torch-[^/]+\.dist-info/METADATA", entry.filename))
            version_file = next((entry for entry in wheel.infolist() if entry.filename == "torch/version.py"), None)
            texts = [_member(wheel, entry) if entry else b"" for entry in (metadata, version_file)]
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise Unreachable(f"{name} is not a complete wheel of PyTorch: {error}") from error
    try:
        git = git_commit(string_constants(texts[1].decode(errors="replace")).get("git_version"))
    except (SyntaxError, ValueError):
        git = None
    return WheelMetadata(required_triton(texts[0], name), git)


def _member(wheel: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > _MAX_MEMBER_BYTES:
        raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
    return wheel.read(entry)


def required_triton(metadata: bytes, filename: str) -> str:
    """Return the Triton that a wheel's METADATA requires, for the Python and machine in the wheel's name."""
    environment = _environment(filename)
    for line in BytesHeaderParser().parsebytes(metadata).get_all("Requires-Dist", []):
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name.lower().replace("_", "-") not in TRITON_DISTRIBUTIONS:
            continue
        if requirement.marker is None or requirement.marker.evaluate(environment):
            return f"{requirement.name}{requirement.specifier}"
    return NO_TRITON


def _environment(filename: str) -> dict[str, str]:
    """Return the environment to evaluate markers in: the wheel's, not this machine's, so that every machine agrees."""
    tag = min(parse_wheel_filename(filename)[3], key=str)
    environment = {**cast(dict[str, str], default_environment()), "platform_system": "Linux", "sys_platform": "linux",
                   "os_name": "posix", "extra": ""}
    if match := re.fullmatch(r"cp(\d)(\d+)", tag.interpreter):
        environment |= {"python_version": f"{match[1]}.{match[2]}", "python_full_version": f"{match[1]}.{match[2]}.0"}
    if match := re.search(r"x86_64|aarch64|ppc64le|s390x", tag.platform):
        environment |= {"platform_machine": match[0]}
    return environment
