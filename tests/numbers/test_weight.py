"""A stored weight: its bytes, and what it reads back as."""

import pytest
import torch

from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.numbers.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


def stored(name, n=16, k=256, layout="planar", seed=0):
    scheme = scheme_named(name)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return QuantizedWeight.from_codes(*scheme.quantize(weight), scheme, layout)


QUANTIZED = [name for name in SCHEMES if scheme_named(name).quantized]


@pytest.mark.parametrize(
    ("name", "bytes_per_weight"),
    [("e4m3fn-row", 1.0), ("e3m2-row", 0.75), ("e2m3-row", 0.75), ("e2m1-g32", 0.5), ("mxfp4", 0.5), ("nvfp4", 0.5),
     ("e2m2-row", 0.625), ("e1m1-row", 0.375), ("int8-row", 1.0)],
)
def test_the_stored_tensor_takes_the_formats_bits(name, bytes_per_weight):
    assert stored(name).packed.nbytes == bytes_per_weight * 16 * 256


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_stored_bytes_are_the_schemes_bits_per_weight(name):
    assert stored(name, 64, 512).nbytes * 8 == pytest.approx(
        64 * 512 * scheme_named(name).bits_per_weight(64, 512), rel=1e-12
    )


@pytest.mark.parametrize("layout", ["planar", "bytes"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_stored_reads_back_as_the_oracle_quantized_it(name, layout):
    scheme = scheme_named(name)
    weight = torch.randn(5, 83, generator=torch.Generator().manual_seed(1))
    codes, scales = scheme.quantize(weight)
    kept = QuantizedWeight.from_codes(codes, scales, scheme, layout)
    assert kept.shape == (5, 83) and kept.has_codes
    assert torch.equal(kept.codes(), codes)
    assert torch.equal(kept.dequantize(), scheme.dequantize(codes, scales))
    assert kept.dequantize().dtype == torch.float32


def test_the_scale_grid_of_nvfp4_holds_its_tensor_scale():
    weight = stored("nvfp4")
    decoded_codes = QuantizedWeight(
        weight.scheme, weight.shape, weight.layout, weight.packed, torch.full_like(weight.scales, 0x38), torch.ones(1)
    )
    expected = decoded_codes.dequantize() * weight.scale_grid().repeat_interleave(16, dim=1)
    assert torch.equal(weight.dequantize(), expected)


def test_a_dense_weight_reads_back_as_itself_and_has_no_codes():
    tensor = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight = QuantizedWeight(scheme_named("bf16"), (4, 8), "dense", tensor)
    assert torch.equal(weight.dequantize(), tensor.float())
    assert not weight.has_codes and weight.nbytes == 64
    with pytest.raises(ValueError, match="a bf16 weight has no codes"):
        weight.codes()


def test_extra_tensors_count_as_stored_bytes():
    weight = stored("e4m3fn-row", 4, 32)
    more = QuantizedWeight(
        weight.scheme, weight.shape, weight.layout, weight.packed, weight.scales, extra={"lut": torch.zeros(256)}
    )
    assert more.nbytes == weight.nbytes + 1024


@pytest.mark.parametrize("name", ["e4m3fn-row", "nvfp4"])
def test_a_clone_shares_no_memory(name):
    weight = stored(name)
    copy = weight.clone()
    assert set(copy.tensors()) == set(weight.tensors())
    for key, tensor in weight.tensors().items():
        assert torch.equal(copy.tensors()[key], tensor)
        assert copy.tensors()[key].data_ptr() != tensor.data_ptr()
