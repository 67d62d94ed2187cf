"""Inspect an implementation with a weight and activations from files."""

from __future__ import annotations

from fpxbench.checkpoint.measurable import file_activations, file_weights
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.diagnosis.blackbox.inspection import Inspection
from fpxbench.diagnosis.blackbox.inspector import Given, inspect
from fpxbench.sweep import file_operands
from fpxbench.sweep.messages import FileInspectRequest


def inspect_files(request: FileInspectRequest) -> Inspection:
    """Inspect with a weight and activations from files, which determine N and K, or K alone without a weight.

    Raise CheckpointError if a file does not hold exactly one such tensor, or if their K differ.
    """
    weight = activations = None
    source = k = None
    if request.activations is not None:
        source, k = file_activations(request.activations)
    if request.weights is not None:
        layers = file_weights(request.weights)
        if len(layers) > 1:
            raise CheckpointError(f"--weights {request.weights} holds {len(layers)} matrices: name one, as in"
                                  f" {layers[0].source.path}:{layers[0].source.name}")
        layer = layers[0]
        if k is not None and k != layer.k:
            raise CheckpointError(f"--activations {request.activations} has K = {k}, and the weight {layer.k}")
        request = request.model_copy(update={"n": layer.n, "k": layer.k, "given": True, "workload": None})
        weight = file_operands.weight(layer.source, "cpu")
    elif k is not None:
        request = request.model_copy(update={"k": k, "given": True, "workload": None})
    if source is not None:
        activations = file_operands.activations(source, "cpu")
    return inspect(request, Given(weight, activations))
