"""Compile many probes for many architectures with one Triton build: a warm process of it, and a fork for each cell.

Answers are cached by (Triton build, source, signature, target, options).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fpxbench.cache_folder import cache_root
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.operations import KERNELS, ProbeSpec, Request
from fpxbench.targets.triton_builds import TritonInstall

CHILD = Path(__file__).with_name("child")
TIMEOUT_S = 120.0
LINKERS = ("/opt/rocm/llvm/bin/ld.lld", "ld.lld", *(f"ld.lld-{version}" for version in range(22, 15, -1)))
"""Linkers for AMD's objects, which Triton before 3.5 needs: ROCm's, else a substitute."""

Answer = dict[str, Any]
Cell = tuple[ProbeSpec, Architecture]


class UnusableTriton(RuntimeError):
    """A Triton that cannot be run; the message says why."""


@dataclass
class Answers:
    """The answers of one build."""

    triton: str
    key: str
    python: str
    torch: str
    """The PyTorch beside it; empty for none."""
    linker: str
    unknown: dict[str, str]
    """Architectures that the build does not know, with its message."""
    by_cell: dict[tuple[str, str], Answer] = field(default_factory=dict)
    """By probe and architecture; none for an unknown architecture."""
    asked: int = 0
    """Cells that were compiled now; the others were cached."""


def compile_cells(
    build: TritonInstall, cells: Sequence[Cell], jobs: int | None = None, timeout_s: float = TIMEOUT_S,
    fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Compile each cell with one build. Ctrl-C ends everything that this started, and keeps the answers so far.

    Raises UnusableTriton for a build that cannot be imported.
    """
    with _Compiler(build, jobs or os.cpu_count() or 1, timeout_s) as child:
        about = child.about
        answers = Answers(about["triton"], hashlib.sha256(about["key"].encode()).hexdigest(), about["python"],
                          about["torch"],
                          "built in" if about["links_in_process"] else child.linker, {})
        known = _AnswerCache(answers.key, answers.linker, answers.torch)
        if fresh:
            known.forget()
        architectures = {architecture.name: architecture for _, architecture in cells}
        copies = {name: _copy(architecture) for name, architecture in architectures.items()}
        for name, answer in _answered(copies, child, known, answers, lambda: None):
            if (message := _not_known(answer)) is not None:
                answers.unknown[name] = message
        requests = {(q.id, a.name): q.request(a) for q, a in cells if a.name not in answers.unknown}
        done = 0

        def one_more() -> None:
            nonlocal done
            done += 1
            progress(done, len(requests))

        for cell, answer in _answered(requests, child, known, answers, one_more):
            answers.by_cell[cell] = answer
    return answers


def _answered(
    requests: dict[Any, Request], child: _Compiler, known: _AnswerCache, answers: Answers, one_more: Callable[[], None]
) -> Iterator[tuple[Any, Answer]]:
    """Yield answers by the requests' keys: cached ones first, then the others as they arrive."""
    names = {key: known.name(request) for key, request in requests.items()}
    for key, name in names.items():
        if name in known.answers:
            one_more()
            yield key, known.answers[name]
    left = [key for key, name in names.items() if name not in known.answers]
    answers.asked += len(left)
    for position, answer in child.batch([requests[key] for key in left]):
        known.keep(names[left[position]], answer)
        one_more()
        yield left[position], answer


def _copy(architecture: Architecture) -> Request:
    """Return the request of a kernel that copies fp32 numbers: it compiles for every known architecture."""
    return {"file": str(KERNELS), "kernel": "convert", "signature": {"source": "*fp32", "out": "*fp32"},
            "divisible": ["out", "source"],
            "constants": {"BLOCK": 128}, "options": {"num_warps": 1}, **architecture.target}


def _not_known(copied: Answer) -> str | None:
    """Return why a build does not know an architecture, from its answer to the plain copy; None if it does."""
    log = copied.get("log", "")
    for line in log.splitlines():
        if "is not a recognized processor" in line:
            return line.strip()
    if "compiled" in copied and copied["compiled"]["object_bytes"]:
        return None
    return (copied.get("raised") or ["", log])[1].strip()[-400:] or "a plain copy does not compile"


class _Compiler:
    """The warm process of a build, as a context that ends it."""

    def __init__(self, build: TritonInstall, jobs: int, timeout_s: float) -> None:
        self._build = build
        self._settings = {"jobs": jobs, "timeout_s": timeout_s}
        self.linker = _linker()

    def __enter__(self) -> _Compiler:
        self._errors = tempfile.TemporaryFile()
        environment = self._build.environment | {"TRITON_DEFAULT_FP_FUSION": "1"}    # 3.10 changes the default
        if self.linker:
            environment["TRITON_HIP_LLD_PATH"] = self.linker
        # A session of its own: Ctrl-C reaches this process, which ends that one and its children in order.
        self._process = subprocess.Popen(self._build.command(CHILD), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._errors,
                                         env=environment, text=True, start_new_session=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self._send([self._settings])
            first = self._receive()
            if "unusable" in first:
                raise UnusableTriton(f"Triton {self._build.requested} cannot be imported: {first['unusable']}")
        except BaseException:
            self.__exit__()
            raise
        self.about = first["build"]
        return self

    def batch(self, requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield answers as they arrive, each with its request's position."""
        if requests:
            self._send([request | {"id": position} for position, request in enumerate(requests)])
            self._requests.write("\n")
            self._requests.flush()
        for _ in requests:
            answer = self._receive()
            yield answer.pop("id"), answer

    def _send(self, messages: list[dict]) -> None:
        with contextlib.suppress(BrokenPipeError):      # it has ended; reading reports that
            self._requests.writelines(json.dumps(message) + "\n" for message in messages)
            self._requests.flush()

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        last = [text for text in self._errors.read().decode(errors="replace").splitlines() if text.strip()][-1:]
        raise UnusableTriton(f"Triton {self._build.requested} ended its process with {self._process.returncode}: "
                             f"{''.join(last) or 'no output'}")

    def __exit__(self, *error: object) -> None:
        for stream in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class _AnswerCache:
    """The cached answers of one build, one JSON line each; a line that a killed run left unfinished is skipped."""

    def __init__(self, key: str, linker: str, torch: str) -> None:
        self._path = cache_root() / "targets" / f"{key[:32]}.jsonl"
        self._linker, self._torch = linker, torch
        self.answers: dict[str, Answer] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    kept = json.loads(line)
                    self.answers[kept["name"]] = kept["answer"]

    def forget(self) -> None:
        self.answers.clear()
        self._path.unlink(missing_ok=True)

    def name(self, request: Request) -> str:
        """Return the cache key of a request: besides the build an answer depends on its source and the child's code,
        for AMD on the linker, for Inductor on PyTorch.
        """
        source = _digest(Path(request["file"]))
        others = [self._linker] if request["backend"] == "hip" else [""]
        if "inductor" in request:
            others.append(self._torch)
        whole = json.dumps([{**request, "file": source}, _digest(CHILD), *others], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    def keep(self, name: str, answer: Answer) -> None:
        if "timeout" in answer:     # the machine may have been overloaded
            return
        self.answers[name] = answer
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\n" * (not _ends_whole(self._path)) + json.dumps({"name": name, "answer": answer}) + "\n")


def _ends_whole(path: Path) -> bool:
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


@cache
def _digest(path: Path) -> str:
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _linker() -> str:
    """Return a linker for AMD's objects: TRITON_HIP_LLD_PATH, ROCm's, or a substitute; empty if there is none."""
    named = os.environ.get("TRITON_HIP_LLD_PATH")
    return named or next((path for path in map(shutil.which, LINKERS) if path), "")
