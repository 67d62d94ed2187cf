"""Compiles Triton kernels for GPUs that need not be there, each in a forked child of this one warm process.

    PYTHONPATH=<folder with a Triton in it> python -S <this folder> < requests

Needs nothing but the standard library and a Triton from 3.0 on, and PyTorch for requests with ``inductor``. Standard input is JSON
lines: first ``{jobs, timeout_s}``, then one request a line (``compiling.compiled`` and ``inductor.compiled`` say what is in it) with
an ``id``; an empty line asks for the answers to what came so far. Standard output is JSON lines: first ``{"build": ...}``, then one
``{"id", "seconds", ...}`` (of the processor) for each request, as it ends, with one of

- ``compiled``: facts of the object (and its assembly, if asked for), or of each of the ``launches``;
- ``raised``: ``[type, message]``;
- ``signal`` or ``exit``: how the process ended;
- ``timeout``: after how many seconds

and ``log``, what it wrote first and last, native code included.
"""

import json
import os
import signal
import sys

from forks import run_each


def main():
    settings = json.loads(sys.stdin.readline())
    out = answers()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))     # run_each then ends its children
    try:
        import compiling
        import inductor
    except BaseException as error:      # whatever a broken Triton does as it is imported
        say(out, {"unusable": "%s: %s" % (type(error).__name__, error)})
        return
    say(out, {"build": compiling.warmed_up()})
    for batch in batches():
        # PyTorch last: a fork of a process that holds it costs more.
        for by in (compiling, inductor):
            requests = [request for request in batch if ("inductor" in request) == (by is inductor)]
            for request in requests:
                by.prepare(request)
            for answer in run_each(requests, by.compiled, settings["jobs"], settings["timeout_s"]):
                say(out, answer)


def batches():
    """The requests, as many at a time as come before an empty line or the end."""
    batch = []
    for line in sys.stdin:
        if line.strip():
            batch.append(json.loads(line))
        else:
            yield batch
            batch = []
    yield batch


def answers():
    """The stream to answer on; whatever else is printed, by native code too, goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def say(out, message):
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
