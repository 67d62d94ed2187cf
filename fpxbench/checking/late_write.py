"""A kernel that triggers the launch of its dependents long before it writes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS, BLOCK = 16, 4096
"""Few enough programs that the next kernel's find room beside them."""
DELAY_NS = 50_000
"""From its beginning to its first write. A kernel that does not wait reads within a few microseconds."""


@triton.jit
def late_write_kernel(source, target, nbytes, delay_ns, BLOCK: tl.constexpr):
    tl.extra.cuda.gdc_launch_dependents()
    began = tl.extra.cuda.globaltimer()
    now = began
    while now - began < delay_ns:
        now = tl.extra.cuda.globaltimer()
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, nbytes, step):
        at = first + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < nbytes), mask=at < nbytes)


def write_late(source: Tensor, target: Tensor) -> None:
    """Copy `source` to `target`, contiguous and of the same size, `DELAY_NS` after triggering the launch of the next
    kernel on the current stream."""
    late_write_kernel[(PROGRAMS,)](source.view(torch.uint8), target.view(torch.uint8), target.nbytes, DELAY_NS,
                                   BLOCK=BLOCK)
