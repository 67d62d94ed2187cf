"""Implementations that end their process, never end, or take all there is."""

import ctypes
import os
import signal
import sys
import time

from fpxbench.implementation import implementation

from ._right import Right


def write_natively(text):
    """Write to file descriptor 2 past Python, as LLVM does."""
    os.write(2, text.encode() + b"\n")


@implementation("faulty_segfault")
class Segfault(Right):
    """Reads address 0."""

    def product(self, x, w):
        ctypes.string_at(0)


@implementation("faulty_segfault_when_stored")
class SegfaultWhenStored(Right):
    """Reads address 0 while it quantizes."""

    def quantize(self, weight, scheme):
        ctypes.string_at(0)


@implementation("faulty_llvm_abort")
class LlvmAbort(Right):
    """Aborts as LLVM does."""

    def product(self, x, w):
        write_natively("LLVM ERROR: Cannot select: intrinsic %llvm.nvvm.e5m2x2.to.f16x2")
        os.abort()


@implementation("faulty_struct_abort")
class StructAbort(Right):
    """Aborts with the words of pytorch/ao issue #228's core dump."""

    def product(self, x, w):
        write_natively("error: size mismatch when packing elements for LLVM struct expected 4 but got 8")
        os.abort()


@implementation("faulty_rounding_abort")
class RoundingAbort(Right):
    """Aborts with the words that pytorch/ao issue #228 saw for E5M2FNUZ."""

    def product(self, x, w):
        write_natively("Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne")
        os.abort()


@implementation("faulty_rounding_refused")
class RoundingRefused(Right):
    """Raises the same words."""

    def product(self, x, w):
        raise RuntimeError("Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne")


@implementation("faulty_hang")
class Hang(Right):
    """Sleeps in native code, deaf to SIGTERM."""

    def product(self, x, w):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(3600)      # PyDLL keeps the interpreter's lock, so nothing in this process can help


@implementation("faulty_endless_allocation")
class EndlessAllocation(Right):
    """Takes 32 MiB more, for ever."""

    def product(self, x, w):
        held = []
        while True:
            held.append(bytearray(os.urandom(1 << 12)) * (1 << 13))


@implementation("faulty_raise")
class Raises(Right):
    """Raises."""

    def product(self, x, w):
        raise IndexError("list index out of range: <b>tile 7</b>")


@implementation("faulty_supports_raises")
class SupportsRaises(Right):
    """Raises when it is asked what it supports."""

    def supports(self, scheme, device):
        return {"e4m3fn-row": None}[device]


@implementation("faulty_sys_exit")
class SysExit(Right):
    """Leaves by sys.exit."""

    def product(self, x, w):
        sys.exit(3)


@implementation("faulty_os_exit")
class OsExit(Right):
    """Leaves without a word."""

    def product(self, x, w):
        os._exit(3)


@implementation("faulty_os_exit_in_order")
class OsExitInOrder(Right):
    """Exits with 0, and leaves a process behind that holds every pipe of its own open."""

    def product(self, x, w):
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)


@implementation("faulty_keyboard_interrupt")
class Interrupts(Right):
    """Raises what is not an Exception."""

    def product(self, x, w):
        raise KeyboardInterrupt


@implementation("faulty_script_in_log")
class ScriptInLog(Right):
    """Prints markup, and megabytes of it, then dies."""

    def product(self, x, w):
        print("<script>alert(1)</script>" * 100_000, flush=True)
        print("</pre><script>alert('last words')</script>\x1b[2J\x00", flush=True)
        os.abort()
