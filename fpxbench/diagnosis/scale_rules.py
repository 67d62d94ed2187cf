"""Find the valid rule other than the scheme's by which a quantizer chose its scales.

The rules are the modifiers of the scheme's scaling (`Scaling.modifiers`), such as E8M0 rounded up, NVFP4's divisor and
16-bit scales, and `OWN_RULES`. A quantizer is judged by the rule that it declares (`Implementation.scale_rule`). An
undeclared rule that explains every scale and code is flagged, but is not a fault.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fpxbench.diagnosis.encode_faults import nudges, quotient_slack
from fpxbench.diagnosis.random_rounding import random_rounding
from fpxbench.implementation import Implementation
from fpxbench.numbers.formats import Format
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scaling.nv import NVScaling
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.numbers.weight import QuantizedWeight

SHARED = "shared"
"""The rule of fused layers: the tensor scale is chosen for several weights together."""
FLOOR, SEARCH, STOCHASTIC = "floor", "search", "stochastic"
OWN_RULES = (SHARED, FLOOR, SEARCH, STOCHASTIC)
"""Rules that are not modifiers of a scaling, since the weight alone does not determine their result."""
LARGEST_FLOOR = 2.0**-16
LEAST_BETTER = 0.02
"""Least share of blocks that a search for scales must improve; on random weights it improves a fifth."""
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
    FLOOR: "scales are at least a fixed small number, so that a block of zeros is divided by no zero",
    SEARCH: "each block's scale is one under which it errs less than under amax / max, as one that is searched for",
    STOCHASTIC: "codes are rounded at random, in proportion to the place between two numbers (no bias is seen)",
    SHARED: "the tensor scale is larger than this weight asks for, as that of several weights together (a fused layer)",
}


@dataclass(frozen=True)
class ScaleRule:
    """A valid rule for choosing scales.

    name : as in `Implementation.scale_rule`
    scheme : the scheme with this rule, for decoding the weight
    """

    name: str
    scheme: Scheme

    def message(self) -> str:
        return f"{_MESSAGES.get(self.name, self.name)}: right by that rule; declare it (`scale_rule = \"{self.name}\"`)"


def judged_scheme(scheme: Scheme, rule: str | None) -> Scheme:
    """Return the scheme by which to judge a quantizer that declares `rule`. Raise ValueError for an unknown rule."""
    if rule is None or rule in OWN_RULES or not scheme.quantized:
        return scheme
    return scheme_named(f"{scheme.format.name}-{scheme.scaling.base_name}.{rule}")


def as_judged(weight: QuantizedWeight, rule: str | None) -> QuantizedWeight:
    """Return a stored weight under the scheme that it is judged by. Scales stored as numbers stay numbers even if the
    rule chooses them from a coded format (powers of two in fp32)."""
    judged = judged_scheme(weight.scheme, rule)
    numbers = weight.scales is not None and weight.scales.dtype != torch.uint8      # None: a library's own tensor
    if numbers and judged.scaling is not None and judged.scaling.scale_format.coded:
        return weight
    return replace(weight, scheme=judged)


def follows_rule(original: Tensor, weight: QuantizedWeight, rule: str) -> bool:
    """Return whether every stored scale and code of `original` [N, K] follows the quantizer's declared rule."""
    if rule in OWN_RULES:
        own = weight.scheme.scaling.choose(original.float(), weight.scheme.format)
        return (_follows_own(original, weight, rule) or _explains(original, weight, weight.scheme, own)
                or rule == SEARCH and _errs_less(original, weight, least=0.0))
    judged = judged_scheme(weight.scheme, rule)
    return _explains(original, weight, judged, judged.scaling.choose(original.float(), judged.format))


def other_rules(scheme: Scheme) -> list[ScaleRule]:
    """Return the alternative rules of a scheme's scaling."""
    scaling = scheme.scaling
    return [ScaleRule(name, replace(scheme, scaling=replace(scaling, **fields)))
            for name, fields in scaling.modifiers().items()
            if any(getattr(scaling, field) != value for field, value in fields.items())]


def find_scale_rule(original: Tensor, weight: QuantizedWeight) -> ScaleRule | None:
    """Return the rule other than the scheme's that explains every stored scale and code of `original` [N, K], or None.
    """
    if not weight.has_codes or weight.scales is None:
        return None
    scheme = weight.scheme
    for rule in other_rules(scheme):
        if _explains(original, weight, rule.scheme, rule.scheme.scaling.choose(original.float(), scheme.format)):
            return rule
    found = next((rule for rule in OWN_RULES if _follows_own(original, weight, rule)), None)
    return None if found is None else ScaleRule(found, scheme)


def rule_beside_zeros(original: Tensor, weight: QuantizedWeight) -> ScaleRule | None:
    """Return the rule other than the scheme's that explains every nonzero row of `original` [N, K], or None."""
    kept = (original != 0).any(dim=1)
    if not weight.has_codes or weight.scales is None or weight.scheme.scaling.block_rows != 1 or not bool(kept.any()):
        return None
    scales = Scales(weight.scales[kept], weight.tensor_scale)
    rows = QuantizedWeight.from_codes(weight.codes()[kept], scales, weight.scheme, "bytes")
    return find_scale_rule(original[kept], rows)


def _follows_own(original: Tensor, weight: QuantizedWeight, rule: str) -> bool:
    """Return whether the weight was stored by `rule`, one of `OWN_RULES`, and not by the scheme's own."""
    tests = {SHARED: _shares_tensor_scale, FLOOR: _has_a_floor, SEARCH: _errs_less, STOCHASTIC: _rounds_at_random}
    return tests[rule](original, weight)


def _shares_tensor_scale(original: Tensor, weight: QuantizedWeight) -> bool:
    scheme, scaling = weight.scheme, weight.scheme.scaling
    if not isinstance(scaling, NVScaling) or weight.tensor_scale is None:
        return False
    own = scaling.choose(original.float(), scheme.format)
    if not bool((weight.tensor_scale > own.tensor_scale * (1 + _SLACK)).all()):
        return False
    largest = weight.tensor_scale * scheme.format.max * scaling.scale_format.format.max
    return _explains(original, weight, scheme, scaling.choose(original.float(), scheme.format, shared_amax=largest))


def _has_a_floor(original: Tensor, weight: QuantizedWeight) -> bool:
    """Return whether scales are the scheme's, raised to a small floor where they are below it."""
    scheme, scaling = weight.scheme, weight.scheme.scaling
    if scaling.scale_format.coded or weight.scales is None or weight.scales.dtype == torch.uint8:
        return False
    own = scaling.choose(original.float(), scheme.format)
    if own.stored.shape != weight.scales.shape:
        return False
    floor = weight.scales.float().min()
    if not 0 < float(floor) <= LARGEST_FLOOR or not bool((own.stored.float() < floor * (1 - _SLACK)).any()):
        return False        # too large for a floor, or without effect
    return _explains(original, weight, scheme, Scales(own.stored.float().clamp(min=float(floor))))


def _errs_less(original: Tensor, weight: QuantizedWeight, least: float = LEAST_BETTER) -> bool:
    """Return whether no block's error exceeds that under the scheme's own scale, a share `least` of blocks (at least
    two, unless it is 0) is clearly better, and codes are nearest.

    Blocks are counted, because in a sum one block with large weights would outweigh all others.
    """
    scheme, scaling = weight.scheme, weight.scheme.scaling
    if weight.stored_scales.stored.shape != scaling.choose(original.float(), scheme.format).stored.shape \
            or not _explains(original, weight, scheme, weight.stored_scales):
        return False
    own = scheme.dequantize(*scheme.quantize(original.float()))
    mine, its = (_block_errors(original, decoded, scheme) for decoded in (weight.dequantize(), own))
    if not bool((mine <= its * (1 + 1e-4)).all()):
        return False
    return not least or int((mine < 0.999 * its).sum()) >= max(2, least * len(its))


def _block_errors(original: Tensor, decoded: Tensor, scheme: Scheme) -> Tensor:
    """Return the sum of squared errors of each block, float64 [R, G]."""
    scaling, (n, k) = scheme.scaling, original.shape
    rows, columns = scaling.grid_shape(n, k)
    index = scaling.block_index(n, k).to(original.device).reshape(-1)
    errors = (decoded.double() - original.double()).square().reshape(-1)
    return torch.zeros(rows * columns, dtype=torch.float64, device=errors.device).scatter_add(0, index, errors)


def _rounds_at_random(original: Tensor, weight: QuantizedWeight) -> bool:
    """Return whether scales are the scheme's, and codes are rounded stochastically without bias."""
    scheme, scaling = weight.scheme, weight.scheme.scaling
    own = scaling.choose(original.float(), scheme.format)
    if weight.scales is None or own.stored.shape != weight.scales.shape or weight.scales.dtype != own.stored.dtype:
        return False
    if not bool(((weight.scale_grid() - scaling.factors(own)).abs() <= _SLACK * scaling.factors(own)).all()):
        return False
    found = random_rounding(original, weight)
    return found is not None and found.unbiased


def holds_on_powers_of_two(
    implementation: Implementation, original: Tensor, rule: ScaleRule, scheme: Scheme
) -> bool:
    """Return whether the rule also explains a weight of powers of two, which tells rounding up from one step too high.

    Stochastic rounding is tested on other weights: too few powers of two lie between two numbers of the format.
    """
    if rule.name == STOCHASTIC:
        probe = original.flip(1).contiguous()
        return follows_rule(probe, implementation.quantize(probe.clone(), scheme), rule.name)
    magnitude = torch.where(original == 0, 1.0, original.abs().float())
    probe = torch.copysign(torch.exp2(magnitude.log2().round().clamp(-60, 60)), original.float())
    return follows_rule(probe, implementation.quantize(probe.clone(), scheme), rule.name)


def _explains(original: Tensor, weight: QuantizedWeight, scheme: Scheme, chosen: Scales) -> bool:
    """Return whether stored scales equal `chosen`, within fp32's rounding, and codes are nearest-even under them."""
    scaling, fmt = scheme.scaling, scheme.format
    if weight.scales.shape != chosen.stored.shape:
        return False
    if scaling.scale_format.coded != (weight.scales.dtype == torch.uint8):
        # Coded scales may be stored as fp32 numbers; 16-bit scales may not be stored as codes.
        if not scaling.scale_format.coded:
            return False
        codes = scaling.scale_format.encode(weight.scales.float())
        if not torch.equal(scaling.scale_format.decode(codes), weight.scales.float()):
            return False
        weight = replace(weight, scales=codes)
    stored = Scales(weight.scales, weight.tensor_scale)
    # A 16-bit scale may be stored in fp32.
    block = weight.scales.float() if not scaling.scale_format.coded else scaling.scale_format.decode(weight.scales)
    wanted = scaling.scale_format.decode(chosen.stored)
    empty = scaling.block_amax(original.float()) == 0
    slack = 0.0 if scaling.scale_format.coded else (2.0**-7 if scaling.scale_format.bits == 16 else _SLACK)
    same = ((block - wanted).abs() <= slack * wanted) | empty
    # fp32's last bit may move a scale to its 16-bit neighbour, but it must be a 16-bit number.
    if scaling.scale_format.bits == 16:
        same &= (scaling.scale_format.decode(scaling.scale_format.encode(block)) == block) | empty
        if float(((block - wanted).abs() > _SLACK * wanted).float().mean()) > 0.01:
            return False
    if scaling.scale_format.coded and float((~same).float().mean()) <= 0.001:
        same |= (block / wanted - 1).abs() <= 0.126      # fp32's last bit moved amax / max across a midpoint
    if not bool(same.all()):
        return False
    if scaling.has_tensor_scale and not bool(((weight.tensor_scale / chosen.tensor_scale - 1).abs() <= _SLACK).all()):
        return False
    factors = scaling.spread(scaling.factors(Scales(block, stored.tensor_scale)) if not scaling.scale_format.coded
                             else scaling.factors(stored), *weight.shape)
    quotient = torch.where(factors > 0, original.float() / factors, 0.0)
    smallest = fmt.min_subnormal if isinstance(fmt, Format) else min(abs(value) for value in fmt.values if value)
    codes, right = weight.codes(), torch.zeros(weight.shape, dtype=torch.bool, device=quotient.device)
    for nudge in nudges(quotient_slack(stored, weight.scheme, *weight.shape)):
        right |= encode(quotient * (1 + nudge), fmt) == codes
    return bool((right | (decode(codes, fmt) == 0) & (quotient.abs() <= smallest / 2)).all())
