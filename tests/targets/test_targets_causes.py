"""Messages of compilers, as printed, are reduced to one cause each, with the right status."""

import pytest

from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.targets.causes import failure, native_errors

REFUSAL = ("at 1:0:\ndef convert(source, out, BLOCK: tl.constexpr):\n^\n"
           "ValueError(\"type fp8e4b8 not supported in this architecture. "
           "The supported fp8 dtypes are ('fp8e4b15', 'fp8e5')\")")
PTXAS = ("Internal Triton PTX codegen error: \n"
         "ptxas /tmp/fpxbench-targets-ab12cd34/tmpqwe12345.ptx, line {}; error   : "
         "Feature 'cvt with .bf16.f16' requires .target sm_90 or higher\n"
         "ptxas fatal   : Ptx assembly aborted due to errors\n")
PACKING = ("loc(\"/home/someone/kernels.py\":70:21): error:  "
           "size mismatch when packing elements for LLVM struct expected {} but got {}\n"
           "python3.11: /root/.triton/llvm/include/llvm/ADT/ArrayRef.h:257: "
           "Assertion `Index < Length && \"Invalid index!\"' failed.\n")

CASES = [
    ({"raised": ["CompilationError", REFUSAL]}, Status.UNSUPPORTED, Kind.UNSUPPORTED_DTYPE,
     "type fp8e4b8 not supported in this architecture"),
    ({"raised": ["CompilationError", "at 3:4:\n  x\n  ^\nfp8e4nv data type is not supported on CUDA arch < 89"]},
     Status.UNSUPPORTED, Kind.UNSUPPORTED_DTYPE, "fp8e4nv data type is not supported on CUDA arch < 89"),
    ({"signal": 6, "log": "Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne\nLLVM ERROR: "
      "Unsupported rounding mode for conversion.\n"},
     Status.CRASH, Kind.UNSUPPORTED_ROUNDING, "Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne"),
    ({"signal": 6, "log": PACKING.format(4, 8)}, Status.CRASH, Kind.COMPILER_ABORT,
     "size mismatch when packing elements for LLVM struct expected … but got …"),
    ({"raised": ["RuntimeError", PTXAS.format(46)]}, Status.ERROR, Kind.ASSEMBLER_ERROR,
     "ptxas: Feature 'cvt with .bf16.f16' requires .target sm_90 or higher"),
    ({"raised": ["CalledProcessError", "Command returned non-zero exit status 1."],
      "log": "error: instruction not supported on this GPU\n        v_cvt_pk_f32_bf8 v[2:3], v2\nld.lld: error: target "
             "emulation unknown\n"},
     Status.ERROR, Kind.ASSEMBLER_ERROR, "instruction not supported on this GPU v_cvt_pk_f32_bf8"),
    ({"raised": ["RuntimeError", "PassManager::run failed"], "log":
      "python: /project/amd/Convert.cpp:2509: SmallVector<Value> createDestOps() const: "
      "Assertion `maybeOutVals.has_value()' failed.\nmodule {}\n"
      "k.py:19:1: error: Failures have been detected while processing an MLIR pass pipeline\n"},
     Status.ERROR, Kind.COMPILER_ABORT, "Assertion `maybeOutVals.has_value()' failed"),
    ({"raised": ["RuntimeError", "PassManager::run failed"]}, Status.ERROR, Kind.PASS_FAILED,
     "PassManager::run failed"),
    ({"raised": ["CompilationError", "at 4:23:\n    tl.store(out)\n    ^\n"]}, Status.ERROR, None,
     "CompilationError without a reason"),
    ({"raised": ["CompilationError", "at 1:0:\nx\n^\nNameError('sums is not defined')"]}, Status.ERROR, None,
     "sums is not defined"),
    ({"raised": ["NotImplementedError", "this build has no tl.dot_scaled"]}, Status.MISSING, None,
     "this build has no tl.dot_scaled"),
    ({"raised": ["OutOfResources",
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block sizes may help."]},
     Status.ERROR, None, "out of resource: shared memory, more than 232448 bytes. Reducing block sizes may help."),
    ({"signal": 11}, Status.CRASH, None, "died by SIGSEGV"),
    ({"exit": 3}, Status.CRASH, None, "ended its process with exit code 3"),
    ({"timeout": 60.0}, Status.TIMEOUT, None, "was still compiling after 60 s"),
]


@pytest.mark.parametrize(("answer", "status", "kind", "cause"), CASES, ids=[cause[:40] for *_, cause in CASES])
def test_a_failure_has_its_cause(answer, status, kind, cause):
    outcome = failure(answer)
    assert (outcome.status, outcome.kind, outcome.cause) == (status, kind, cause)


@pytest.mark.parametrize(("one", "other"), [
    ({"raised": ["RuntimeError", PTXAS.format(46)]}, {"raised": ["RuntimeError", PTXAS.format(910)]}),
    ({"signal": 6, "log": PACKING.format(4, 8)}, {"signal": 6, "log": PACKING.format(8, 16)}),
])
def test_line_numbers_and_sizes_make_no_second_cause(one, other):
    assert failure(one).cause == failure(other).cause


def test_no_path_of_the_machine_is_in_what_is_kept():
    for answer, *_ in CASES:
        outcome = failure(answer)
        kept = outcome.cause + outcome.message
        assert not [path for path in ("/tmp", "/home", "/root") if path in kept]


def test_native_code_that_prints_an_error_and_goes_on_is_heard():
    log = "error: instruction not supported on this GPU\n        v_cvt_pk_f32_fp8 v1\n"
    assert native_errors(log)[1] is Kind.ASSEMBLER_ERROR
    assert native_errors("warning: something\nremark: error-free\n") is None
