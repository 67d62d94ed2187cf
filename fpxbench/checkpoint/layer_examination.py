"""Examine a checkpoint: what its headers say, and for sampled layers what their codes, scales and neighbours show.

`examine` runs in a watched child (`fpxbench.sweep.isolation`): the file comes from elsewhere.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase

from fpxbench.checkpoint.checkpoint_folder import Checkpoint, open_checkpoint
from fpxbench.checkpoint.checkpoint_report import CheckpointReport, CheckpointRequest, LayerReport
from fpxbench.checkpoint.layers import QuantizedLayer, declared_methods, quantized_layers
from fpxbench.checkpoint.tensor_entry import FLOATS, CheckpointError, TensorEntry

MOST_SAMPLED = 4
MOST_ROWS = 512
"""Rows of a layer that are decoded: enough to decide on conventions, whatever the layer's size."""
_QUANTIZED_DTYPES = ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2")
_PACKED = (".weight", ".weight_packed", "_blocks", "._weight_qdata")
"""Suffixes of the names of packed codes."""
_SCALES = (".weight_scale", ".weight_scale_inv", ".weight_scale_2", "_scales", ".weight_global_scale", "._weight_scale")
"""Suffixes of the names of scales."""
_TENSOR_SCALES = (".weight_scale_2", ".weight_global_scale")


def examine(request: CheckpointRequest) -> CheckpointReport:
    """Open, list and check a checkpoint. Raises CheckpointError if there is nothing to list."""
    checkpoint = open_checkpoint(request.path)
    layers = quantized_layers(checkpoint)
    chosen = [
        layer for layer in layers if not request.layers or any(fnmatchcase(layer.name, glob) for glob in request.layers)
    ]
    if request.layers and not chosen:
        raise CheckpointError(f"{request.path}: no quantized layer matches {', '.join(request.layers)}")
    original = open_checkpoint(request.against) if request.against else None
    reports = {layer.name: _listed(layer) for layer in chosen}
    to_read = [layer for layer in chosen if layer.scheme and not layer.problems]
    read = to_read if request.deep or original else _sample(to_read)
    for layer in read:
        _read(layer, reports[layer.name], checkpoint, original, whole=request.deep, among=len(read))
    if original is not None:
        _compare_without_scheme([layer for layer in chosen if layer.decodes_without_scheme], reports, original)
    used = {tensor.name for layer in layers for tensor in layer.tensors.values()}
    plain: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        if name not in used:
            plain[tensor.dtype] += tensor.nbytes
    reported = list(reports.values())
    if original:
        reported.sort(key=lambda report: (report.sqnr_db is None, report.sqnr_db or 0.0))
    return CheckpointReport(
        path=request.path, files=len(checkpoint.files), tensors=len(checkpoint.tensors), nbytes=checkpoint.nbytes,
        declared=sorted(declared_methods(checkpoint)), layers=reported, plain=dict(plain),
        problems=[*checkpoint.problems, *_of_the_whole(checkpoint, layers, used)],
        read=sum(bool(report.histogram) for report in reported))


def _listed(layer: QuantizedLayer) -> LayerReport:
    return LayerReport(
        name=layer.name,
        dialect=layer.dialect.name,
        others=list(layer.others),
        scheme=layer.scheme,
        stored_as=layer.codes.dtype,
        n=layer.n,
        k=layer.k,
        experts=layer.experts,
        nbytes=layer.nbytes,
        problems=list(layer.problems),
    )


def _sample(layers: list[QuantizedLayer]) -> list[QuantizedLayer]:
    """Return a few layers, spread over the checkpoint, of different schemes where there are several."""
    kinds: dict[str | None, list[QuantizedLayer]] = {}
    for layer in layers:
        kinds.setdefault(layer.scheme, []).append(layer)
    each = max(1, MOST_SAMPLED // max(1, len(kinds)))
    return [alike[at * len(alike) // each] for alike in kinds.values() for at in range(min(each, len(alike)))][
        :MOST_SAMPLED
    ]


def _read(
    layer: QuantizedLayer, report: LayerReport, checkpoint: Checkpoint, original: Checkpoint | None, whole: bool,
    among: int
) -> None:
    # Imported here, so that listing a checkpoint loads no torch.
    from fpxbench.checkpoint import comparison, conventions, statistics
    from fpxbench.checkpoint.weights import read_weight, rows_of

    try:
        weight = read_weight(layer)
        sample = weight
        if not whole and layer.n > MOST_ROWS:
            sample = rows_of(weight, slice(0, MOST_ROWS))
        report.histogram = statistics.histogram(sample)
        report.scales, problems = statistics.scale_statistics(layer.name, sample)
        report.problems += problems + statistics.code_problems(layer.name, sample, report.histogram)
        report.problems += statistics.blank_rows(layer.name, weight)
        report.evidence = conventions.evidence(layer, sample, checkpoint, among)
        if original is not None:
            comparison.compare(layer, report, weight.dequantize(), original, weight)
    except CheckpointError as error:
        report.problems.append(str(error))


def _compare_without_scheme(layers: list[QuantizedLayer], reports: dict[str, LayerReport],
                            original: Checkpoint) -> None:
    if not layers:
        return
    from fpxbench.checkpoint import comparison
    from fpxbench.checkpoint.weights import read_numbers

    for layer in layers:
        try:
            comparison.compare(layer, reports[layer.name], read_numbers(layer), original)
        except CheckpointError as error:
            reports[layer.name].problems.append(str(error))


def _of_the_whole(checkpoint: Checkpoint, layers: list[QuantizedLayer], used: set[str]) -> list[str]:
    """Return the problems that belong to no single layer: tensors of no layer, parts of a fused layer that disagree."""
    from fpxbench.checkpoint.fused import disagreements

    problems, reported = [], set(used)
    for name, tensor in checkpoint.tensors.items():
        if name in used or len(tensor.shape) < 2:
            continue
        packed = tensor.dtype in ("U8", "I8") and name.endswith(_PACKED)
        if not packed and tensor.dtype not in _QUANTIZED_DTYPES or _scale_beside(checkpoint, name):
            continue        # not codes, or reported below with its scale
        reported.add(name)
        if packed and f"{name}.absmax" in checkpoint.tensors:
            problems.append(f"{name} has an absmax, but no quant_state that describes its blocks")
        else:
            problems.append(f"{name} holds {tensor.dtype} but has no scale")
    for name in checkpoint.tensors:
        if not name.endswith(_SCALES) or name in used:
            continue
        suffix = next(suffix for suffix in _SCALES if name.endswith(suffix))
        codes = _codes_beside(checkpoint, name.removesuffix(suffix))
        if codes is None:
            problems.append(f"{name} is a scale without codes")
        elif codes.name not in reported:
            problems.append(f"{codes.name} holds {codes.dtype} {list(codes.shape)}: codes of no supported dialect")
            reported.add(codes.name)
    declared = declared_methods(checkpoint)
    if declared and not layers:
        problems.append(f"the config declares {', '.join(sorted(declared))}, but no layer is quantized")
    if not declared and layers and not layers[0].dialect.interleaved:
        problems.append("no quant_method is declared in config.json or hf_quant_config.json")
    for layer in layers:
        if declared and layer.dialect.methods and not layer.dialect.methods & declared:
            problems.append(
                f"{layer.name} is stored as {layer.dialect.name}, but the config declares {', '.join(sorted(declared))}"
            )
    return _shortened([*problems, *disagreements(layers)])


def _codes_beside(checkpoint: Checkpoint, layer: str) -> TensorEntry | None:
    """Return the tensor that may hold the codes of a layer, or None."""
    found = (checkpoint.tensors.get(layer + suffix) for suffix in _PACKED)
    return next((entry for entry in found if entry and entry.dtype not in FLOATS), None)


def _scale_beside(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor has a scale besides one of the whole tensor, by its name."""
    layer = next((name.removesuffix(suffix) for suffix in _PACKED if name.endswith(suffix)), name)
    return any(layer + suffix in checkpoint.tensors for suffix in _SCALES if suffix not in _TENSOR_SCALES)


def _shortened(problems: list[str], most: int = 20) -> list[str]:
    return problems if len(problems) <= most else [*problems[:most], f"{len(problems) - most} more like these"]


def plain_matrices(checkpoint: Checkpoint, k: int) -> list[str]:
    """Return the names of unquantized matrices [*, k], other than embeddings and heads, which read the same inputs as a
    layer does.
    """
    return [name for name, tensor in checkpoint.tensors.items()
            if tensor.dtype in FLOATS and len(tensor.shape) == 2 and tensor.shape[1] == k and name.endswith(".weight")
            and not any(word in name for word in ("embed", "lm_head", "wte", "wpe"))]

