"""A quantized weight travels: every operation that users need keeps its codes, or refuses and names the way out."""

import json

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from commands import command
from torch import nn

from fpxbench.impls import _fragment_weight
from fpxbench.model import operator
from fpxbench.model.float_tensor import FloatTensor, load_file, save_file, sliced
from fpxbench.model.operator import resolve
from fpxbench.model.quantize_model import quantize_
from fpxbench.model.tensor_check import CLASSES, OperationOutcome, OperationRequest, check
from fpxbench.model.tensor_operations import OPERATIONS
from fpxbench.model.tensor_record import TensorOperationRecord
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.store import Store

VALUES = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
OURS = [name for name in CLASSES if name.startswith("FloatTensor")]
ALONG_K = {"slice columns", "cat along K", "narrow columns and copy_"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tensor", OURS)
def test_every_operation_is_right_or_refused_with_the_way_out(tensor):
    for operation in OPERATIONS:
        result = check(OperationRequest(tensor=tensor, operation=operation))
        expected = OperationOutcome.REFUSED if operation in ALONG_K else OperationOutcome.OK
        assert result.outcome is expected, (operation, result)
        assert expected is OperationOutcome.OK or "cut" in result.message


IN_TILES = "small_implementations:fragments_mxfp4"
COMPILED = [name for name in OPERATIONS if name.startswith("torch.compile")]


@pytest.mark.parametrize("operation", [
    *(name for name in OPERATIONS if name not in COMPILED),
    *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED),
])
def test_every_operation_is_right_or_refused_in_an_implementations_own_layout(operation):
    result = check(OperationRequest(tensor=IN_TILES, operation=operation))
    expected = OperationOutcome.REFUSED if operation in ALONG_K else OperationOutcome.OK
    assert result.outcome is expected, result


def test_a_weight_is_stored_as_its_implementation_multiplies_it_and_in_files_by_rows(tmp_path):
    tensor = FloatTensor.from_float(VALUES, "mxfp4", "triton_fused")
    planar = FloatTensor.from_float(VALUES, "mxfp4", "eager_upcast")
    own = tensor.code_layout
    assert own.startswith("fragment") and tensor.row_tile == 8 and planar.code_layout == "planar"
    assert torch.equal(tensor, planar) and tensor.nbytes_stored == planar.nbytes_stored
    save_file({"w": tensor}, tmp_path / "tiles.safetensors")
    loaded = load_file(tmp_path / "tiles.safetensors")["w"]
    assert loaded.code_layout == "planar" and torch.equal(loaded.packed, planar.packed)
    assert loaded.laid_out().code_layout == own, "as .to(device) leaves it on the device that multiplies"
    assert torch.equal(loaded.laid_out().packed, tensor.packed)
    ragged = FloatTensor.from_float(VALUES[:100], "mxfp4", "triton_fused")
    assert ragged.code_layout == ragged.laid_out().code_layout == "planar", "tiles have 8 rows"
    experts = FloatTensor.from_float(torch.stack([VALUES, -VALUES]), "mxfp4", "triton_fused")
    assert experts.code_layout == own and torch.equal(experts.portable()[0].packed, planar.packed)
    assert torch.equal(experts.portable().laid_out().packed, experts.packed)


def test_its_parts_go_to_shared_memory_and_nothing_reads_numbers_that_it_has_not():
    tensor = FloatTensor.from_float(VALUES, "mxfp4")
    assert not tensor.is_shared()
    linear = nn.Linear(256, 128, bias=False)
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    linear.share_memory()           # PyTorch reads memory that a wrapper does not have: it ended the process
    assert linear.weight.is_shared() and linear.weight.packed.is_shared()
    for read in (tensor.numpy, tensor.tolist):
        with pytest.raises(NotImplementedError, match="codes, not numbers; dequantize"):
            read()


def test_rows_cut_between_tiles_share_memory_and_others_are_a_copy_that_takes_no_writes():
    tensor = FloatTensor.from_float(VALUES, "mxfp4", "triton_fused")
    between, within = tensor[8:24], tensor[4:24]
    assert torch.equal(between.dequantize(), tensor.dequantize()[8:24])
    assert torch.equal(within.dequantize(), tensor.dequantize()[4:24])
    assert (between.code_layout, within.code_layout) == (tensor.code_layout, "planar")
    between.copy_(tensor[32:48])
    assert torch.equal(tensor.dequantize()[8:24], tensor.dequantize()[32:48])
    with pytest.raises(NotImplementedError, match="would be lost; cut at other rows, or write into slices of"):
        within.copy_(tensor[32:52])
    within.clone().copy_(tensor[32:52])
    assert torch.equal(torch.cat([tensor[:8], tensor[8:20], tensor[20:]]).dequantize(), tensor.dequantize())
    rows = tensor.portable()
    rows[4:24].copy_(tensor[32:52])
    assert torch.equal(rows.dequantize()[4:24], tensor.dequantize()[32:52])


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_what_a_kernel_derives_from_a_weight_is_made_with_it_and_holds_no_second_copy(backend, monkeypatch):
    made = []
    real = _fragment_weight.operands
    monkeypatch.setattr(_fragment_weight, "operands", lambda weight: made.append(real(weight)) or made[-1])
    linear = nn.Linear(256, 16, bias=False, dtype=torch.bfloat16)
    quantize_(nn.Sequential(linear), "mxfp4", "triton_fused")
    assert any(each.packed.data_ptr() == linear.weight.packed.data_ptr() for each in made)
    made.clear()
    product = linear if backend is None else torch.compile(linear, backend=backend, fullgraph=True)
    with torch.no_grad():
        first, second = (product(torch.ones(1, 256, dtype=torch.bfloat16)) for _ in range(2))
    assert torch.equal(first, second)
    assert not made, "left to be made while a CUDA graph is captured"


def test_experts_are_the_same_objects_in_every_call_until_they_change():
    tensor = FloatTensor.from_float(torch.stack([VALUES, -VALUES]), "mxfp4", "eager_upcast")
    parts, before = tensor._parts(), len(operator._EXPERTS)

    def experts():
        return operator.kept_experts(parts["packed"], parts["scales"], None, "mxfp4", tensor.code_layout, (128, 256))

    kept = experts()
    assert experts() is kept and kept.packed.data_ptr() == tensor.packed.data_ptr()
    tensor.scales.add_(1)
    assert experts() is not kept
    tensor = parts = None
    assert len(operator._EXPERTS) == before, "kept longer than the weight"


@pytest.mark.parametrize("scheme", [
    "e4m3fn-row", "e3m2-g128", "e4m3fn-b128x128", "mxfp4.rceil", "nvfp4.div", "nf4-g64", "int8-row",
])
def test_linear_multiplies_by_the_very_codes(scheme):
    tensor = FloatTensor.from_float(VALUES, scheme)
    codes, scales = scheme_named(scheme).quantize(VALUES)
    assert torch.equal(tensor.weight.codes(), codes)
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = x.double() @ scheme_named(scheme).dequantize(codes, scales).double().T
    torch.testing.assert_close(
        F.linear(x, tensor).double(), expected, rtol=2**-7, atol=2**-8 * expected.abs().max().item()
    )
    assert tensor.nbytes_stored < tensor.numel() * 2


def test_columns_are_cut_where_the_layout_keeps_them_apart():
    for scheme, layout in (("e4m3fn-row", "bytes"), ("mxfp4", "nibbles_low_first")):
        weight = FloatTensor.from_float(VALUES, scheme).weight.relayout(layout)
        tensor = FloatTensor.from_weight(weight)
        assert torch.equal(tensor[:, 64:128].dequantize(), tensor.dequantize()[:, 64:128])
        target = tensor.clone()
        target.narrow(1, 0, 64).copy_(tensor.narrow(1, 64, 64))
        assert torch.equal(target.dequantize()[:, :64], tensor.dequantize()[:, 64:128])
        assert torch.equal(target.dequantize()[:, 64:], tensor.dequantize()[:, 64:])


@pytest.mark.parametrize(("scheme", "act", "says"), [
    ("mxfp4", lambda t: t[:, 8:40], "goes through blocks of 32"),
    ("e4m3fn-b128x128", lambda t: t[64:], "goes through blocks of 128"),
    ("e4m3fn-row", lambda t: t.view(64, 512), "cannot be viewed as [64, 512]"),
    ("e4m3fn-row", lambda t: t[::2], "without steps"),
    ("e4m3fn-row", lambda t: t + 1, "does not implement aten.add"),
    ("e4m3fn-row", lambda t: torch.cat([t, t.dequantize()]), "joins FloatTensors with each other"),
    ("nvfp4", lambda t: torch.cat([t, FloatTensor.from_float(2 * VALUES, "nvfp4")]), "different tensor scales"),
    ("e4m3fn-tensor", lambda t: torch.cat([t, FloatTensor.from_float(-2 * VALUES, t.scheme)]), "different scales"),
])
def test_what_it_cannot_do_is_refused(scheme, act, says):
    with pytest.raises(NotImplementedError) as refusal:
        act(FloatTensor.from_float(VALUES, scheme))
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tensor_of_another_scheme_or_shape_is_not_copied_into_it():
    tensor = FloatTensor.from_float(VALUES, "mxfp4")
    with pytest.raises(RuntimeError, match="a mxfp4 tensor cannot hold the codes of a nvfp4 one"):
        tensor.copy_(FloatTensor.from_float(VALUES, "nvfp4"))
    with pytest.raises(RuntimeError, match=r"\[128, 256\] cannot be filled from \[64, 256\]"):
        tensor.copy_(VALUES[:64])
    with pytest.raises(RuntimeError, match="its last dimension is not 256"):
        F.linear(torch.zeros(3, 128, dtype=torch.bfloat16), tensor)


def test_experts_are_indexed_and_cut_one_by_one():
    experts = torch.stack([VALUES, 2 * VALUES, -VALUES])
    tensor = FloatTensor.from_float(experts, "nvfp4")
    assert tuple(tensor.shape) == (3, 128, 256)
    assert torch.equal(tensor[1].dequantize(), FloatTensor.from_float(2 * VALUES, "nvfp4").dequantize())
    assert torch.equal(tensor[1:].dequantize(), tensor.dequantize()[1:])
    x = torch.randn(4, 256).to(torch.bfloat16)
    torch.testing.assert_close(F.linear(x, tensor[2]), F.linear(x, tensor.dequantize()[2]), rtol=2**-6, atol=0.5)


@pytest.mark.parametrize("grouped_mm", list(dict.fromkeys(
    [torch._grouped_mm, getattr(F, "grouped_mm", torch._grouped_mm)])))
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_experts_are_multiplied_and_differentiated_by_the_implementations_grouped_product(grouped_mm, compiled):
    tensor = FloatTensor.from_float(torch.stack([VALUES, 2 * VALUES, -VALUES]), "nvfp4", "eager_upcast")
    offsets = torch.tensor([3, 3, 7], dtype=torch.int32)     # the expert in the middle has no rows
    rows = torch.randn(7, 256).to(torch.bfloat16)

    def product(x, weight):
        return grouped_mm(x, weight.transpose(1, 2), offs=offsets)

    def each(x):
        weights = tensor.dequantize()
        return torch.cat([F.linear(x[:3], weights[0]), F.linear(x[3:], weights[2])])

    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    y = (torch.compile(product, backend="aot_eager") if compiled else product)(ours, tensor)
    expected = each(theirs)
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=0.5)
    y.float().sum().backward()
    expected.float().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-6, atol=0.5)
    with pytest.raises(NotImplementedError, match="and offs; dequantize"):
        grouped_mm(rows, tensor[0].t(), offs=offsets)


def test_an_implementation_that_does_not_take_the_scheme_is_named_with_its_reason():
    with pytest.raises(
        ValueError, match="no implementation multiplies nf4-g64 on cpu: int8_weight_only: supports int8-row only"
    ):
        FloatTensor.from_float(VALUES, "nf4-g64", "int8_weight_only")
    with pytest.raises(ValueError, match="nobody does not exist"):
        resolve("nobody", scheme_named("mxfp4"), "cpu")


def _rank(rank, store, results):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tensor = FloatTensor.from_float(VALUES, "mxfp4")
    shard = distribute_tensor(tensor, mesh, [Shard(0)]).to_local()
    linear = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    module = fully_shard(linear, mesh=mesh)
    held = module.weight.to_local().nbytes_stored
    x = torch.ones(3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        same = all(torch.equal(module(x), F.linear(x, tensor)) for _ in range(2))
    results[rank] = (torch.equal(shard.dequantize(), tensor.dequantize()[64 * rank:64 * rank + 64]), held, same)
    dist.destroy_process_group()


@pytest.mark.timeout(240)
def test_two_ranks_hold_half_each_and_gather_codes(tmp_path):
    results = mp.get_context("spawn").Manager().dict()
    mp.start_processes(_rank, (str(tmp_path / "store"), results), nprocs=2, start_method="spawn")
    half = FloatTensor.from_float(VALUES, "mxfp4").nbytes_stored // 2
    assert dict(results) == {0: (True, half, True), 1: (True, half, True)}


def test_a_model_in_a_safetensors_file_has_its_codes_and_nothing_is_pickled(tmp_path):
    tensor = FloatTensor.from_float(VALUES, "nvfp4")
    state = {"layer.weight": nn.Parameter(tensor.t(), requires_grad=False), "norm": torch.ones(3)}
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["layer.weight"], tensor.t()) and torch.equal(loaded["norm"], torch.ones(3))
    assert loaded["layer.weight"].context() == tensor.t().context()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert tensor.nbytes_stored < size < tensor.nbytes_stored + 1500, "packed, with a header"


def test_a_safetensors_file_of_others_and_one_that_lacks_a_part_are_named(tmp_path):
    from safetensors.torch import save_file as save

    save({"weight": torch.ones(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="was not written by save_file"):
        load_file(tmp_path / "other.safetensors")
    tensor = FloatTensor.from_float(VALUES, "mxfp4")
    with pytest.raises(ValueError, match=r"two tensors would be called 'w\.scales'"):
        save_file({"w": tensor, "w.scales": torch.ones(1)}, tmp_path / "twice.safetensors")


# The conformance suite can fail.


class Forgetful(FloatTensor):
    """Loses what is copied into a part of it."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.slice.Tensor:
            return sliced(*args).clone()
        return super().__torch_dispatch__(func, types, args, kwargs)


def forgetful(values):
    whole = FloatTensor.from_float(values, "e4m3fn-row")
    return Forgetful(whole.packed, whole.scales, whole.tensor_scale, *whole._context())


def test_a_class_that_loses_what_is_copied_into_a_part_of_it_is_wrong():
    assert (
        check(OperationRequest(tensor="test_float_tensor:forgetful", operation="narrow rows and copy_")).outcome
        is OperationOutcome.WRONG
    )
    right = check(OperationRequest(tensor="FloatTensor mxfp4", operation="narrow rows and copy_"))
    assert right.outcome is OperationOutcome.OK


def test_a_factory_that_cannot_be_imported_is_a_mistake_of_the_user_s():
    with pytest.raises(ValueError, match="no_module cannot be imported.*PYTHONPATH"):
        check(OperationRequest(tensor="no_module:make", operation="clone"))


def test_torchaos_mx_tensor_loses_columns_that_are_copied_into_it():
    result = check(OperationRequest(tensor="torchao MXTensor", operation="narrow columns and copy_"))
    assert result.outcome is OperationOutcome.WRONG and "differs by up to" in result.message


def test_the_command_shows_a_table_and_a_crash_ends_no_other_operation(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deadly.py").write_text("import os\n\ndef make(values):\n    os.kill(os.getpid(), 11)\n")
    run = command("tensor-check -o clone -o t --json --machine here", "FloatTensor mxfp4", "deadly:make",
                  "--results", str(tmp_path / "results"))
    assert run.exit_code == 1, run.output
    outcomes = [(result["tensor"], result["outcome"]) for result in json.loads(run.stdout)]
    assert outcomes == [("FloatTensor mxfp4", "ok")] * 2 + [("deadly:make", "crash")] * 2
    records, broken = Store(tmp_path / "results", TensorOperationRecord).read_all()
    assert [(record.result.tensor, record.result.outcome) for record in records] == outcomes and not broken
    assert command("tensor-check", "FloatTensor mxfp5").exit_code != 0


def test_products_take_their_operands_by_name_too():
    weight, x = FloatTensor.from_float(VALUES, "mxfp4"), torch.randn(3, 256).bfloat16()
    expected = F.linear(x, weight)
    for product in (F.linear(input=x, weight=weight), torch.matmul(input=x, other=weight.t()),
                    torch.mm(input=x, mat2=weight.t()), x.matmul(other=weight.t()), x.mm(mat2=weight.t())):
        assert torch.equal(product, expected)


def test_codes_of_a_transposed_weight_are_not_copied_into_one_that_is_not():
    """With a square weight their shapes are the same."""
    values = VALUES[:64, :64]
    plain, transposed = (FloatTensor.from_float(each, "e4m3fn-row") for each in (values, values.T))
    transposed = transposed.transpose(0, 1)
    for target, source in ((plain, transposed), (transposed, plain)):
        with pytest.raises(RuntimeError, match="one of them is transposed"):
            target.copy_(source)
        target.copy_(source.dequantize())
        assert (target.dequantize().float() - values.float()).norm() < 0.1 * values.float().norm()


def test_a_tensor_made_like_a_transposed_one_has_its_shape():
    weight = FloatTensor.from_float(VALUES[:32, :64], "mxfp4")
    made = torch.zeros_like(weight.t())
    assert made.shape == weight.t().shape and made.transposed and not made.dequantize().any()
    assert weight.t().new_zeros(64, 16).shape == (64, 16) and weight.new_zeros(16, 64).shape == (16, 64)
