"""torchao's weight-only tensors: FP8 with one scale per row, and NVFP4."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls._compiling import PerShape
from fpxbench.impls.peers._libraries import library, missing
from fpxbench.numbers.weight import QuantizedWeight

LAYOUTS = {"e4m3fn-row": "bytes", "e5m2-row": "bytes", "nvfp4": "nibbles_low_first"}


@implementation("torchao")
class TorchAO(Implementation):
    """torchao's `Float8Tensor` and `NVFP4Tensor`, weight-only: `F.linear` decodes the weight and multiplies.

    On GPUs under `torch.compile`, as torchao's documentation has it, with max-autotune. Eager on CPUs, where compiling
    a shape takes seconds.

    It quantizes its own way. Its codes and scales are stored as it lays them out, and read back by the oracle. MX is
    left out: `MXTensor` multiplies quantized activations only (torchao 0.18).
    """

    own_layouts = LAYOUTS

    def __init__(self):
        self.compiled = PerShape(linear)

    def supports(self, scheme, device):
        if (reason := missing("torchao", "torchao", device, needs_gpu=False)) is not None:
            return reason
        if scheme.name not in LAYOUTS:
            return Support.no(f"supports {', '.join(LAYOUTS)} only, not {scheme.name}")
        return Support.yes()

    def library(self):
        return library("torchao")

    def quantize(self, weight, scheme):
        if scheme.name == "nvfp4":
            from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

            if weight.shape[1] % 16:
                raise NotImplementedError(f"NVFP4Tensor needs K in multiples of 16, not {weight.shape[1]}")
            made = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().amax()))
            scales, tensor_scale = made.scale.view(torch.uint8), made.per_tensor_scale.reshape(1)
        else:
            from torchao.quantization import Float8Tensor

            made = Float8Tensor.from_hp(weight, float8_dtype=getattr(torch, f"float8_{scheme.format.name}"))
            scales, tensor_scale = made.scale, None
        codes = made.qdata.view(torch.uint8)
        return QuantizedWeight(scheme, tuple(weight.shape), LAYOUTS[scheme.name], codes, scales, tensor_scale)

    def matmul(self, x, weight):
        product = self.compiled if x.is_cuda else linear
        return product(x, tensor_of(weight, x.dtype))


def linear(x, weight):
    """Return ``x @ weight.T``, for a weight that is a tensor of torchao's."""
    return F.linear(x, weight)


def tensor_of(weight, dtype):
    """Return the stored weight as torchao's tensor that multiplies activations of `dtype`."""
    if weight.scheme.name == "nvfp4":
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        return NVFP4Tensor(weight.packed, weight.scales.view(torch.float8_e4m3fn), 16, dtype,
                           per_tensor_scale=weight.tensor_scale.reshape(()))
    from torchao.quantization import Float8Tensor

    codes = weight.packed.view(getattr(torch, f"float8_{weight.scheme.format.name}"))
    return Float8Tensor(codes, weight.scales, block_size=[1, weight.shape[1]], dtype=dtype)
