"""Compare a quantized layer with the unquantized original: how much was lost, and by which quantizer."""

from __future__ import annotations

import torch

from fpxbench.checkpoint.checkpoint_folder import Checkpoint
from fpxbench.checkpoint.checkpoint_report import LayerReport
from fpxbench.checkpoint.layers import QuantizedLayer
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_plain
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight

_MODIFIERS = {"mx": ("", ".ceil", ".even", ".rceil"), "nv": ("", ".up", ".4over6", ".div", ".up.div", ".4over6.div")}
ALIKE = 0.98
"""Share of reproduced codes from which a quantizer explains a layer."""


def compare(layer: QuantizedLayer, report: LayerReport, decoded: torch.Tensor, original: Checkpoint,
            weight: QuantizedWeight | None = None) -> None:
    """Record in `report` the error of `layer`'s decoded weight [N, K] against the original's.

    If `weight` is given, also record which quantizer reproduces its codes. Raises CheckpointError without an original.
    """
    entry = next(
        (original.tensors[name] for name in (f"{layer.name}.weight", layer.name) if name in original.tensors), None
    )
    if entry is None:
        raise CheckpointError(f"{layer.name}: the original has no {layer.name}.weight")
    values = read_plain(entry)
    if values.shape != decoded.shape:
        raise CheckpointError(
            f"{layer.name}: the original's weight is {list(values.shape)}, but this one is {list(decoded.shape)}"
        )
    error = (values - decoded).double()
    signal, noise = values.double().square().sum(), error[error.isfinite()].square().sum()
    report.sqnr_db = round((10 * torch.log10(signal / noise)).item(), 3) if noise > 0 and signal > 0 else None
    report.exact = bool((error == 0).all())
    lost = int((~error.isfinite()).sum())
    if lost:
        report.problems.append(f"{layer.name}: {lost} weights are not finite where the original's are")
    if weight is not None:
        report.explained_by = explanation(values, weight)


def explanation(values: torch.Tensor, weight: QuantizedWeight) -> str:
    """Return the quantizer that reproduces most of `weight`'s codes and scales from `values`, with the shares; "" if
    none reproduces enough.
    """
    scaling = weight.scheme.scaling
    base = weight.scheme.name.split(".")[0]
    names = [base + modifier for modifier in _MODIFIERS.get(scaling.kind, ())] or [weight.scheme.name]
    best, share_of_codes, share_of_scales = "", 0.0, 0.0
    for name in names:
        scheme = scheme_named(name)
        codes, scales = scheme.quantize(values)
        codes_alike = (codes == weight.codes()).float().mean().item()
        ours, theirs = (scheme.scaling.scale_format.decode(each) for each in (scales.stored, weight.scales))
        scales_alike = torch.isclose(ours, theirs, rtol=1e-2, atol=0).float().mean().item()
        if codes_alike > share_of_codes:
            best, share_of_codes, share_of_scales = name, codes_alike, scales_alike
    if share_of_codes < ALIKE:
        return ""
    return f"{best}: {share_of_codes:.2%} of the codes, {share_of_scales:.2%} of the scales"
