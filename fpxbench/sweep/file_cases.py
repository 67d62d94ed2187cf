"""Cases on a file's layers: a checkpoint's codes and scales, or unquantized weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from fpxbench.checkpoint.measurable import MeasurableLayer, checkpoint_layers, file_activations, file_weights
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case, Routing
from fpxbench.sweep.plan import Planned
from fpxbench.sweep.settings import Settings
from fpxbench.workloads import TOKENS

M = (1, 16)
"""Token counts if --workload names none."""
OWN_WEIGHTS_SCHEMES = ("int8-row", "e4m3fn-row", "e4m3fn-b128x128", "mxfp4", "nvfp4")


def cases_of_files(settings: Settings, device: str, classes: Iterable[type[Implementation]],
                   schemes: list[str]) -> dict[str, Planned]:
    """Return a case for each implementation, layer and token count, by id.

    schemes : the requested ones; a checkpoint's layers have their own

    Raise CheckpointError (a ValueError) for conflicting settings, and for missing layers.
    """
    if settings.checkpoint is not None and settings.weights is not None:
        raise CheckpointError("--checkpoint and --weights are one file each: give one of them")
    if settings.checkpoint is not None and schemes:
        raise CheckpointError(f"--scheme {schemes[0]}: the layers of a checkpoint are measured in their own schemes; "
                              "leave it out, or give unquantized weights by --weights")
    if settings.weights is not None:
        layers = file_weights(settings.weights)
    else:
        assert settings.checkpoint is not None
        layers = checkpoint_layers(settings.checkpoint, settings.layer)
    classes = list(classes)
    planned: dict[str, Planned] = {}
    for layer, m in _with_tokens(layers, settings.workload):
        for scheme in [layer.scheme] if layer.scheme else schemes or OWN_WEIGHTS_SCHEMES:
            for cls in classes:
                of_experts = {} if layer.experts == 1 else {
                    "experts": layer.experts, "experts_per_token": layer.experts_per_token, "routing": Routing.UNIFORM}
                case = Case(implementation=cls.name, scheme=scheme, workload=layer.workload, m=m, n=layer.n, k=layer.k,
                            **of_experts)
                support = _support(cls, case, device, layer.scheme is not None)
                if support is not None:
                    planned[case.id] = Planned(case=case, refused=support.reason, missing=support.missing,
                                               weight=layer.source)
    if not planned:
        raise CheckpointError(f"{settings.weights or settings.checkpoint}: no implementation takes layers of this size")
    return planned


def with_activations(planned: dict[str, Planned], given: str) -> dict[str, Planned]:
    """Return the same cases on the activations of ``FILE[:NAME]``; cases with another K are marked as refused.

    Raise CheckpointError if no case has the activations' K.
    """
    source, k = file_activations(given)
    if any(each.case.experts for each in planned.values()):
        raise CheckpointError(f"--activations {given}: the rows of experts are random; leave it out, or choose other"
                              " layers with --layer")
    if all(each.case.k != k for each in planned.values()):
        sizes = ", ".join(map(str, sorted({each.case.k for each in planned.values()})))
        raise CheckpointError(f"--activations {given}: {source.name} has K = {k}, and the chosen layers have {sizes}")
    return {name: each.model_copy(
        update={"activations": source} if each.case.k == k else
        {"refused": each.refused or f"the activations of {given} have K = {k}, and this layer {each.case.k}"})
        for name, each in planned.items()}


def takes_codes(cls: type[Implementation]) -> bool:
    """Return whether an implementation multiplies given codes, without a quantizer of its own."""
    return cls.quantize is Implementation.quantize and cls.dequantize is Implementation.dequantize


def _support(cls: type[Implementation], case: Case, device: str, quantized: bool) -> Support | None:
    """Return whether an implementation supports a case; None if the case is too large for it, and for the dense
    product, which is timed beside every case anyway."""
    try:
        instance = cls()
        limit = instance.max_elements(device)
        if cls.baseline or (limit is not None and case.rows * case.n * case.k > limit):
            return None
        if cls.experts_only and case.experts is None:
            return None
        support = instance.support(scheme_named(case.scheme), device)
    except Exception:
        support = Support.yes()     # the trial asks again, and records the exception
    if support.supported and quantized and not takes_codes(cls):
        return Support.no(f"{cls.name} quantizes weights its own way, so it cannot multiply a checkpoint's codes; "
                          "--weights gives it the unquantized ones")
    return support


def _with_tokens(layers: list[MeasurableLayer], globs: tuple[str, ...]) -> list[tuple[MeasurableLayer, int]]:
    """Return each layer with the token counts that globs over ``workload/mM`` select.

    Raise CheckpointError for a glob that selects nothing.
    """
    if not globs:
        return [(layer, m) for layer in layers for m in M]
    named = {int(count) for glob in globs for count in re.findall(r"/m(\d{1,6})$", glob)}
    counts = sorted({*TOKENS, *M, *named})
    found: dict[tuple[str, int], tuple[MeasurableLayer, int]] = {}
    for glob in globs:
        matching = [(layer, m) for layer in layers for m in (counts if "/" in glob else M)
                    if fnmatchcase(f"{layer.workload}/m{m}" if "/" in glob else layer.workload, glob)]
        if not matching:
            raise CheckpointError(f"no workload {glob!r} in this file; the first is {layers[0].workload}/m1")
        found |= {(layer.workload, m): (layer, m) for layer, m in matching}
    return list(found.values())
