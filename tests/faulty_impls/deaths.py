"""Implementations that end their process, never end, or take all there is."""

import ctypes
import os
import signal
import sys
import time

from ._right import faulty


def write_natively(text):
    """Write to file descriptor 2 past Python, as LLVM does."""
    os.write(2, text.encode() + b"\n")


@faulty("product")
def segfault(self, x, w):
    """Reads address 0."""
    ctypes.string_at(0)


@faulty("quantize")
def segfault_when_stored(self, weight, scheme):
    """Reads address 0 while it quantizes."""
    ctypes.string_at(0)


@faulty("product")
def llvm_abort(self, x, w):
    """Aborts as LLVM does."""
    write_natively("LLVM ERROR: Cannot select: intrinsic %llvm.nvvm.e5m2x2.to.f16x2")
    os.abort()


@faulty("product")
def struct_abort(self, x, w):
    """Aborts with the words of pytorch/ao issue #228's core dump."""
    write_natively("error: size mismatch when packing elements for LLVM struct expected 4 but got 8")
    os.abort()


@faulty("product")
def rounding_abort(self, x, w):
    """Aborts with the words that pytorch/ao issue #228 saw for E5M2FNUZ."""
    write_natively("Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne")
    os.abort()


@faulty("product")
def rounding_refused(self, x, w):
    """Raises the same words."""
    raise RuntimeError("Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne")


@faulty("product")
def hang(self, x, w):
    """Sleeps in native code, deaf to SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(3600)      # PyDLL keeps the interpreter's lock, so nothing in this process can help


@faulty("product")
def endless_allocation(self, x, w):
    """Takes 32 MiB more, for ever."""
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 12)) * (1 << 13))


@faulty("product")
def raise_(self, x, w):
    """Raises."""
    raise IndexError("list index out of range: <b>tile 7</b>")


@faulty("supports")
def supports_raises(self, scheme, device):
    """Raises when it is asked what it supports."""
    return {"e4m3fn-row": None}[device]


@faulty("product")
def sys_exit(self, x, w):
    """Leaves by sys.exit."""
    sys.exit(3)


@faulty("product")
def os_exit(self, x, w):
    """Leaves without a word."""
    os._exit(3)


@faulty("product")
def os_exit_in_order(self, x, w):
    """Exits with 0, and leaves a process behind that holds every pipe of its own open."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)


@faulty("product")
def keyboard_interrupt(self, x, w):
    """Raises what is not an Exception."""
    raise KeyboardInterrupt


@faulty("product")
def script_in_log(self, x, w):
    """Prints markup, and megabytes of it, then dies."""
    print("<script>alert(1)</script>" * 100_000, flush=True)
    print("</pre><script>alert('last words')</script>\x1b[2J\x00", flush=True)
    os.abort()
