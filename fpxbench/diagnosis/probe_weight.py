"""Make a probe weight, on which faults can be told apart, to replace a case's own weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.code_order_faults import nibbles_exchanged
from fpxbench.diagnosis.decode_faults import table_faults
from fpxbench.implementation import Implementation
from fpxbench.numbers import packing
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.workloads import WeightContents


def probe_operands(implementation: Implementation, operands: Operands) -> Operands:
    """Return the same case with a probe weight: random finite codes, under scales that differ from their neighbours.

    An implementation that keeps its own tensors beside the codes quantizes a weight of all the format's numbers
    instead. Codes that a known fault reads as NaN or infinity occur only in every eighth row, and NaN and infinity
    themselves in every sixteenth, so that other outputs stay finite (0 * NaN is NaN).
    """
    weight, case = operands.weight, operands.case
    if weight.extra:
        original = inputs.make_weight(case, operands.seed, operands.device, WeightContents.CODES)
        probe = implementation.quantize(original, weight.scheme)
        return replace(operands, original=original, weight=probe, decoded=probe.dequantize())
    fmt = weight.scheme.format
    table = decode_table(fmt)
    risky = torch.zeros(len(table), dtype=torch.bool)
    for fault in table_faults(fmt):
        risky |= ~fault.apply(table).isfinite()
    if fmt.bits == 8:
        risky |= ~table[nibbles_exchanged(torch.arange(256))].isfinite()
    any_code = table.isfinite().nonzero().reshape(-1)
    safe_code = (table.isfinite() & ~risky).nonzero().reshape(-1)
    rng = inputs.generator(operands.seed, "probe codes")
    codes = safe_code[torch.randint(len(safe_code), weight.shape, generator=rng)]
    codes[7::8] = any_code[torch.randint(len(any_code), codes[7::8].shape, generator=rng)]
    safe_or_not_finite = torch.cat([safe_code, (~table.isfinite()).nonzero().reshape(-1)])
    codes[15::16] = safe_or_not_finite[torch.randint(len(safe_or_not_finite), codes[15::16].shape, generator=rng)]
    packed = packing.pack(codes.to(torch.uint8), fmt.bits, weight.layout).to(weight.device)
    probe = replace(weight, packed=packed, scales=_probe_scales(weight, rng))
    return replace(operands, weight=probe, decoded=probe.dequantize())


def _probe_scales(weight: QuantizedWeight, rng: torch.Generator) -> Tensor:
    """Return random scales near 1/16 in place of `weight`'s."""
    shape = weight.scales.shape
    exponent = torch.randint(-7, 0, shape, generator=rng)
    scales = torch.ldexp(torch.randint(8, 16, shape, generator=rng) / 8, exponent)
    if weight.scheme.scaling.has_tensor_scale:      # the tensor scale is small, and is kept
        scales *= 256
    return weight.scheme.scaling.scale_format.encode(scales).to(weight.device)
