"""The watched child: call the requested function and write its reply. Imports none of its callers.

A call and its reply are files in a folder shared with the watcher (`fpxbench.sweep.isolation`): ``N.request``,
``N.reply`` and ``N.log``. The pipe between the two carries only short messages, so that nothing blocks on a child that
died while it wrote.
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
"""What a function raises for a request that its user has to correct."""


class CallRequest(BaseModel):
    """A call: ``module:function`` and its positional arguments."""

    target: str
    arguments: list[Any]


class Reply(BaseModel):
    """Either the function's value, as JSON, or what it raised."""

    value: str | None = None
    raised: str = ""
    """The exception's type."""
    message: str = ""
    missing_module: str = ""
    mistake: bool = False
    """The exception is one of `MISTAKES`."""


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
            if len(sys.modules) > modules:      # modules (PyTorch's compiler) stay: later collections pass them over
                modules = len(sys.modules)
                gc.collect()
                gc.freeze()


def _tell(connection: Connection, event: device_lock.Event, message: str) -> None:
    """Pass an event of the device's lock on; one that is about to time, or finds the device busy, waits until the
    watcher has stopped others."""
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
    except BaseException as error:      # SystemExit and KeyboardInterrupt are the function's own, not this process's
        mistake = isinstance(error, MISTAKES)
        if not mistake:
            traceback.print_exc()
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        return Reply(raised=type(error).__name__, message=str(error), missing_module=missing, mistake=mistake)


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _settle_in() -> None:
    """Give this child a process group of its own, make it the kernel's first choice when memory runs out, write no core
    files, and end it with its watcher."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the watcher handles Ctrl-C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # refused in some containers, where it is only a preference
        Path("/proc/self/oom_score_adj").write_text("1000")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    watcher = multiprocessing.parent_process()
    if watcher is not None:
        _end_with(watcher.sentinel)


def _end_with(sentinel: int) -> None:
    """Have the kernel kill this process group once the other end of the pipe `sentinel` is closed.

    The parent of this process is the fork server, which lives as long as any of its children, so the signal on the
    parent's death does not tell that the watcher is gone. A thread that waits for it would need the interpreter's lock,
    which native code that hangs may hold.
    """
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


@contextlib.contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Send stdout and stderr, those of native code too, to the file `log`."""
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
