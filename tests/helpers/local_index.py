"""A package index on this machine, of tiny wheels made on the spot: as JSON, as HTML, as a folder; whole, or with what
goes wrong."""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

from packaging.tags import sys_tags

HERE = next(tag for tag in map(str, sys_tags()) if "linux" in tag)
"""The tag of a wheel that this Python installs."""
ELSEWHERE = "cp38-cp38-manylinux2014_x86_64"
GIT = "cf30153c4c131c8164ee7798e5022d810682e2cb"


def wheel(version: str, triton: str | None = None, git: str = GIT, padding: int = 0) -> bytes:
    """Return a wheel of PyTorch with nothing in it but what says which one it is; `padding` bytes of anything else
    stand before that."""
    marker = "" if triton and ";" in triton else '; platform_system == "Linux"'
    requires = f"Requires-Dist: {triton}{marker}\n" if triton else ""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("torch/lib/libtorch.so", b"\0" * padding)
        file.writestr("torch/version.py", f"__version__ = {version!r}\ngit_version = {git!r}\n")
        file.writestr(f"torch-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        file.writestr(
            f"torch-{version}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n{requires}\n",
        )
    return data.getvalue()


def metadata_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("METADATA")))


class Listed:
    """One wheel, and how the index's page lists it."""

    def __init__(
        self,
        version: str,
        tag: str = HERE,
        *,
        triton: str | None = "triton==3.7.1",
        day: str | None = None,
        yanked: bool = False,
        sha256: bool = True,
        metadata: bool | None = True,
        padding: int = 0,
        name: str | None = None,
    ) -> None:
        self.name = name or f"torch-{version}-{tag}.whl"
        self.data = wheel(version, triton, padding=padding)
        self.day, self.yanked, self.metadata = day, yanked, metadata
        self.sha256 = hashlib.sha256(self.data).hexdigest() if sha256 else ""

    def as_json(self) -> dict:
        listed = {
            "filename": self.name,
            "url": f"../../files/{quote(self.name)}",
            "hashes": {"sha256": self.sha256} if self.sha256 else {},
            "yanked": self.yanked,
        }
        if self.day:
            listed["upload-time"] = f"{self.day}T12:00:00Z"
        if self.metadata is not None:
            listed["core-metadata"] = (
                {"sha256": hashlib.sha256(metadata_of(self.data)).hexdigest()} if self.metadata else False
            )
        return listed

    def as_html(self) -> str:
        link = f"../../files/{quote(self.name)}" + (f"#sha256={self.sha256}" if self.sha256 else "")
        marks = (' data-yanked=""' if self.yanked else "") + (' data-core-metadata="true"' if self.metadata else "")
        return f'<a href="{html.escape(link)}"{marks}>{html.escape(self.name)}</a><br>'


def json_page(wheels: list[Listed]) -> bytes:
    return json.dumps(
        {"meta": {"api-version": "1.1"}, "name": "torch", "versions": [], "files": [one.as_json() for one in wheels]}
    ).encode()


def html_page(wheels: list[Listed]) -> bytes:
    return ("<!DOCTYPE html><html><body>\n" + "\n".join(one.as_html() for one in wheels) + "\n</body></html>").encode()


class LocalIndex:
    """``http://127.0.0.1:…/simple``, for as long as the context lasts.

    `asked` is what was asked of it: ``GET /simple/torch/``, ``GET /files/torch-…whl bytes=-65536``. A function in
    `faults` answers in the index's stead where the path matches its pattern.
    """

    def __init__(self, *wheels: Listed, form: str = "json", ranges: bool = True) -> None:
        self.wheels, self.form, self.ranges = list(wheels), form, ranges
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        self.faults: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}

    def __enter__(self) -> LocalIndex:
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # headers and body in one packet: the second of two would wait for 40 ms

            def do_GET(self):
                index.answer(self)

            def date_time_string(self, timestamp=None):
                return "Fri, 20 Nov 2026 08:00:00 GMT"

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                """Print nothing: a client that gives up on a fault is what the tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple"
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path)
        which = request.headers.get("Range")
        self.asked.append(f"GET {path}" + (f" {which}" if which else ""))
        self.headers = dict(request.headers)
        for pattern, fault in self.faults.items():
            if re.search(pattern, path):
                fault(request)
                return
        if path == "/simple/torch/":
            page = json_page(self.wheels) if self.form == "json" else html_page(self.wheels)
            send(request, 200, page,
                 "application/vnd.pypi.simple.v1+json" if self.form == "json" else "text/html; charset=utf-8")
            return
        for one in self.wheels:
            if path == f"/files/{one.name}.metadata" and one.metadata:
                send(request, 200, metadata_of(one.data))
                return
            if path == f"/files/{one.name}":
                self._send_file(request, one.data, which)
                return
        send(request, 404, b"not here")

    def _send_file(self, request: BaseHTTPRequestHandler, data: bytes, which: str | None) -> None:
        if not (which and self.ranges):
            send(request, 200, data)
            return
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", which).groups()
        start, end = (
            (int(first), min(int(last), len(data) - 1)) if first else (max(0, len(data) - int(last)), len(data) - 1)
        )
        send(request, 206, data[start:end + 1], **{"Content-Range": f"bytes {start}-{end}/{len(data)}"})


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    content_type: str = "application/octet-stream",
    **headers: str,
) -> None:
    request.send_response(status)
    for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
