"""A quantized checkpoint's layers come into a model with the file's own codes and scales."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_records import BUILD, CPU
from tiny_model import save_tiny
from torch import nn

from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.model import sources
from fpxbench.model.checkpoint_weights import load_quantized_
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.generate_measurement import measure, prepare
from fpxbench.model.generate_messages import GenerateSettings, RowRequest
from fpxbench.model.generate_record import GenerationRecord
from fpxbench.model.stored_checkpoint import load_stored_
from fpxbench.numbers.quantize import quantize
from fpxbench.records.verdict import Status

N, K = 192, 256


def model():
    return nn.ModuleDict({"up": nn.Linear(K, N, bias=False, dtype=torch.bfloat16),
                          "norm": nn.LayerNorm(K, dtype=torch.bfloat16)}).requires_grad_(False)


def stored(scheme):
    return quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), scheme, "bytes")


def written(path, dialect, scheme, name="up", **others):
    tensors = in_dialect(name, stored(scheme), DIALECTS[dialect]) | others
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize(("dialect", "scheme"), [
    ("ct-mxfp4", "mxfp4"), ("modelopt-fp8", "e4m3fn-tensor"), ("torchao", "e4m3fn-row"),
    ("deepseek-v3", "e4m3fn-b128x128"), ("bnb-nf4", "nf4-g64")])
def test_codes_and_scales_are_the_file_s_and_the_rest_is_copied(tmp_path, dialect, scheme):
    loaded, norm = model(), torch.full((K,), 3.0, dtype=torch.bfloat16)
    done = load_quantized_(loaded, written(tmp_path, dialect, scheme, **{"norm.weight": norm}))
    weight = loaded["up"].weight.data
    assert isinstance(weight, FloatTensor) and [each.scheme for each in done.replaced] == [scheme]
    assert torch.equal(weight.weight.codes(), stored(scheme).codes())
    assert torch.equal(weight.dequantize(torch.float32), stored(scheme).dequantize())
    assert torch.equal(loaded["norm"].weight, norm) and not done.left
    x = torch.randn(3, K, dtype=torch.bfloat16)
    torch.testing.assert_close(loaded["up"](x).float(), x.float() @ stored(scheme).dequantize().T, rtol=0.02, atol=0.1)


def stored_folder(folder, dialect="ct-mxfp4", scheme="mxfp4", without=()):
    """Write the tiny model with its linear layers quantized in a dialect; return the codes of each."""
    plain = load_file(save_tiny(folder) / "model.safetensors")
    codes, tensors = {}, {}
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        if name in without:
            continue
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        weight = quantize(tensor, scheme, "bytes")
        codes[layer] = weight.codes()
        tensors |= in_dialect(layer, weight, DIALECTS[dialect])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return codes


def test_a_quantized_folder_is_a_row_of_its_own_beside_the_numbers_it_stands_for(tmp_path):
    codes = stored_folder(tmp_path)
    settings = GenerateSettings(model=str(tmp_path), device="cpu", schemes=["mxfp4"], prompt="the water", new_tokens=3,
                                implementations=["eager_upcast"], text_tokens=64)
    work = tmp_path / "work"
    work.mkdir()
    prepared = prepare(settings, work)
    assert [(row.scheme, row.stored) for row in prepared.rows] == [
        ("bf16", False), ("int8-row", False), ("mxfp4", True), ("mxfp4", False)]
    assert "holds 14 weights as mxfp4; bf16 is their decoded numbers" in prepared.model.note
    source = sources.find_source(str(tmp_path))
    loaded = sources.load_model(source, sources.load_config(source, None), "cpu")
    load_stored_(loaded, tmp_path, "eager_upcast", partly=True)
    assert all(torch.equal(loaded.get_submodule(name).weight.data.weight.codes(), due) for name, due in codes.items())
    result = measure(RowRequest(settings=settings, prepared=prepared, work=work, row=prepared.rows[2], machine=CPU))
    assert result.verdict.status is Status.OK and result.speed is not None, result.verdict
    block = result.quality[0]
    assert block.kl.mean.value <= block.threshold, "its codes stand for the very model that it is compared with"
    assert "14 weights quantized" in result.quantized
    record = GenerationRecord(model=prepared.model, scheme="mxfp4", stored=True, build=BUILD, machine=CPU,
                              **result.model_dump())
    assert record.id.endswith("/eager_upcast/mxfp4/l2/b1/stored") and record.kernel == "eager_upcast, as stored"


def test_a_quantized_folder_that_lacks_a_weight_is_refused(tmp_path):
    stored_folder(tmp_path, without=("model.norm.weight",))
    source = sources.find_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"1 weights of the model are missing from .*model.norm.weight \(not in"):
        sources.load_model(source, sources.load_config(source, None), "cpu")


def test_what_does_not_fit_is_left_with_the_reason_and_nothing_that_fits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no module of that name"):
        load_quantized_(model(), written(tmp_path, "ct-mxfp4", "mxfp4", "down"))
    small = nn.ModuleDict({"up": nn.Linear(K, N // 2, bias=False, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"is \[192, 256\] in the file and \[96, 256\] in the model"):
        load_quantized_(small, written(tmp_path, "ct-mxfp4", "mxfp4"))
    done = load_quantized_(model(), written(tmp_path, "ct-mxfp4", "mxfp4", stray=torch.ones(2)))
    assert done.left == {"stray": "the model has no tensor of that name and shape"}
