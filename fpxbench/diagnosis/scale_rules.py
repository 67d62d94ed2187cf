"""Find the rule by which a quantizer chose its scales, where it is another right one than the scheme's.

The rules are the modifiers of the scheme's scaling (`Scaling.modifiers`): E8M0 rounded up, NVFP4's divisor, 16-bit
scales.
A quantizer declares its rule (`Implementation.scale_rule`) and is judged by it. Undeclared, a rule that explains every
scale and every code is named and flagged; it is no fault.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fpxbench.diagnosis.hypotheses import quotient_nudges
from fpxbench.implementation import Implementation
from fpxbench.numbers.codec import decode, encode
from fpxbench.numbers.formats import Format
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scaling.nv import NVScaling
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.weight import QuantizedWeight

SHARED = "shared"
"""The rule of layers that are fused: the tensor scale is that of a larger weight than this one."""
_SLACK = 2.0**-21
_MESSAGES = {
    "rceil": "scales are rounded up, as OCP's rceil (PTX cvt.rp.ue8m0, cuBLAS): 2^ceil(log2(amax / max))",
    "ceil": "scales are rounded up from the block's power of two, as torchao's CEIL: 2^(ceil(log2(amax)) - emax)",
    "even": "scales are rounded to even, as torchao's EVEN",
    "up": "block scales are rounded up, so that no weight saturates",
    "4over6": "each block's largest weight becomes 6 or 4, whichever errs less (Four Over Six)",
    "normal": "block scales are at least E4M3's smallest normal number, 2^-6 (torchao NVFP4Tensor)",
    "div": "the tensor scale is stored as its reciprocal and divided by, as compressed-tensors' weight_global_scale",
    "bf16": "scales are rounded to bf16 before weights are divided by them",
    "fp16": "scales are rounded to fp16 before weights are divided by them",
    "e8m0": "scales are rounded up to powers of two, as DeepSeek's ue8m0",
    SHARED: "the tensor scale is larger than this weight asks for, as that of several weights together (a fused layer)",
}


@dataclass(frozen=True)
class ScaleRule:
    """A rule by which stored scales are right.

    name : as `Implementation.scale_rule` declares it
    scheme : the scheme with this rule, by which the weight is decoded
    """

    name: str
    scheme: Scheme

    def message(self) -> str:
        return f"{_MESSAGES.get(self.name, self.name)}: right by that rule; declare it (`scale_rule = \"{self.name}\"`)"


def judged_scheme(scheme: Scheme, rule: str | None) -> Scheme:
    """Return the scheme that a weight of a quantizer with this declared rule is judged by. Raise ValueError for an
    unknown rule."""
    if rule is None or rule == SHARED or not scheme.quantized:
        return scheme
    return scheme_named(f"{scheme.format.name}-{scheme.scaling.base_name}.{rule}")


def follows_rule(original: Tensor, weight: QuantizedWeight, rule: str) -> bool:
    """Return whether every stored scale and code of `original` [N, K] is what the quantizer's declared rule makes of
    it."""
    if rule == SHARED:
        found = find_scale_rule(original, weight)
        return found is not None and found.name == SHARED
    judged = judged_scheme(weight.scheme, rule)
    return _explains(original, weight, judged, judged.scaling.choose(original.float(), judged.format))


def other_rules(scheme: Scheme) -> list[ScaleRule]:
    """Return the rules of a scheme's scaling that are not its own."""
    scaling = scheme.scaling
    return [ScaleRule(name, replace(scheme, scaling=replace(scaling, **fields)))
            for name, fields in scaling.modifiers().items()
            if any(getattr(scaling, field) != value for field, value in fields.items())]


def find_scale_rule(original: Tensor, weight: QuantizedWeight) -> ScaleRule | None:
    """Return the rule, other than the scheme's, that explains every stored scale and code of `original` [N, K]; None if
    none does."""
    if not weight.has_codes or weight.scales is None:
        return None
    scheme, scaling = weight.scheme, weight.scheme.scaling
    for rule in other_rules(scheme):
        if _explains(original, weight, rule.scheme, rule.scheme.scaling.choose(original.float(), scheme.format)):
            return rule
    if isinstance(scaling, NVScaling) and weight.tensor_scale is not None:
        own = scaling.choose(original.float(), scheme.format)
        if bool((weight.tensor_scale > own.tensor_scale * (1 + _SLACK)).all()):
            largest = weight.tensor_scale * scheme.format.max * scaling.scale_format.format.max
            shared = scaling.choose(original.float(), scheme.format, shared_amax=largest)
            if _explains(original, weight, scheme, shared):
                return ScaleRule(SHARED, scheme)
    return None


def holds_on_powers_of_two(
    implementation: Implementation, original: Tensor, rule: ScaleRule, scheme: Scheme
) -> bool:
    """Return whether the rule also explains a weight of powers of two, where rounding up is not one step too high."""
    magnitude = torch.where(original == 0, 1.0, original.abs().float())
    probe = torch.copysign(torch.exp2(magnitude.log2().round().clamp(-60, 60)), original.float())
    return follows_rule(probe, implementation.quantize(probe.clone(), scheme), rule.name)


def _explains(original: Tensor, weight: QuantizedWeight, scheme: Scheme, chosen: Scales) -> bool:
    """Return whether stored scales are `chosen`, within fp32's rounding, and codes those of nearest-even under them."""
    scaling, fmt = scheme.scaling, scheme.format
    if weight.scales.shape != chosen.stored.shape:
        return False
    if scaling.scale_format.coded != (weight.scales.dtype == torch.uint8):
        # Numbers of the scale's format may be kept in fp32; codes are no numbers of a 16-bit format.
        if not scaling.scale_format.coded:
            return False
        codes = scaling.scale_format.encode(weight.scales.float())
        if not torch.equal(scaling.scale_format.decode(codes), weight.scales.float()):
            return False
        weight = replace(weight, scales=codes)
    stored = Scales(weight.scales, weight.tensor_scale)
    # A 16-bit scale may be kept in fp32.
    block = weight.scales.float() if not scaling.scale_format.coded else scaling.scale_format.decode(weight.scales)
    wanted = scaling.scale_format.decode(chosen.stored)
    empty = scaling.block_amax(original.float()) == 0
    slack = 0.0 if scaling.scale_format.coded else (2.0**-7 if scaling.scale_format.bits == 16 else _SLACK)
    same = ((block - wanted).abs() <= slack * wanted) | empty
    # fp32's last bit may move a scale to its 16-bit neighbour, but it is one of them.
    if scaling.scale_format.bits == 16:
        same &= (scaling.scale_format.decode(scaling.scale_format.encode(block)) == block) | empty
        if float(((block - wanted).abs() > _SLACK * wanted).float().mean()) > 0.01:
            return False
    if scaling.scale_format.coded and float((~same).float().mean()) <= 0.001:
        same |= (block / wanted - 1).abs() <= 0.126      # amax / max on the other side of a boundary by fp32's last bit
    if not bool(same.all()):
        return False
    if scaling.has_tensor_scale and not bool(((weight.tensor_scale / chosen.tensor_scale - 1).abs() <= _SLACK).all()):
        return False
    factors = scaling.spread(scaling.factors(Scales(block, stored.tensor_scale)) if not scaling.scale_format.coded
                             else scaling.factors(stored), *weight.shape)
    quotient = torch.where(factors > 0, original.float() / factors, 0.0)
    smallest = fmt.min_subnormal if isinstance(fmt, Format) else min(abs(value) for value in fmt.values if value)
    codes, right = weight.codes(), torch.zeros(weight.shape, dtype=torch.bool, device=quotient.device)
    for nudge in quotient_nudges(stored, scaling):      # none under powers of two: there a tie is a tie
        right |= encode(quotient * (1 + nudge), fmt) == codes
    return bool((right | (decode(codes, fmt) == 0) & (quotient.abs() <= smallest / 2)).all())
