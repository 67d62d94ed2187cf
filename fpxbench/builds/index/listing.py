"""Read the wheels of PyTorch that a package index lists, with their hashes and dates."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError
from pypi_simple import DistributionPackage, ProjectPage, UnexpectedRepoVersionWarning, UnsupportedRepoVersionError

from fpxbench.builds.index.fetch import Fetcher, NotThere, Page, Unreachable, local_path, without_credentials
from fpxbench.builds.index.pip_settings import PipSettings
from fpxbench.builds.timeline.entry import Wheel

PROJECT = "torch"
NIGHTLY_INDEX = "https://download.pytorch.org/whl/nightly/{variant}"
RELEASE_INDEX = "https://download.pytorch.org/whl/{variant}"

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html; q=0.2, text/html; q=0.1"
# PyTorch's first release was in 2016; some mirrors date every file 1970.
_FIRST_YEAR = 2016
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._+!-]+")


@dataclass(frozen=True)
class IndexLocation:
    """A package index, or a page or folder of links, that lists wheels."""

    url: str
    """The page is ``URL/torch/`` for an index, and `url` itself for links."""
    links: bool = False
    arguments: tuple[str, ...] = ()
    """The options with which pip looks there; empty if its own configuration names the location."""

    @property
    def address(self) -> str:
        return without_credentials(self.url)


@dataclass(frozen=True)
class ListedWheel:
    """A wheel as a page lists it."""

    wheel: Wheel
    url: str
    version: Version
    day: str | None
    """YYYY-MM-DD of its upload, if the page has it."""
    has_metadata: bool | None
    """Whether its metadata is a file beside it; None: unknown."""
    metadata_sha256: str | None


@dataclass
class Listing:
    """Everything that one location lists."""

    location: IndexLocation
    wheels: list[ListedWheel] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """Files whose names are not valid names of wheels."""
    day: str | None = None
    """YYYY-MM-DD by the server's clock."""


def pip_locations(settings: PipSettings) -> list[IndexLocation]:
    """Return where ``pip install torch`` would look."""
    indexes = () if settings.no_index else (settings.index_url, *settings.extra_index_urls)
    return [*map(index_location, dict.fromkeys(indexes)),
            *(index_location(url, links=True) for url in dict.fromkeys(settings.find_links))]


def index_location(url: str, links: bool = False, arguments: tuple[str, ...] = ()) -> IndexLocation:
    """Return the location of an address or a path. Raise ValueError for anything else."""
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        path = local_path(url) or Path(url).expanduser()
        url = path.absolute().as_uri()
        # A folder with a page for the project is an index; one with the wheels themselves is not.
        links = links or not (path / PROJECT).is_dir()
    elif scheme not in ("http", "https"):
        raise ValueError(f"{without_credentials(url)!r} is not a package index: use an https, http or file address, or "
                         "a folder")
    return IndexLocation(url.rstrip("/"), links, arguments)


def extra_location(url: str) -> IndexLocation:
    """Return a location that is not in pip's own configuration, with the options that name it."""
    found = index_location(url)
    return index_location(url, found.links, ("--find-links" if found.links else "--extra-index-url", found.address))


def read_listing(location: IndexLocation, fetcher: Fetcher) -> Listing:
    """Return the wheels of PyTorch that `location` lists: none for one of pip's own indexes without a page for PyTorch.

    Raise Unreachable if it cannot be read completely; NotThere if the user named it and it has no such page.
    """
    path = local_path(location.url)
    if path is not None and location.links and path.is_dir():
        return _of_folder(location, path)
    url = location.url if location.links else f"{location.url}/{PROJECT}/" + ("index.html" if path is not None else "")
    try:
        page = fetcher.get(url, accept="text/html" if location.links else _ACCEPT)
    except NotThere:
        if location.links or location.arguments or path is not None and not path.exists():
            raise
        return Listing(location)
    listing = Listing(location, day=page.day)
    for package in _packages(page):
        _add(listing, package)
    return listing


def _of_folder(location: IndexLocation, folder: Path) -> Listing:
    listing = Listing(location)
    for path in sorted(folder.glob("*.whl")):
        _add(listing, DistributionPackage(
            filename=path.name, url=path.as_uri(), project=None, version=None, package_type=None, digests={},
            requires_python=None, has_sig=None))
    return listing


def _packages(page: Page) -> list[DistributionPackage]:
    shown = without_credentials(page.url)
    try:
        if page.content_type.endswith("json"):
            return ProjectPage.from_json_data(json.loads(page.body), page.url).packages
        if page.content_type not in ("text/html", "application/vnd.pypi.simple.v1+html", "application/xhtml+xml"):
            raise Unreachable(f"{shown} is {page.content_type}, not a page of a package index")
        text = page.body.lower()
        if b"<html" in text and b"</html" not in text:
            raise Unreachable(f"{shown} broke off in the middle; the partial page was not used")
        return ProjectPage.from_html(PROJECT, page.body, page.url, page.charset).packages
    except json.JSONDecodeError as error:
        raise Unreachable(f"{shown} broke off in the middle, or is not JSON: {error}. It was not used") from error
    except (ValidationError, UnsupportedRepoVersionError, UnexpectedRepoVersionWarning) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{first['loc']}: {first['msg']}" if first else error
        raise Unreachable(f"{shown} is not the page of a package index: {reason}") from error


def _add(listing: Listing, package: DistributionPackage) -> None:
    # The address has the name; a link's text may be shortened.
    name = unquote(urlsplit(package.url).path.rpartition("/")[2])
    if not name.endswith(".whl") or canonicalize_name(name.partition("-")[0]) != PROJECT:
        return
    try:
        if not _PLAIN_NAME.fullmatch(name):
            raise InvalidWheelFilename(name)
        _, version, _, tags = parse_wheel_filename(name)
    except (InvalidWheelFilename, InvalidVersion):
        listing.unreadable.append(name)
        return
    if not any("linux" in tag.platform or tag.platform == "any" for tag in tags):
        return
    day = package.upload_time.astimezone(UTC).date() if package.upload_time else None
    listing.wheels.append(ListedWheel(
        wheel=Wheel(filename=name, sha256=package.digests.get("sha256", ""), yanked=package.is_yanked), url=package.url,
        version=version, day=day.isoformat() if day and day.year >= _FIRST_YEAR else None,
        has_metadata=package.has_metadata, metadata_sha256=(package.metadata_digests or {}).get("sha256")
    ))
