"""An HTTP server on this machine that keeps what it is sent, and a GitHub of one repository."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = Callable[["Request"], tuple[int, Any]]


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: Any


@dataclass
class LocalServer:
    """Where it is, and what it was sent."""

    url: str
    requests: list[Request] = field(default_factory=list)

    def bodies(self, method: str = "POST") -> list[Any]:
        """Return the bodies of the requests with `method`."""
        return [each.body for each in self.requests if each.method == method]


@contextmanager
def serving(answer: Answer = lambda request: (200, {})) -> Iterator[LocalServer]:
    """Run a server that answers with a status and JSON, while the context lasts."""
    held: LocalServer

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            request = Request(self.command, parts.path, parse_qs(parts.query), dict(self.headers),
                              json.loads(text) if text else None)
            held.requests.append(request)
            status, content = answer(request)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = _any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held = LocalServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FakeGitHub:
    """Issues and comments, as GitHub's REST API lists, opens and edits them. Needs the token ``t0ken``."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def __call__(self, request: Request) -> tuple[int, Any]:
        if request.headers.get("Authorization") != "Bearer t0ken":
            return 401, {"message": "Bad credentials"}
        if request.method == "GET":
            size, page = int(request.query["per_page"][0]), int(request.query["page"][0])
            return 200, self.entries[(page - 1) * size:page * size]
        if request.method == "POST":
            number = len(self.entries) + 1
            entry = {"number": number, "id": 1000 + number, "html_url": f"https://github.example/{number}",
                     **request.body}
            self.entries.append(entry)
            return 201, entry
        number = int(request.path.rpartition("/")[2])
        [entry] = [each for each in self.entries if number in (each["number"], each["id"])]
        entry.update(request.body)
        return 200, entry
