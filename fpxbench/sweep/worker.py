"""The watched child: call the requested function and write its reply.

A call and its reply are files in a folder shared with the watcher (`fpxbench.sweep.isolation`): ``N.request``,
``N.reply`` and ``N.log``. The pipe between them carries only short messages, so that the watcher cannot block on a
child that died while writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter

from fpxbench.checking import device_lock

_PR_SET_PDEATHSIG = 1
MISTAKES = (ValueError, FileNotFoundError)
"""Exceptions of a function that mean that the user has to correct the request."""


class CallRequest(BaseModel):
    """A call: ``module:function`` and its positional arguments."""

    target: str
    arguments: list[Any]


class Reply(BaseModel):
    """The function's return value, as JSON, or its exception."""

    value: str | None = None
    raised: str = ""
    """The exception's type."""
    message: str = ""
    missing_module: str = ""
    mistake: bool = False
    """Whether the exception is one of `MISTAKES`."""


def serve(connection: Connection, folder: str) -> None:
    """Answer calls until the watcher closes its end of `connection`."""
    _settle_in()
    device_lock.listener = partial(_tell, connection)
    modules = len(sys.modules)
    with contextlib.suppress(EOFError):
        while True:
            number = connection.recv_bytes().decode()
            base = Path(folder) / number
            with _logged(base.with_suffix(".log")):
                reply = _reply(base.with_suffix(".request").read_bytes())
            base.with_suffix(".reply").write_text(reply.model_dump_json(), encoding="utf-8")
            connection.send_bytes(b'["done", ""]')
            if len(sys.modules) > modules:      # new modules (PyTorch's compiler) stay: freeze them for the collector
                modules = len(sys.modules)
                gc.collect()
                gc.freeze()


def _tell(connection: Connection, event: device_lock.Event, message: str) -> None:
    """Forward an event of the device lock; before timing, or if the device is busy, wait until the watcher has stopped
    other children."""
    connection.send_bytes(json.dumps([event, message]).encode())
    if event in ("timing", "busy"):
        connection.recv_bytes()


def _reply(request: bytes) -> Reply:
    try:
        call = CallRequest.model_validate_json(request)
        function = _function(call.target)
        hints = get_type_hints(function)
        names = list(inspect.signature(function).parameters)
        arguments = [
            TypeAdapter(hints[name]).validate_python(value) for name, value in zip(names, call.arguments, strict=True)
        ]
        value = function(*arguments)
        return Reply(value=TypeAdapter(hints["return"]).dump_json(value).decode())
    except BaseException as error:      # the function's SystemExit and KeyboardInterrupt do not end this process
        mistake = isinstance(error, MISTAKES)
        if not mistake:
            traceback.print_exc()
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        return Reply(raised=type(error).__name__, message=str(error), missing_module=missing, mistake=mistake)


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _settle_in() -> None:
    """Give this child its own process group, make it the OOM killer's first choice, disable core files, and end it with
    its watcher."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the watcher handles Ctrl-C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # some containers refuse it, and it is only a preference
        Path("/proc/self/oom_score_adj").write_text("1000")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    watcher = multiprocessing.parent_process()
    if watcher is not None:
        _end_with(watcher.sentinel)


def _end_with(sentinel: int) -> None:
    """Have the kernel kill this process group once the other end of the pipe `sentinel` is closed.

    The parent-death signal does not help: the parent is the fork server, which outlives the watcher. A thread that
    waits for the watcher would need the GIL, which hanging native code may hold.
    """
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


@contextlib.contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Redirect stdout and stderr, including native code's, to the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    saved = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable(file=2)     # a fatal signal leaves Python's stack in the log
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)
