"""Diagnose an activation's quantization with the known faults of weights: a quantized activation [M, K] is stored and
read like a weight whose rows are tokens."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fpxbench.checking.activation_probe import ActivationProbe, Seen
from fpxbench.checking.activation_rules import Explanation
from fpxbench.checking.examination import is_refusal
from fpxbench.diagnosis.activation_maps import recover_activation
from fpxbench.diagnosis.decode_fault import DecodeFault
from fpxbench.diagnosis.decode_faults import decode_faults
from fpxbench.diagnosis.effective_weight import Prediction, Readout
from fpxbench.diagnosis.encode_faults import EncodeFault, encode_faults, scale_choice_faults
from fpxbench.diagnosis.estimated_faults import estimated_faults, right_factors
from fpxbench.diagnosis.hypotheses import Faults, Predictor, explanations
from fpxbench.diagnosis.naming import named
from fpxbench.diagnosis.products import RECOVERY_SECONDS
from fpxbench.diagnosis.recovery.maps import RecoveredMaps
from fpxbench.diagnosis.scale_functions import ScaleFunction, scale_functions
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.formats import FORMATS, Format
from fpxbench.numbers.scaling import Scaling
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode_table, encode
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind


def explain_activation(rule: ActivationRule, readings: Sequence[Seen], probe: ActivationProbe, rule_is_known: bool,
                       *, seconds: float = math.inf) -> Explanation | None:
    """Return the fault in quantizing by `rule` that explains every element read: a known one, or one that the recovered
    maps show; None if neither explains them. The last of `readings` holds every code under scales of 1.

    If the probe's weight is not known to be read as defined, only faults that a weight cannot cause are named. If the
    rule is not known, misplaced scales are not named.
    seconds : no further experiment begins after this long
    """
    if rule.scale is not None:
        return None
    known = _known_fault(rule, readings) if readings else None
    if known is not None and (known.kind is not None or not probe.weight_is_read):
        return known
    try:
        maps = recover_activation(probe, rule, seconds)
    except Exception as error:      # the shape is unsupported
        if not is_refusal(error):
            raise
        traceback.print_exc()
        maps = None
    shown = _shown(maps, probe.weight_is_read, rule_is_known) if maps is not None else None
    return shown if shown is not None and (shown.kind is not None or known is None) else known


explain_in_a_sweep = partial(explain_activation, seconds=RECOVERY_SECONDS)


def _known_fault(rule: ActivationRule, readings: Sequence[Seen]) -> Explanation | None:
    """Return the known fault that explains all readings; kind None if several do."""
    whole = [_readout(rule, seen) for seen in readings]
    fitting, lost = _fitting(whole), 0
    if not fitting:
        readable = [_without_lost_tokens(seen) for seen in readings]
        lost = sum(len(a.x) - len(b.x) for a, b in zip(readings, readable, strict=True))
        if lost and all(len(seen.x) for seen in readable):
            fitting = _fitting([_readout(rule, seen) for seen in readable])
    if not fitting:
        return None
    found = named(fitting, whole[0])
    besides = f"; {lost} of {sum(len(seen.x) for seen in readings)} tokens become NaN or infinity" if lost else ""
    kind = found.kind if "fitting" not in found.evidence else None
    return Explanation(kind, found.message + besides, found.evidence)


def _shown(maps: RecoveredMaps, weight_is_read: bool, rule_is_known: bool) -> Explanation | None:
    """Return the fault that the recovered maps show; kind None if it has no name."""
    found = maps.diagnosis()
    if not rule_is_known and not any(one.name == "blocks" and one.right for one in maps.experiments):
        return None
    if not weight_is_read:
        # Only a missing scale of the activation leaves the output unchanged when the whole activation is scaled up.
        of_all_tokens = maps.blocks is not None and " of row" not in maps.blocks.constant
        if found is None or found.evidence.get("kinds") != [str(Kind.SCALE_MISSING)] or not of_all_tokens:
            return None
    if found is not None:
        return Explanation(found.kind, found.message, found.evidence)
    more = "" if maps.complete else "; `fpxbench inspect` makes experiments that a sweep has no time for"
    return Explanation(None, maps.messages() + more, {}) if maps.wrong or more else None


def _fitting(readouts: Sequence[Readout]) -> list[Faults]:
    """Return the faults that explain all readouts; [] if the definition does, since faults without effect would too."""
    if all(Predictor(readout).explains(()) for readout in readouts):
        return []
    weight = readouts[0].weight
    fmt, scaling = weight.scheme.format, weight.scheme.scaling
    assert fmt is not None and scaling is not None      # an activation's rule is quantized
    largest = int(encode(max(_largest_quotient(readout) for readout in readouts), fmt))
    known: list[DecodeFault | EncodeFault] = [
        *decode_faults(weight), *_other_tables(fmt), *_in_reading_scales(scaling),
        *encode_faults(fmt, "bytes", weight.shape[1], largest), *scale_choice_faults(fmt, scaling),
        *estimated_faults(readouts)]
    return explanations(readouts, known, most=1)


def _largest_quotient(readout: Readout) -> Tensor:
    """Return the largest magnitude read, divided by its scale."""
    factors = right_factors(readout)
    quotients = torch.where(factors > 0, readout.seen / factors, 0.0)
    return quotients.where(quotients.isfinite(), 0.0).abs().amax().float()


def _other_tables(fmt: NumberFormat) -> Iterator[DecodeFault]:
    """Yield the faults of codes read as another format of the same width."""
    sibling = fmt.sibling.name if isinstance(fmt, Format) and fmt.sibling is not None else fmt.name
    for other in FORMATS.values():
        if other.bits == fmt.bits and other.name not in (fmt.name, sibling):
            yield DecodeFault("table", Kind.FORMAT_MISTAKEN, f"codes are read as {other.name}'s",
                              lambda right, other=other: decode_table(other, right.device), True)


def _without_lost_tokens(seen: Seen) -> Seen:
    """Return the tokens with any finite reading; a non-finite element makes its whole token NaN (0 * NaN is NaN)."""
    numbers = seen.seen.isfinite().any(dim=1)
    return replace(seen, x=seen.x[numbers], seen=seen.seen[numbers])


def _in_reading_scales(scaling: Scaling) -> Iterator[DecodeFault]:
    """Yield the faults in reading coded block scales; for weights whose scales can be set, experiments find them."""
    if not scaling.scale_format.coded:
        return
    for one in scale_functions(scaling):
        def apply(block: Tensor, tensor: Tensor, one: ScaleFunction = one) -> tuple[Tensor, Tensor]:
            codes = scaling.scale_format.encode(block).long()
            return one.factor(codes, block.double()).float(), tensor

        if one.kind not in (Kind.SCALE_MISSING, Kind.SCALE_SQUARED, Kind.SCALE_INVERTED, Kind.FN_AS_FNUZ):
            yield DecodeFault("scales", one.kind, one.message, apply)


def _readout(rule: ActivationRule, seen: Seen) -> Readout:
    """Return the reading of an activation as the readout of a weight."""
    scheme, original = scheme_named(rule.scheme), seen.x.float()
    weight = QuantizedWeight.from_codes(*scheme.quantize(original), scheme, "bytes")
    columns = torch.arange(seen.seen.shape[1], device=original.device)
    decoded = weight.dequantize().double()
    definition = Prediction(decoded[:, columns], ~decoded.isfinite().all(dim=1))
    return Readout(weight, columns, seen.seen, definition, seen.x.dtype, original=original,
                   ties_decided=seen.ties_of is not None)
