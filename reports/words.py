"""The report's vocabulary: what each word, status, mistake and flag means, in the sentences that pages show."""

from __future__ import annotations

import re
from typing import NamedTuple

from fpxbench.records.record import Flag
from fpxbench.records.verdict import Kind, Status

FLAG_SIGN = "⚑"

WORDS: dict[str, str] = {
    "format": "An element's bits: exponent, mantissa, bias, and what the top codes mean. e4m3fn, e2m1, …",
    "scaling": "Which weights share a scale and how the scale is stored: tensor, row, g128, g32, mx (32 weights, E8M0), "
               "nv (16 weights, E4M3, and one fp32 for the tensor).",
    "scheme": "Format and scaling, the unit that users choose: e4m3fn-row, e3m2-g128, mxfp4, nvfp4, int8-row, bf16.",
    "implementation": "One way to store such a weight and to multiply by it.",
    "workload": "A real layer's N and K, named after its model (llama2-7b.qkv), and M, the number of tokens.",
    "conversion": "A cast, or another operation from one dtype to another, as one engine carries it out: eager PyTorch, torch.compile, a "
                  "Triton kernel, Triton's interpreter.",
    "canary": "A small workload that no model has: there to be right on, because known mistakes show on it. Never timed.",
    "case": "Implementation × scheme × workload × activation dtype.",
    "build": "One PyTorch build with its Triton.",
    "variant": "What a build was made for: cpu, cu130, rocm7.2.",
    "machine": "A device as measured: name, architecture, memory, and the read bandwidth that it really has.",
    "sweep": "Many cases on one build and one machine.",
    "verdict": "What a case turned out to be: a status and the evidence for it.",
    "series": "A figure of one case on one machine over the builds of one channel and variant, in the timeline's order.",
    "event": "A verdict, a failure's words or an exact figure that is another one than on the build before: told at once.",
    "suspect": "A change of a case's time that the rule (docs/decision-rule.md) finds in its series. Some of them are noise: nobody is to be told "
               "before it is confirmed.",
    "confirmation": "Both builds of a change run again, in turn, each time in a new process, until it is confirmed or refuted, or the time "
                    "allowed for it is over.",
    "dense baseline": "The same product with a 16-bit weight, timed in turn with the case in the same run.",
    "speedup": "Time of the dense baseline over time of the case. Above 1 the case is faster.",
    "roofline": "The machine's measured read bandwidth. A call must at least read the packed weight and the activation once and "
                "write the output once; the roofline fraction is those bytes over the time taken, over that bandwidth.",
    "bound": "The largest relative error that a right result can have: derived from rounding the output and from accumulating in "
             "fp32, not picked.",
    "SQNR": "Signal to quantization noise of the stored weight, in dB: how well the scheme fits the weight. It says nothing "
            "about whether the multiplication is right.",
    "bits per weight": "The bytes that the stored weight takes, scales included, measured on its tensors.",
}


def unquoted(words: str) -> str:
    """A failure's words without the ``")`` that is left at their end of an exception printed around them."""
    return words[:-2] if words.endswith('")') and words.count('"') % 2 else words


def at_least_something(bottleneck: str) -> str:
    """A bottleneck in which no share is 0%: older records round down what is under 1%."""
    return re.sub(r"\b0% of the time", "under 1% of the time", bottleneck)


FACTS: dict[str, tuple[str, str]] = {
    "power_limit_w": ("power limit", "W"), "memory_bus_bits": ("memory bus", "bits"), "memory_clock_mhz": ("memory clock", "MHz"),
    "os": ("operating system", ""), "cores": ("processor cores", ""), "threads": ("PyTorch's threads", ""),
}
"""A machine's facts by name: their words, and the unit of their figures. Others are shown by their name."""

STATUSES: dict[Status, str] = {
    Status.OK: "The result lies within the bound on every check. Only such a case has a time.",
    Status.WRONG: "Finite, and outside the bound.",
    Status.NONFINITE: "NaN or infinity where the exact product is finite.",
    Status.CRASH: "The process died: a signal, or an abort inside a compiler.",
    Status.TIMEOUT: "Still running when its time was over.",
    Status.OOM: "Took more memory than there is, or than it was allowed.",
    Status.ERROR: "Raised an exception.",
    Status.MISSING: "A dependency or a device is not there.",
    Status.UNSUPPORTED: "Refused, with a reason.",
}

VERBS: dict[Status, str] = {
    Status.CRASH: "crashes",
    Status.WRONG: "gives wrong results",
    Status.NONFINITE: "gives NaN or infinity",
    Status.TIMEOUT: "does not end in time",
    Status.OOM: "runs out of memory",
    Status.ERROR: "raises an error",
    Status.MISSING: "is missing something",
    Status.UNSUPPORTED: "refuses",
    Status.OK: "is right",
}


class Meaning(NamedTuple):
    """A kind of mistake: what an implementation does (follows its name in a sentence), and how one can tell."""

    predicate: str
    seen: str


KINDS: dict[Kind, Meaning] = {
    Kind.FNUZ_AS_FN: Meaning("decodes FNUZ codes as FN, to twice their value",
                             "Every value is off by 2× (bias 8 read as 7), and 0x80 is −0 instead of NaN."),
    Kind.FN_AS_FNUZ: Meaning("decodes FN codes as FNUZ, to half their value",
                             "Every value is off by 2× (bias 7 read as 8), and −0 becomes NaN."),
    Kind.GIBBERISH: Meaning("gives gibberish", "Finite, uncorrelated with the exact product, and no known mistake fits."),
    Kind.NAN_CODE_LOST: Meaning("reads the NaN code as a number", "0x80 of an FNUZ format comes out as −0."),
    Kind.NEGATIVE_ZERO: Meaning("turns negative zero into NaN", "Tiny negatives are rounded to −0, which FNUZ formats read as NaN."),
    Kind.WRONG_MAX: Meaning("scales by the wrong maximum", "Scales are off by the ratio of two formats' maxima: 448, 240, 224."),
    Kind.OVERFLOW_NAN: Meaning("overflows to NaN", "Past the largest value the codes are NaN, where the scheme saturates."),
    Kind.OVERFLOW_INF: Meaning("overflows to infinity", "Past the largest value the codes are infinite, where the scheme saturates."),
    Kind.SATURATED: Meaning("saturates", "Past the largest value the codes stay at it, where the scheme asks otherwise."),
    Kind.DOUBLE_ROUNDING: Meaning("rounds twice", "Codes are as if rounded through a narrower type first (fp32 → bf16 → fp8)."),
    Kind.TIES_AWAY: Meaning("rounds ties away from zero", "Halfway values go to the larger neighbour, not to the even one."),
    Kind.TRUNCATED: Meaning("truncates", "Codes are rounded toward zero, so the weight shrinks."),
    Kind.SUBNORMAL_FLUSHED: Meaning("flushes subnormals to zero", "The smallest codes read as 0. SQNR does not move: only single codes show it."),
    Kind.SUBNORMAL_WRONG: Meaning("decodes subnormals wrongly", "The smallest codes read as other values. Only single codes show it."),
    Kind.NIBBLE_SWAP: Meaning("swaps nibbles", "Neighbouring 4-bit codes change places."),
    Kind.PLANE_SWAP: Meaning("swaps planes", "Weights from different planes of a packed byte change places."),
    Kind.SIGN_LOST: Meaning("loses the sign", "Negative weights read as positive."),
    Kind.SCALE_TRANSPOSED: Meaning("applies scales along the wrong axis", "Scales of rows meet columns."),
    Kind.SCALE_MISSING: Meaning("leaves the scales out", "Codes are multiplied without a scale."),
    Kind.SCALED: Meaning("is off by one factor", "Every weight is the same factor times its value: a product or a scale is off by it."),
    Kind.BLOCK_OFF_BY_ONE: Meaning("takes the neighbouring block's scale", "Each block meets the scale of the one beside it."),
    Kind.UNSUPPORTED_ROUNDING: Meaning("meets a rounding mode that the compiler refuses", "The compiler says so."),
    Kind.UNSUPPORTED_CONVERSION: Meaning("meets a conversion that the compiler refuses", "The compiler says so."),
    Kind.UNSUPPORTED_DTYPE: Meaning("meets a dtype that is not supported", "The compiler or PyTorch says so."),
    Kind.UNSUPPORTED_ARCH: Meaning("needs another architecture", "The compiler or PyTorch says so."),
    Kind.ASSEMBLER_ERROR: Meaning("fails in the assembler", "ptxas or the AMD assembler gives up on the generated code."),
    Kind.COMPILER_ABORT: Meaning("aborts inside the compiler", "LLVM or MLIR ends the process."),
    Kind.PASS_FAILED: Meaning("fails in a compiler pass", "A pass over the intermediate code reports failure."),
    Kind.EMPTY_OBJECT: Meaning("compiles to an empty object", "The compiler claims success and leaves nothing to run."),
    Kind.INACCURATE: Meaning("is inaccurate", "Near the exact product, but outside the derived bound."),
    Kind.WRONG_SHAPE: Meaning("gives an output of the wrong shape", "The output, or the weight read back, is not [M, N], or [N, K]."),
    Kind.WRONG_DTYPE: Meaning("gives an output of the wrong dtype", "The output is not in the activation's dtype."),
    Kind.UNWRITTEN_OUTPUT: Meaning("leaves output elements unwritten", "Memory was filled with a pattern before the call, and still holds it."),
    Kind.STALE_OUTPUT: Meaning("gives the output of the call before", "Inputs are fresh at every call, and the output answers the last ones."),
    Kind.INPUT_MODIFIED: Meaning("changes its inputs in place", "Activation or stored weight differ after the call."),
    Kind.NOT_REPEATABLE: Meaning("is right at first and wrong later", "The same operands, called again, give a wrong result."),
    Kind.CONFIG_DEPENDENT: Meaning("is wrong with some autotuning configurations", "Each configuration that may be picked was checked."),
}

FLAGS: dict[Flag, str] = {
    Flag.UNFUSED: "It moves more bytes, or launches more kernels, than one pass over the packed weight needs: decode, product and "
                  "scale did not become one kernel. Told by what was launched and allocated, not by a setting.",
    Flag.OVER_ROOFLINE: "The figure is above what the machine's memory can do, so it cannot be true: a bug in the number, not a fast kernel.",
    Flag.NOISY: "The 95% interval of the median is wider than ±5%: do not draw conclusions from small differences.",
}
