"""A quantized checkpoint's layers come into a model with the file's own codes and scales."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.model.checkpoint_weights import load_quantized_
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.numbers.quantize import quantize

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


def test_what_does_not_fit_is_left_with_the_reason_and_nothing_that_fits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no nn.Linear of that name"):
        load_quantized_(model(), written(tmp_path, "ct-mxfp4", "mxfp4", "down"))
    small = nn.ModuleDict({"up": nn.Linear(K, N // 2, bias=False, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"is \[192, 256\] in the file and \[96, 256\] in the model"):
        load_quantized_(small, written(tmp_path, "ct-mxfp4", "mxfp4"))
    done = load_quantized_(model(), written(tmp_path, "ct-mxfp4", "mxfp4", stray=torch.ones(2)))
    assert done.left == {"stray": "the model has no such tensor of that shape"}
