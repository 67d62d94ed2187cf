"""Compile Triton kernels for GPUs that need not be present, each in a fork of this warm process.

    PYTHONPATH=<folder with a Triton in it> python -S <this folder> < requests

Needs the standard library and a Triton from 3.0 on, and PyTorch for requests with ``inductor``. Standard input is JSON
lines: first ``{jobs, timeout_s}``, then one request a line with an ``id`` (``compiling.compiled`` and
``inductor.compiled`` document it); an empty line starts the compilation of the requests so far. Standard output is JSON
lines: first ``{"build": ...}``, then ``{"id", "seconds", ...}`` (processor time) as each request ends, with one of

- ``compiled``: metadata of the object (and its assembly, if requested), or of each of the ``launches``;
- ``raised``: ``[type, message]``;
- ``signal`` or ``exit``: how the process ended;
- ``timeout``: after how many seconds

and ``log``, the first and last part of its output, native code's included.
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
    except BaseException as error:      # anything that the import of a broken Triton raises
        send(out, {"unusable": f"{type(error).__name__}: {error}"})
        return
    send(out, {"build": compiling.warmed_up()})
    for batch in batches():
        # PyTorch last: its import makes each later fork slower.
        for by in (compiling, inductor):
            requests = [request for request in batch if ("inductor" in request) == (by is inductor)]
            for request in requests:
                by.prepare(request)
            for answer in run_each(requests, by.compiled, settings["jobs"], settings["timeout_s"]):
                send(out, answer)


def batches():
    """Yield the requests up to each empty line or the end."""
    batch = []
    for line in sys.stdin:
        if line.strip():
            batch.append(json.loads(line))
        else:
            yield batch
            batch = []
    yield batch


def answers():
    """Return the stream for answers; everything else that is printed, by native code too, goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def send(out, message):
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
