"""Call a function on each of many requests, each in a forked child, several at a time.

A fork of a warm process takes milliseconds; a signal, a hang or an exit in native code ends only one child.
"""

import contextlib
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


class _ForkedCall:
    """A running request: its child, the pipe for its answer, the folder of its files."""

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
        """Return the answer of an ended child, with its log, and remove its files. `status` is None if it was killed.
        """
        with open(self.log, "rb") as file:
            log = _both_ends(_MODULES.sub(b"", file.read())).decode(errors="replace")
        # What it started (ptxas, a linker) is in its process group, and is killed with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        shutil.rmtree(self.folder, ignore_errors=True)
        # Processor time, the assembler's included: independent of the machine's load.
        answer = {"id": self.request["id"], "seconds": round(usage.ru_utime + usage.ru_stime, 3)}
        if status is None:
            answer["timeout"] = timeout_s
        elif os.WIFSIGNALED(status):
            answer["signal"] = os.WTERMSIG(status)
        elif os.WEXITSTATUS(status) or not self.answer:
            answer["exit"] = os.WEXITSTATUS(status)
        else:
            answer.update(json.loads(self.answer))
        if log.strip():
            answer["log"] = log
        return answer


def _child(request, function, folder, log, writing):
    """Run in the forked child; never returns."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "cache")
    tempfile.tempdir = folder
    try:
        answer = {"compiled": function(request)}
    except Exception as error:
        answer = {"raised": _type_and_message(error)}
    with os.fdopen(writing, "w") as pipe:
        pipe.write(json.dumps(answer))
    os._exit(0)


def _both_ends(log):
    """Return the beginning and the end: MLIR prints the reason, then the whole module, then that it failed."""
    half = LOG_BYTES // 2
    return log if len(log) <= LOG_BYTES else log[:half] + b"\n[...]\n" + log[-half:]


def _type_and_message(error):
    """Return type and message; for an error that wraps another (a CompilationError) the cause's message too."""
    message = str(error)
    if error.__cause__ is not None and str(error.__cause__) not in message:
        message += "\n" + str(error.__cause__)
    return [type(error).__name__, message[-LOG_BYTES:]]


def run_each(requests, function, jobs, timeout_s):
    """Yield answers as they arrive (`_ForkedCall.ended`). The end of this generator kills its children."""
    scratch = tempfile.mkdtemp(prefix="fpxbench-targets-")
    waiting = list(reversed(requests))
    running = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                call = _ForkedCall(waiting.pop(), function, scratch)
                running[call.pipe] = call
            first_deadline = min(call.started for call in running.values()) + timeout_s
            ready, _, _ = select.select(list(running), [], [], max(0.0, first_deadline - time.monotonic()))
            for pipe in ready:
                call = running[pipe]
                part = os.read(pipe, 1 << 16)
                call.answer += part
                if not part:        # the child has closed it, or ended
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
    """Return status and resource usage of a child whose pipe is closed; the status is None if its exit hangs."""
    while time.monotonic() - call.started < timeout_s:
        pid, status, usage = os.wait4(call.pid, os.WNOHANG)
        if pid:
            return status, usage
        time.sleep(0.001)
    return None, _killed(call)


def _killed(call):
    try:
        os.killpg(call.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):   # it has not made its group yet
        os.kill(call.pid, signal.SIGKILL)
    return os.wait4(call.pid, 0)[2]
