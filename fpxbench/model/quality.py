"""Measure how well a quantized model predicts a text, and split its loss between the format and the kernel.

The verdict's rule is in `fpxbench.model.quality_statistics`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fpxbench.checking.device_names import slug
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.effective_weight import read_out
from fpxbench.diagnosis.products import diagnose_product
from fpxbench.implementation import Implementation, discover, find
from fpxbench.model import quality_statistics
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.generate_record import Divergence, LayerDiagnosis, LayerDifference, TextQuality
from fpxbench.model.held_linear import HeldLinear, HeldWeight
from fpxbench.model.quantize_model import is_left
from fpxbench.records.case import Case

WINDOW = 512
"""Tokens of a text per forward pass, or as many as the model's positions allow."""
LEAVES_FACTOR = 4.0
"""A layer's output leaves the oracle's when its distance exceeds this many times that of sums in another order."""
PROBE_M, PROBE_SECONDS = 8, 5.0
_SLICE = 128


Quantized = FloatTensor | HeldWeight


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Quantized]]:
    """Yield every quantized weight: its module's name, the module, the parameter's name, the weight."""
    for name, module in model.named_modules():
        if isinstance(module, HeldLinear):
            yield name, module, "weight", module.held
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter.data, FloatTensor):
                yield name, module, attribute, parameter.data


@contextmanager
def decoded_weights(model: nn.Module) -> Iterator[None]:
    """Replace every quantized weight by the oracle's decode of its codes, in 16 bits, within the context."""
    kept = [(module, attribute, module._parameters[attribute], quantized)
            for _, module, attribute, quantized in quantized_parameters(model)]
    try:
        for module, attribute, _, quantized in kept:
            module._parameters[attribute] = nn.Parameter(quantized.dequantize(), requires_grad=False)
        yield
    finally:
        for module, attribute, parameter, _ in kept:
            module._parameters[attribute] = parameter


class Reordered(TorchFunctionMode):
    """A mode that computes products as the sum of two rounded halves: the even columns of K, and the odd ones.

    weights : addresses of the weights that it applies to
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args[1].data_ptr() in self.weights:
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            halves = [F.linear(x[..., part::2].contiguous(), weight[:, part::2].contiguous()) for part in (0, 1)]
            total = halves[0] + halves[1]
            return total if bias is None else total + bias
        if func is torch.addmm and args[2].data_ptr() in self.weights:      # transformers' Conv1D
            bias, x, weight = args
            return bias + (x[:, ::2] @ weight[::2] + x[:, 1::2] @ weight[1::2])
        return func(*args, **kwargs)


@contextmanager
def reordered(model: nn.Module) -> Iterator[None]:
    """Change the summation order of every layer that is quantized by default, within the context."""
    weights = {module.weight.data_ptr() for name, module in model.named_modules()
               if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
               and module.weight is not None and not isinstance(module.weight.data, FloatTensor)
               and not is_left(name)}
    with Reordered(weights):
        yield


# Next-token distributions.


def windows(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Split the token ids [T] of a text into parts [1, W] for one forward pass each, of two tokens or more."""
    positions = getattr(model.config, "max_position_embeddings", None) or WINDOW
    parts = tokens.split(min(WINDOW, positions))
    return [part[None] for part in parts if len(part) > 1]


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits [T', V], on the CPU, that predict every token of each window except its first."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device), use_cache=False).logits[0, :-1].cpu() for part in windows(model, tokens)])


def targets(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the tokens [T'] that `logits` predicts."""
    return torch.cat([part[0, 1:] for part in windows(model, tokens)])


@dataclass(frozen=True)
class LogitComparison:
    """Two models' predictions, per token [T]."""

    kl: Tensor
    same_top: Tensor
    log_p: Tensor
    """Log-probability of the text's next token under the first model."""
    log_q: Tensor
    """The same under the second model."""


def compare(first: Tensor, second: Tensor, due: Tensor) -> LogitComparison:
    """Compare two models' logits [T, V]: KL(first || second) in nats; `due` [T] are the text's tokens."""
    parts: list[tuple[Tensor, ...]] = []
    for begin in range(0, len(first), _SLICE):
        at = slice(begin, begin + _SLICE)
        p, q = first[at].float().log_softmax(-1), second[at].float().log_softmax(-1)
        kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
        right = due[at, None]
        parts.append((kl, p.argmax(-1) == q.argmax(-1), p.gather(1, right)[:, 0], q.gather(1, right)[:, 0]))
    return LogitComparison(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def first_nonfinite(values: Tensor) -> int | None:
    """Return the first token whose logits, of [T, V], hold NaN or +inf (-inf masks a token); None if there is none."""
    bad = (values.isnan() | (values == torch.inf)).any(dim=-1).nonzero()
    return int(bad[0]) if len(bad) else None


def text_quality(name: str, plain: Tensor, oracle: Tensor, row: Tensor, due: Tensor, noise: Divergence, *,
                 meaningful: bool) -> TextQuality:
    """Return the quality on one text from the logits of the unquantized model, the oracle's and the row's.

    meaningful : whether to report perplexity: not for random weights
    """
    against_plain, kernel = compare(plain, row, due), compare(oracle, row, due)
    return TextQuality(
        text=name, tokens=len(due), noise=noise, threshold=quality_statistics.threshold(noise),
        perplexity=quality_statistics.perplexity(against_plain.log_q.numpy()) if meaningful else None,
        kl=quality_statistics.divergence(against_plain.kl.numpy()),
        kl_format=quality_statistics.divergence(compare(plain, oracle, due).kl.numpy()),
        kl_kernel=quality_statistics.divergence(kernel.kl.numpy()),
        same_top=quality_statistics.bootstrap(against_plain.same_top.double().numpy(), np.mean),
        right_token_change=quality_statistics.bootstrap(
            (against_plain.log_q.exp() - against_plain.log_p.exp()).numpy(), np.mean),
    )


def plain_quality(name: str, plain: Tensor, due: Tensor, noise: Divergence, *, meaningful: bool) -> TextQuality:
    """Return the quality of the unquantized model: its perplexity, and the noise of its summation order."""
    log_p = compare(plain, plain, due).log_p
    return TextQuality(text=name, tokens=len(due), noise=noise, threshold=quality_statistics.threshold(noise),
                       perplexity=quality_statistics.perplexity(log_p.numpy()) if meaningful else None)



# Layer by layer.


@torch.no_grad()
def layer_outputs(model: nn.Module, tokens: Tensor, layers: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Return the fp32 outputs of `layers`, in the order in which they run, for tokens [1, T]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).float().cpu()
        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers]
    try:
        model(tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def layer_differences(model: nn.Module, tokens: Tensor) -> list[LayerDifference]:
    """Return the distance of each quantized layer's output from the exactly decoded model's, for few tokens [1, T]."""
    layers = [(name, module) for name, module, _, _ in quantized_parameters(model)]
    with decoded_weights(model):
        oracle = layer_outputs(model, tokens, layers)
        with reordered(model):
            other = layer_outputs(model, tokens, layers)
    row = layer_outputs(model, tokens, layers)
    # The first layer has the same input in every model: its noise, from its own sums alone, is the least possible.
    return [_difference(name, row[name], other[name], oracle[name]) for name in oracle if name in row]


def _difference(name: str, row: Tensor, other: Tensor, oracle: Tensor) -> LayerDifference:
    size = oracle.norm().clamp(min=1e-30)
    relative, noise = float((row - oracle).norm() / size), float((other - oracle).norm() / size)
    finite = bool(row.isfinite().all())
    least = torch.finfo(torch.bfloat16).eps / 4
    return LayerDifference(layer=name, relative=relative if finite else None, noise=noise,
                           leaves=not finite or relative > LEAVES_FACTOR * max(noise, least))


# How one layer decodes.


def operands_of(tensor: Quantized, name: str) -> Operands:
    """Return the operands for checks and diagnoses of one layer's weight; of experts, the first one's."""
    if isinstance(tensor, HeldWeight):
        weight, decoded = tensor.weight, tensor.dequantize(torch.float32)
    else:
        one: Any = tensor[0] if tensor.dim() == 3 else tensor
        weight = (one.t() if one.transposed else one).weight
        decoded = weight.dequantize()
    case = Case(implementation=tensor.implementation, scheme=tensor.scheme, workload=slug(name)[:80].replace(".", "_"),
                m=PROBE_M, n=weight.shape[0], k=weight.shape[1])
    return Operands(case, tensor.device.type, 0, decoded, weight, decoded)


def implementation_of(tensor: Quantized) -> Implementation:
    """Return an instance of the implementation of `tensor`."""
    return tensor.instance if isinstance(tensor, HeldWeight) else find(tensor.implementation, discover()[0])()


def diagnose_layer(name: str, tensor: Quantized) -> LayerDiagnosis:
    """Diagnose one layer's products."""
    found = diagnose_product(implementation_of(tensor), operands_of(tensor, name))
    return LayerDiagnosis(layer=name, kind=found.kind, message=found.message)


def wrong_decode(model: nn.Module) -> LayerDiagnosis | None:
    """Read the effective weight of one layer per shape and scheme from its products; return the diagnosis of the first
    that differs from the decoded codes, or None.

    KL divergence misses a fault in codes that are rare in the model (subnormals, NaN); this finds it.
    """
    seen = set()
    for name, _, _, tensor in quantized_parameters(model):
        key = tuple(tensor.stored_shape[-2:]), tensor.scheme, tensor.implementation
        if key in seen:
            continue
        seen.add(key)
        operands = operands_of(tensor, name)
        readout = read_out(implementation_of(tensor), operands, seconds=PROBE_SECONDS)
        if readout is not None and not readout.fits(readout.definition):
            return diagnose_layer(name, tensor)
    return None


def random_text(vocabulary: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids [length], for models without a tokenizer."""
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
