"""What users do with a quantized tensor, operation by operation, each compared with a plain tensor's result.

An operation takes the tensor under test and its dequantized copy, and returns both results. It is right if they agree,
and raises what the class raises.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, K, M = 128, 256, 5
"""Dimensions of the tensor under test and of activations."""
CUT = 64
"""Where tensors are cut: a multiple of every common block."""

Results = tuple[Any, Any]


@dataclass(frozen=True)
class TensorOperation:
    """An operation of users: its name, who needs it, and how to run it."""

    name: str
    needed_by: str
    run: Callable[[Tensor, Tensor], Results]
    stays_quantized: bool = False
    """Whether the result must be a tensor of the class, not a plain one."""


OPERATIONS: dict[str, TensorOperation] = {}


Run = Callable[[Tensor, Tensor], Results]


def operation(name: str, needed_by: str, *, stays_quantized: bool = False) -> Callable[[Run], Run]:
    """Register a function as an operation."""
    def register(run: Run) -> Run:
        OPERATIONS[name] = TensorOperation(name, needed_by, run, stays_quantized)
        return run
    return register


def same(name: str, needed_by: str, act: Callable[[Tensor], Any], *, stays_quantized: bool = True) -> None:
    """Register an operation that is the same code for both tensors."""
    operation(name, needed_by, stays_quantized=stays_quantized)(lambda tensor, plain: (act(tensor), act(plain)))


def activation(*lead: int, requires_grad: bool = False) -> Tensor:
    """Return a bf16 activation [*lead, K], the same in every call."""
    x = torch.randn(*lead, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return x.requires_grad_(requires_grad)


# Copies.
same("detach", "nn.Parameter, state_dict", lambda t: t.detach())
same("clone", "copies", lambda t: t.clone())
same("alias", "autograd", lambda t: torch.ops.aten.alias(t))
same("contiguous", "loaders", lambda t: t.contiguous())
same("deepcopy", "copy.deepcopy of a model", copy.deepcopy)
same("to(dtype)", "model.half()", lambda t: t.to(torch.float16))
same("to(device)", "model.to(device)", lambda t: t.to("cpu", copy=True))
same("repr", "printing", lambda t: bool(repr(t)), stays_quantized=False)
same("nn.Parameter", "nn.Linear.weight", lambda t: nn.Parameter(t, requires_grad=False))

# Views and parts.
same("t", "x @ w.t()", lambda t: t.t())
same("transpose", "x @ w.mT", lambda t: t.transpose(0, 1))
same("view, same shape", "reshape(-1, K)", lambda t: t.view(N, K))
same("slice rows", "tensor parallelism, column-parallel", lambda t: t[CUT:])
same("slice columns", "tensor parallelism, row-parallel", lambda t: t[:, :CUT])
same("select a row", "indexing", lambda t: t[3], stays_quantized=False)
same("split", "fused qkv", lambda t: t.split(CUT)[1])
same("chunk", "fused gate and up", lambda t: t.chunk(2)[0])
same("cat along N", "fusing layers", lambda t: torch.cat([t[:CUT], t[CUT:]]))
same("cat along K", "row-parallel loading", lambda t: torch.cat([t[:, :CUT], t[:, CUT:]], dim=1))


@operation("copy_", "load_state_dict")
def _copy(tensor: Tensor, plain: Tensor) -> Results:
    target = tensor.clone()
    target.copy_(tensor)
    return target, plain


@operation("copy_ from plain numbers", "loading a 16-bit checkpoint into a quantized model")
def _copy_plain(tensor: Tensor, plain: Tensor) -> Results:
    target = tensor.clone()
    target.copy_(plain.to(torch.bfloat16))
    return target, plain


@operation("narrow rows and copy_", "tensor parallelism: each rank's rows are loaded in place")
def _narrow_rows(tensor: Tensor, plain: Tensor) -> Results:
    target = tensor.clone()
    target.narrow(0, 0, CUT).copy_(tensor.narrow(0, CUT, CUT))
    return target, torch.cat([plain[CUT:2 * CUT], plain[CUT:]])


@operation("narrow columns and copy_", "tensor parallelism: each rank's columns are loaded in place")
def _narrow_columns(tensor: Tensor, plain: Tensor) -> Results:
    target = tensor.clone()
    target.narrow(1, 0, CUT).copy_(tensor.narrow(1, CUT, CUT))
    return target, torch.cat([plain[:, CUT:2 * CUT], plain[:, CUT:]], dim=1)


@operation("equal", "tests, tied weights")
def _equal(tensor: Tensor, plain: Tensor) -> Results:
    return (torch.equal(tensor, tensor.clone()), torch.equal(tensor, tensor[:CUT])), (True, False)


@operation("empty_like", "FSDP2, meta initialisation")
def _empty_like(tensor: Tensor, plain: Tensor) -> Results:
    return tuple(torch.empty_like(tensor).shape), tuple(plain.shape)


# Products.
@operation("F.linear", "inference")
def _linear(tensor: Tensor, plain: Tensor) -> Results:
    return F.linear(activation(M), tensor), F.linear(activation(M), plain)


@operation("F.linear, [B, M, K]", "inference")
def _linear_batched(tensor: Tensor, plain: Tensor) -> Results:
    return F.linear(activation(2, M), tensor), F.linear(activation(2, M), plain)


@operation("F.linear with bias", "Qwen, GPT-2")
def _linear_bias(tensor: Tensor, plain: Tensor) -> Results:
    bias = torch.linspace(-1, 1, N, dtype=torch.bfloat16)
    return F.linear(activation(M), tensor, bias), F.linear(activation(M), plain, bias)


@operation("x @ w.t()", "models written without nn.Linear")
def _matmul(tensor: Tensor, plain: Tensor) -> Results:
    return activation(M) @ tensor.t(), activation(M) @ plain.t()


@operation("gradient of x", "LoRA")
def _gradient(tensor: Tensor, plain: Tensor) -> Results:
    ours, theirs = activation(M, requires_grad=True), activation(M, requires_grad=True)
    F.linear(ours, tensor).sum().backward()
    F.linear(theirs, plain).sum().backward()
    return ours.grad, theirs.grad


# Modules and files.


def _holding(tensor: Tensor) -> nn.Linear:
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    return linear


@operation("state_dict, load_state_dict", "checkpoints")
def _state_dict(tensor: Tensor, plain: Tensor) -> Results:
    other = _holding(torch.empty_like(tensor))
    other.load_state_dict(_holding(tensor).state_dict())
    return other(activation(M)), F.linear(activation(M), plain)


@operation("load_state_dict(assign=True)", "checkpoints, meta initialisation")
def _assign(tensor: Tensor, plain: Tensor) -> Results:
    other = nn.Linear(K, N, bias=False, dtype=torch.bfloat16, device="meta")
    other.load_state_dict(_holding(tensor).state_dict(), assign=True)
    return other(activation(M)), F.linear(activation(M), plain)


@operation("module.to(dtype)", "model.half()")
def _module_to(tensor: Tensor, plain: Tensor) -> Results:
    return _holding(tensor).to(torch.float16)(activation(M).half()).float(), F.linear(activation(M), plain).float()


@operation("torch.save, torch.load(weights_only=True)", "checkpoints without arbitrary code")
def _save(tensor: Tensor, plain: Tensor) -> Results:
    stream = io.BytesIO()
    torch.save({"weight": tensor}, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)["weight"], plain


@operation("safetensors, by the library's own functions", "checkpoints on hubs", stays_quantized=True)
def _safetensors(tensor: Tensor, plain: Tensor) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        return _through_safetensors(tensor, Path(folder) / "model.safetensors"), plain


def _through_safetensors(tensor: Tensor, path: Path) -> Tensor:
    """Return the tensor after writing and reading it with its library's functions, or else with safetensors' own."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    name = "layer.weight"       # torchao's functions split it at the dot
    library = type(tensor).__module__.partition(".")[0]
    if library == "fpxbench":
        from fpxbench.model.float_tensor import files

        files.save_file({name: tensor}, path)
        return files.load_file(path)[name]
    if library == "torchao":
        from torchao.prototype.safetensors.safetensors_support import (
            flatten_tensor_state_dict,
            unflatten_tensor_state_dict,
        )

        plain, metadata = flatten_tensor_state_dict({name: tensor})
        save_file(plain, path, metadata=metadata)
        with safe_open(path, framework="pt") as file:
            loaded, _ = unflatten_tensor_state_dict(load_file(path), file.metadata())
        return loaded[name]
    save_file({name: tensor}, path)
    return load_file(path)[name]


# Compilers.


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


@operation("torch.compile(fullgraph=True)", "serving")
def _compile(tensor: Tensor, plain: Tensor) -> Results:
    with _fresh_compiler(), torch.no_grad():
        return torch.compile(_holding(tensor), fullgraph=True)(activation(M)), F.linear(activation(M), plain)


@operation("torch.compile, no recompilation for a new M", "serving")
def _recompile(tensor: Tensor, plain: Tensor) -> Results:
    with _fresh_compiler(), torch.no_grad():
        compiled = torch.compile(_holding(tensor), fullgraph=True)
        compiled(activation(3))
        compiled(activation(4))         # the second size makes M symbolic
        with torch._dynamo.config.patch(error_on_recompile=True):
            return [compiled(activation(m)) for m in (7, 12)], [F.linear(activation(m), plain) for m in (7, 12)]


@operation("torch.export", "deployment")
def _export(tensor: Tensor, plain: Tensor) -> Results:
    with _fresh_compiler(), torch.no_grad():
        program = torch.export.export(_holding(tensor), (activation(M),))
        return program.module()(activation(M)), F.linear(activation(M), plain)


@operation("FakeTensor", "memory planning, compilers")
def _fake(tensor: Tensor, plain: Tensor) -> Results:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    fake = mode.from_tensor(tensor)
    with mode:
        return tuple(F.linear(mode.from_tensor(activation(M)), fake).shape), (M, N)


# Distributed: one rank on gloo runs the same operations as many.


@contextmanager
def _one_rank() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), 1), rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,))
        finally:
            dist.destroy_process_group()


@operation("DTensor, Shard(0)", "tensor parallelism, column-parallel")
def _dtensor(tensor: Tensor, plain: Tensor) -> Results:
    from torch.distributed.tensor import Shard, distribute_tensor

    with _one_rank() as mesh:
        return distribute_tensor(tensor, mesh, [Shard(0)]).to_local(), plain


@operation("FSDP2 fully_shard", "sharded inference and LoRA")
def _fsdp(tensor: Tensor, plain: Tensor) -> Results:
    from torch.distributed.fsdp import fully_shard

    with _one_rank() as mesh, torch.no_grad():
        module = _holding(tensor)
        fully_shard(module, mesh=mesh)
        due = F.linear(activation(M), plain)
        return [module(activation(M)), module(activation(M))], [due, due]  # the second reuses the gathered memory
