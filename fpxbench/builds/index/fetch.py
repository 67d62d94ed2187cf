"""Fetch pages, files and parts of files from ``https:``, ``http:`` and ``file:`` addresses, with pip's settings.

Every failure is reported in one sentence with the address, without credentials.
"""

from __future__ import annotations

import io
import ipaddress
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

import requests
from requests.adapters import HTTPAdapter
from urllib3 import disable_warnings
from urllib3.exceptions import HTTPError, InsecureRequestWarning
from urllib3.util import Retry

from fpxbench import __version__
from fpxbench.builds.index.pip_settings import PipSettings

MAX_PAGE_BYTES = 256 << 20
MAX_RANGED_BYTES = 16 << 20
"""Largest part of one wheel that is read: its directory (2 MB for PyTorch) and two small files."""
_TAIL_BYTES = 1 << 16


class Unreachable(RuntimeError):
    """The address gave no complete answer."""


class NotThere(Unreachable):
    """The server answered that nothing is at this address."""


class NoRanges(Unreachable):
    """The server does not support range requests."""


@dataclass(frozen=True)
class Page:
    """A complete answer."""

    url: str
    body: bytes
    content_type: str = "text/html"
    charset: str | None = None
    day: str | None = None
    """YYYY-MM-DD by the server's clock."""


def without_credentials(url: str) -> str:
    """Return the address without user, password and query (maybe a signature), so that it can be shown and stored."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def local_path(url: str) -> Path | None:
    """Return the path of a ``file:`` address; None for any other."""
    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


class Fetcher:
    """Fetches addresses one after the other and keeps connections open. Not thread-safe."""

    def __init__(self, settings: PipSettings) -> None:
        self._settings = settings
        self._session = requests.Session()
        self._session.headers["User-Agent"] = f"fpxbench/{__version__}"
        if settings.proxy:
            self._session.proxies = {"http": settings.proxy, "https": settings.proxy}
        self._session.cert = settings.client_cert
        # Retry a server that does not answer only once (pip: five times), since a sync is repeated anyway.
        retry = Retry(total=min(settings.retries, 3), read=min(settings.retries, 1), backoff_factor=0.25,
                      status_forcelist=(500, 502, 503, 504), raise_on_status=False)
        self._session.mount("https://", _Adapter(_trusting(settings.cert), max_retries=retry))
        self._session.mount("http://", HTTPAdapter(max_retries=retry))
        if settings.trusted_hosts:  # the user's choice: no warning at each request
            disable_warnings(InsecureRequestWarning)
        for host in settings.trusted_hosts:
            for end in "/" if ":" in host else "/:":    # a prefix alone would hold for every host that begins so
                self._session.mount(f"https://{host}{end}", _Adapter(None, max_retries=retry))
        # A limit on the sum of all waits: a slow server keeps each single wait short.
        self._total_s = max(settings.timeout_s, min(10 * settings.timeout_s, 300.0))

    def get(self, url: str, accept: str = "*/*") -> Page:
        """Return the whole page. Raise NotThere, Unreachable."""
        if (path := local_path(url)) is not None:
            return _read(path, url)
        with self._request(url, {"Accept": accept}) as response:
            body = self._body(response, MAX_PAGE_BYTES)
            kind, _, parameters = response.headers.get("Content-Type", "text/html").partition(";")
            charset = parameters.partition("charset=")[2].strip(" \"'") or None
            return Page(response.url, body, kind.strip().lower(), charset, _day(response.headers.get("Date")))

    def open(self, url: str) -> BinaryIO:
        """Open the file at `url` for reading in parts, at most `MAX_RANGED_BYTES` in all.

        Raise NotThere, NoRanges, Unreachable.
        """
        if (path := local_path(url)) is not None:
            try:
                return open(path, "rb")
            except FileNotFoundError:
                raise NotThere(f"{path} no longer exists") from None
            except OSError as error:
                raise Unreachable(f"{path} cannot be read: {error.strerror}") from error
        return io.BufferedReader(_RemoteFile(self, url), _TAIL_BYTES)

    def part(self, url: str, which: str) -> tuple[bytes, int]:
        """Return bytes `which` (as in HTTP's ``Range: bytes=``) of the file at `url`, and the size of the file."""
        with self._request(url, {"Range": f"bytes={which}", "Accept-Encoding": "identity"}) as response:
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code != 206 or not size.isdigit():
                raise NoRanges(f"{without_credentials(url)}: the server does not support range requests")
            return self._body(response, MAX_RANGED_BYTES), int(size)

    def _request(self, url: str, headers: dict[str, str]) -> requests.Response:
        shown = without_credentials(url)
        if not self._secure(url):
            raise Unreachable(f"{shown} is plain http, which can be modified in transit: use https, or add the host to "
                              "pip's `trusted-host`")
        try:
            # `verify` as an argument: the environment's REQUESTS_CA_BUNDLE takes precedence over the session's.
            response = self._session.get(
                url, headers=headers, stream=True, timeout=self._settings.timeout_s, verify=self._settings.cert or True)
        except (requests.RequestException, HTTPError, OSError) as error:
            raise Unreachable(f"{shown} {_reason(error, self._settings.timeout_s)}") from error
        if response.status_code in (404, 410):
            raise NotThere(f"{shown} does not exist (HTTP {response.status_code})")
        if response.status_code >= 400:
            # Storage services also answer 403 for files that do not exist.
            hint = ": it needs credentials, or does not exist" if response.status_code in (401, 403) else ""
            raise Unreachable(f"{shown} answers HTTP {response.status_code}{hint}")
        return response

    def _body(self, response: requests.Response, limit: int) -> bytes:
        shown = without_credentials(response.url)
        parts, size, started = [], 0, time.monotonic()
        try:
            while part := response.raw.read1(1 << 16, decode_content=True):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise Unreachable(f"{shown} is longer than {limit >> 20} MiB, more than any index page")
                if time.monotonic() - started > self._total_s:
                    raise Unreachable(f"{shown} is too slow: {size} bytes in {self._total_s:.0f} s")
        except (HTTPError, OSError) as error:
            raise Unreachable(f"{shown} {_reason(error, self._settings.timeout_s)}") from error
        return b"".join(parts)

    def _secure(self, url: str) -> bool:
        parts = urlsplit(url)
        names = {parts.hostname, parts.netloc.rpartition("@")[2]}
        if parts.scheme == "https" or names & set(self._settings.trusted_hosts):
            return True
        try:
            return parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
        except ValueError:
            return False


class _Adapter(HTTPAdapter):
    """HTTPS with the certificates of `context`; None: they are not checked."""

    def __init__(self, context: ssl.SSLContext | None, **options) -> None:
        self._context = context
        super().__init__(**options)

    def init_poolmanager(self, *args, **options) -> None:
        if self._context:
            options["ssl_context"] = self._context
        super().init_poolmanager(*args, **options)

    def cert_verify(self, connection, url, verify, cert) -> None:
        super().cert_verify(connection, url, verify if self._context else False, cert)


def _trusting(cert: str | None) -> ssl.SSLContext:
    """Return a context that trusts `cert`, or the system's certificates (requests alone uses its own list only)."""
    try:
        return ssl.create_default_context(cafile=cert)
    except OSError as error:
        raise Unreachable(f"pip is configured with certificates in {cert}, which cannot be read: {error}") from error


class _RemoteFile(io.RawIOBase):
    """A file on a server, read by ranges."""

    def __init__(self, fetcher: Fetcher, url: str) -> None:
        self._fetcher, self._url = fetcher, url
        # A zip's directory is at its end.
        self._tail, self._size = fetcher.part(url, f"-{_TAIL_BYTES}")
        self._position, self._fetched = 0, len(self._tail)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        in_tail = start - (self._size - len(self._tail))
        if in_tail >= 0:
            data = self._tail[in_tail:in_tail + end - start]
        else:
            self._fetched += end - start
            if self._fetched > MAX_RANGED_BYTES:
                raise NoRanges(f"{without_credentials(self._url)}: more than {MAX_RANGED_BYTES >> 20} MiB would have "
                               "to be read")
            data, _ = self._fetcher.part(self._url, f"{start}-{end - 1}")
        buffer[:len(data)] = data
        self._position += len(data)
        return len(data)


def _read(path: Path, url: str) -> Page:
    try:
        return Page(url, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotThere(f"{path} does not exist") from None
    except OSError as error:
        raise Unreachable(f"{path} cannot be read: {error.strerror}") from error


def _day(header: str | None) -> str | None:
    try:
        return parsedate_to_datetime(header).date().isoformat() if header else None
    except ValueError:
        return None


def _reason(error: Exception, timeout_s: float) -> str:
    """Return the reason for `error`, from the innermost error that the libraries have wrapped."""
    chain: list[BaseException] = [error]
    while inner := getattr(chain[-1], "reason", None) or chain[-1].__cause__ or chain[-1].__context__:
        if not isinstance(inner, BaseException) or inner in chain:
            break
        chain.append(inner)
    text = " ".join(f"{type(one).__name__} {one}" for one in chain)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "has a certificate that is not trusted here: `pip config set global.cert FILE` adds one"
    if "IncompleteRead" in text or "InvalidChunkLength" in text:
        return "broke off in the middle; the partial page was not used"
    if "Timeout" in text or "timed out" in text:
        return f"did not answer within {timeout_s:g} s"
    if "ProxyError" in text:
        return f"cannot be reached through the proxy: {chain[-1]}"
    if "NameResolution" in text or "gaierror" in text:
        return "cannot be reached: its name does not resolve (no network?)"
    if "Connection refused" in text:
        return "cannot be reached: the connection was refused"
    return f"cannot be read: {chain[-1]}"
