"""The report's glossary. Statuses, kinds and flags are defined in fpxbench/records."""

from __future__ import annotations

import re

FLAG_SIGN = "⚑"

WORDS: dict[str, str] = {
    "format": "An element's bits: exponent, mantissa, bias, and the meaning of the top codes. e4m3fn, e2m1, …",
    "scaling": "Which weights share a scale, and how it is stored: tensor, row, g128, g32, mx (32 weights, "
               "E8M0), nv (16 weights, E4M3, and one fp32 for the tensor).",
    "scheme": "Format and scaling, the unit that users choose: e4m3fn-row, e3m2-g128, mxfp4, nvfp4, int8-row, bf16.",
    "implementation": "One way to store a weight of a scheme and to multiply by it.",
    "workload": "A real layer's N and K, named after its model (llama2-7b.qkv), and M, the number of tokens.",
    "conversion": "A cast or another operation from one dtype to another, by one engine: eager PyTorch, torch.compile, "
                  "a Triton kernel, or Triton's interpreter.",
    "canary": "A small synthetic workload that exposes known faults. Checked, never timed.",
    "case": "Implementation × scheme × workload × activation dtype.",
    "build": "One PyTorch build with its Triton.",
    "variant": "The platform that a build was made for: cpu, cu130, rocm7.2.",
    "machine": "A device as measured: name, architecture, memory, read bandwidth.",
    "sweep": "Many cases on one build and one machine.",
    "verdict": "The result of a case: a status, and the evidence for it.",
    "series": "One metric of one case on one machine, over the builds of one channel and variant in the timeline's "
              "order.",
    "event": "A verdict, a failure's message or an exact metric that differs from the build before. Reported at once.",
    "suspect": "A change of a case's time that the decision rule (docs/decision-rule.md) finds in its series. Some are "
               "noise: report one only after it is confirmed.",
    "confirmation": "Both builds of a change run again, interleaved, each time in a new process, until the change is "
                    "confirmed or refuted, or the time limit is reached.",
    "dense baseline": "The same product with a 16-bit weight, timed interleaved with the case in the same run.",
    "speedup": "Time of the dense baseline over time of the case. Above 1 the case is faster.",
    "roofline": "The machine's measured read bandwidth. A call must at least read the packed weight and the "
                "activation once and write the output once; the roofline fraction is those bytes over the time taken, "
                "over that bandwidth.",
    "bound": "The largest relative error of a correct result, derived from rounding the output and accumulating in "
             "fp32.",
    "SQNR": "Signal to quantization noise of the stored weight, in dB: how well the scheme fits the weight. It says "
            "nothing about whether the multiplication is right.",
    "bits per weight": "The bytes that the stored weight takes, scales included, measured on its tensors.",
}


def unquoted(message: str) -> str:
    """Return a failure's message without a trailing ``")`` that remains of an enclosing exception's repr."""
    return message[:-2] if message.endswith('")') and message.count('"') % 2 else message


def at_least_something(bottleneck: str) -> str:
    """Return a bottleneck with "under 1%" in place of 0%, to which older records round down."""
    return re.sub(r"\b0% of the time", "under 1% of the time", bottleneck)


METADATA: dict[str, tuple[str, str]] = {
    "power_limit_w": ("power limit", "W"), "memory_bus_bits": ("memory bus", "bits"),
    "memory_clock_mhz": ("memory clock", "MHz"), "os": ("operating system", ""),
    "cores": ("processor cores", ""), "threads": ("PyTorch's threads", ""),
}
"""A machine's metadata by name: label and unit. Other entries are shown by their name."""
