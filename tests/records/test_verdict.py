"""What compilers, frameworks and the kernel say when they fail, and what fpxbench makes of it."""

import signal

import pytest
from places import DOCS

from fpxbench.records.compiler_messages import find_message
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import (
    BROKEN,
    SEVERITY,
    SIGNS,
    Status,
    Verdict,
    classify_death,
    classify_exception,
)

# As LLVM, ptxas, Triton and PyTorch print them, with what stands around them.
FNUZ_ABORT = (
    "LLVM ERROR: Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne\n\nFatal Python error: Aborted\n"
)
CORE_DUMP = (
    'loc("/tmp/kernel.py":76:21): error:  size mismatch when packing elements for LLVM struct expected 4 but got 8\n'
    "python: /llvm/include/llvm/ADT/ArrayRef.h:257: const T& llvm::ArrayRef<T>::operator[](size_t) const [with T = "
    "mlir::Type]: "
    'Assertion `Index < Length && "Invalid index!"\' failed.\n'
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (FNUZ_ABORT, Kind.UNSUPPORTED_ROUNDING),
        (CORE_DUMP, Kind.COMPILER_ABORT),
        (
            "type fp8e4b8 not supported in this architecture. The supported fp8 dtypes are ('fp8e4nv', 'fp8e5')",
            Kind.UNSUPPORTED_DTYPE,
        ),
        ("\"addmm_impl_cpu_\" not implemented for 'Float8_e4m3fn'", Kind.UNSUPPORTED_DTYPE),
        (
            "ptxas /tmp/k.ptx, line 47; error   : Modifier '.e4m3x2' requires .target sm_89 or higher",
            Kind.UNSUPPORTED_ARCH,
        ),
        (
            "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9, or ROCm MI300+",
            Kind.UNSUPPORTED_ARCH,
        ),
        ("CUDA error: no kernel image is available for execution on the device", Kind.UNSUPPORTED_ARCH),
        ("ptxas fatal   : Value 'sm_100' is not defined for option 'gpu-name'", Kind.ASSEMBLER_ERROR),
        ("Internal Triton PTX codegen error\n`ptxas` failed with error code 255", Kind.ASSEMBLER_ERROR),
        ("RuntimeError: PassManager::run failed", Kind.PASS_FAILED),
        ("LLVM ERROR: Cannot select: intrinsic %llvm.amdgcn.mfma", Kind.COMPILER_ABORT),
        ("opt: Foo.cpp:12: void f(): Assertion `x > 0' failed.", Kind.COMPILER_ABORT),
    ],
)
def test_the_compilers_own_words_tell_the_kind(text, kind):
    found = find_message(text)
    assert found.kind is kind
    assert found.cause in text and found.text.removeprefix("ptxas:") in text


def test_words_that_say_nothing_known_give_no_kind():
    assert find_message("Segmentation fault (core dumped)") is None


@pytest.mark.parametrize(("log", "kind"), [(FNUZ_ABORT, Kind.UNSUPPORTED_ROUNDING), (CORE_DUMP, Kind.COMPILER_ABORT)])
def test_an_abort_is_a_crash_whose_kind_its_log_tells(log, kind):
    verdict = classify_death(-signal.SIGABRT, log)
    assert (verdict.status, verdict.kind, verdict.signal, verdict.exit_code) == (Status.CRASH, kind, "SIGABRT", -6)
    assert verdict.log_tail == log


@pytest.mark.parametrize(("exit_code", "name", "says"), [
    (-signal.SIGSEGV, "SIGSEGV", "died by SIGSEGV"), (-signal.SIGFPE, "SIGFPE", "died by SIGFPE"),
    (-63, None, "died by signal 63"), (3, None, "exit code 3"), (0, None, "exit code 0")
])
def test_a_death_is_a_crash_with_its_signal_or_exit_code(exit_code, name, says):
    verdict = classify_death(exit_code, "")
    assert verdict.status is Status.CRASH and says in verdict.summary and verdict.exit_code == exit_code
    assert name is None or verdict.signal == name


@pytest.mark.parametrize(
    ("type_name", "message"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 GiB."),
        (
            "RuntimeError",
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 1 bytes.",
        ),
        ("MemoryError", ""),
        ("OSError", "[Errno 12] Cannot allocate memory"),
    ],
)
def test_running_out_of_memory_is_oom_however_it_is_said(type_name, message):
    assert classify_exception(type_name, message, "").status is Status.OOM


def test_native_code_that_aborts_for_want_of_memory_is_oom():
    log = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
    assert classify_death(-signal.SIGABRT, log).status is Status.OOM


@pytest.mark.parametrize(
    ("type_name", "message", "status", "kind"),
    [
        ("ValueError", "type fp8e4nv not supported in this architecture. The supported fp8 dtypes are ('fp8e5',)",
         Status.UNSUPPORTED, Kind.UNSUPPORTED_DTYPE),
        ("NotImplementedError", "no such path", Status.UNSUPPORTED, None),
        ("ModuleNotFoundError", "No module named 'gemlite'", Status.MISSING, None),
        ("RuntimeError", "PassManager::run failed", Status.ERROR, Kind.PASS_FAILED),
        ("ZeroDivisionError", "division by zero", Status.ERROR, None),
    ],
)
def test_an_exception_is_a_refusal_a_gap_or_an_error_by_what_it_says(type_name, message, status, kind):
    verdict = classify_exception(type_name, message, "")
    assert (verdict.status, verdict.kind) == (status, kind)
    assert message in verdict.summary or type_name in verdict.summary


def test_every_status_has_a_rank_and_a_sign_of_its_own():
    assert set(SEVERITY) == set(SIGNS) == set(Status)
    assert len(set(SIGNS.values())) == len(Status)
    assert max(SEVERITY[status] for status in BROKEN) < min(SEVERITY[status] for status in set(Status) - BROKEN)


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_is_explained_to_people(kind):
    explained = DOCS / "verdicts.md"
    assert f"`{kind}`" in explained.read_text(encoding="utf-8")


def test_the_headline_says_the_kind_where_there_is_one():
    assert Verdict(status=Status.OK).headline == "ok"
    assert Verdict(status=Status.WRONG, kind=Kind.SIGN_LOST).headline == "wrong (sign_lost)"


def test_of_tritons_message_the_reason_is_told_and_not_the_place_in_the_source():
    place = "at 4:26:\ndef kernel(p):\n    y = x.to(tl.float8e4b15)\n                          ^\n"
    assert (
        classify_exception("CompilationError", place + "cannot convert float64\n", "").summary
        == "raised CompilationError: cannot convert float64"
    )
    assert classify_exception("CompilationError", place, "").summary == "raised CompilationError:"
    assert (
        classify_exception("ValueError", "at 4:26: is no place of Triton's", "").summary
        == "raised ValueError: at 4:26: is no place of Triton's"
    )


def test_what_ptxas_rejects_is_named_without_its_temporary_file():
    found = find_message(
        "ptxas /tmp/tmpx1y2.ptx, line 47; error   : Modifier '.e4m3x2' requires .target sm_89 or higher\n"
        "ptxas fatal   : Ptx"
    )
    assert found.kind is Kind.UNSUPPORTED_ARCH and found.by_assembler
    assert found.text == "ptxas: Modifier '.e4m3x2' requires .target sm_89 or higher"


def test_the_most_specific_of_several_messages_counts():
    log = (
        "LLVM ERROR: Unsupported rounding mode for conversion.\nUnsupported conversion from f8E5M2FNUZ to bf16\n"
        "PassManager::run failed\n"
    )
    assert find_message(log).kind is Kind.UNSUPPORTED_CONVERSION
    assert find_message("PassManager::run failed\n" + CORE_DUMP).kind is Kind.COMPILER_ABORT
