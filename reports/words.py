"""The report's vocabulary: what each word, status, mistake and flag means, in the sentences that pages show."""

from __future__ import annotations

import re

from fpxbench.records.record import Flag
from fpxbench.records.verdict import Status

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


FLAGS: dict[Flag, str] = {
    Flag.UNFUSED: "It moves more bytes, or launches more kernels, than one pass over the packed weight needs: decode, product and "
                  "scale did not become one kernel. Told by what was launched and allocated, not by a setting.",
    Flag.OVER_ROOFLINE: "The figure is above what the machine's memory can do, so it cannot be true: a bug in the number, not a fast kernel.",
    Flag.NOISY: "The 95% interval of the median is wider than ±5%: do not draw conclusions from small differences.",
}
