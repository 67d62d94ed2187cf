"""A function called on each of many requests, each call in a forked child of its own, some at a time.

The children of one warm process cost milliseconds; what ends one (a signal, a hang, native code's exit) ends only that one.
"""

import json
import os
import re
import select
import shutil
import signal
import tempfile
import time

LOG_BYTES = 4096
_MODULES = re.compile(rb"\n+Extension modules: [^\n]*")


class _Call:
    """One request on its way: its child, the pipe of its answer, the folder of its files."""

    def __init__(self, request, function, scratch):
        self.request = request
        self.folder = tempfile.mkdtemp(dir=scratch)
        self.log = os.path.join(self.folder, "log")
        self.started = time.monotonic()
        self.answer = b""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _child(request, function, self.folder, self.log, writing)
        os.close(writing)
        self.pipe = reading

    def ended(self, status, usage, timeout_s):
        """The answer of a child that has ended, with its log; its files are gone then. `status` is None if it was ended."""
        with open(self.log, "rb") as file:
            log = _both_ends(_MODULES.sub(b"", file.read())).decode(errors="replace")
        # What it had started (ptxas, a linker) belongs to its process group and goes with it.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        os.close(self.pipe)
        shutil.rmtree(self.folder, ignore_errors=True)
        # Of the processor, the assembler's included: what it took, however busy the machine was.
        said = {"id": self.request["id"], "seconds": round(usage.ru_utime + usage.ru_stime, 3)}
        if status is None:
            said["timeout"] = timeout_s
        elif os.WIFSIGNALED(status):
            said["signal"] = os.WTERMSIG(status)
        elif os.WEXITSTATUS(status) or not self.answer:
            said["exit"] = os.WEXITSTATUS(status)
        else:
            said.update(json.loads(self.answer))
        if log.strip():
            said["log"] = log
        return said


def _child(request, function, folder, log, writing):
    """The forked child: never returns."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "cache")
    tempfile.tempdir = folder
    try:
        answer = {"compiled": function(request)}
    except Exception as error:
        answer = {"raised": _words(error)}
    with os.fdopen(writing, "w") as pipe:
        pipe.write(json.dumps(answer))
    os._exit(0)


def _both_ends(log):
    """What was said first and last: MLIR says why, then prints all of the module, then that it failed."""
    half = LOG_BYTES // 2
    return log if len(log) <= LOG_BYTES else log[:half] + b"\n[...]\n" + log[-half:]


def _words(error):
    """Type and message; of an error that only wraps another (a CompilationError), the cause's words as well."""
    message = str(error)
    if error.__cause__ is not None and str(error.__cause__) not in message:
        message += "\n" + str(error.__cause__)
    return [type(error).__name__, message[-LOG_BYTES:]]


def run_each(requests, function, jobs, timeout_s):
    """Answers, as they come: see `_Call.ended`. Whatever ends this generator ends its children."""
    scratch = tempfile.mkdtemp(prefix="fpxbench-targets-")
    waiting = list(reversed(requests))
    running = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                call = _Call(waiting.pop(), function, scratch)
                running[call.pipe] = call
            first_deadline = min(call.started for call in running.values()) + timeout_s
            ready, _, _ = select.select(list(running), [], [], max(0.0, first_deadline - time.monotonic()))
            for pipe in ready:
                call = running[pipe]
                part = os.read(pipe, 1 << 16)
                call.answer += part
                if not part:        # the child closed it, by ending or just before
                    del running[pipe]
                    yield call.ended(*_waited_for(call, timeout_s), timeout_s)
            for call in [call for call in running.values() if time.monotonic() - call.started >= timeout_s]:
                del running[call.pipe]
                yield call.ended(None, _killed(call), timeout_s)
    finally:
        for call in running.values():
            _killed(call)
        shutil.rmtree(scratch, ignore_errors=True)


def _waited_for(call, timeout_s):
    """Status and resource usage of a child whose pipe is closed; the status is None if it hung on its way out."""
    while time.monotonic() - call.started < timeout_s:
        pid, status, usage = os.wait4(call.pid, os.WNOHANG)
        if pid:
            return status, usage
        time.sleep(0.001)
    return None, _killed(call)


def _killed(call):
    try:
        os.killpg(call.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):   # it had no time to found its group
        os.kill(call.pid, signal.SIGKILL)
    return os.wait4(call.pid, 0)[2]
