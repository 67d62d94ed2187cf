"""gemlite (Mobius Labs / Dropbox): Triton kernels, picked by M and tuned at the first call."""

import torch

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls.peers._libraries import GivenWeights, library, missing
from fpxbench.numbers.weight import QuantizedWeight

SCHEMES = ("e4m3fn-row", "mxfp4", "nvfp4")


@implementation("gemlite")
class GemLite(Implementation):
    """gemlite's A16W8 (FP8), A16W4 MXFP and NVFP kernels, for bfloat16 activations.

    It is given the oracle's codes and scales. Their order in memory is its own and depends on the shape, so the weight
    that was given to it is read back from a copy in host memory.
    """

    def __init__(self):
        self._arguments, self._given = {}, GivenWeights()

    def supports(self, scheme, device):
        if (reason := missing("gemlite", "gemlite", device, needs_gpu=True)) is not None:
            return reason
        if scheme.name not in SCHEMES:
            return Support.no(f"supports {', '.join(SCHEMES)} only, not {scheme.name}")
        return Support.yes()

    def library(self):
        return library("gemlite")

    def quantize(self, weight, scheme):
        from gemlite import helper

        codes, scales = scheme.quantize(weight)
        options = {"device": str(weight.device), "dtype": torch.bfloat16}
        if scheme.name == "e4m3fn-row":
            layer = helper.A16W8_FP8(**options).from_weights(codes.view(torch.float8_e4m3fn), scales=scales.stored)
        elif scheme.name == "mxfp4":
            layer = helper.A16W4_MXFP(**options).from_weights(codes, scales.stored.view(torch.float8_e8m0fnu))
        else:
            layer = helper.A16W4_NVFP(**options).from_weights(
                codes, scales=scales.stored.view(torch.float8_e4m3fn), meta_scale=1 / scales.tensor_scale)
        packed, scale, zeros, meta_scale = layer.get_tensor_args()
        self._arguments[scheme.name, *weight.shape] = zeros, layer.get_meta_args()
        made = QuantizedWeight(scheme, tuple(weight.shape), "gemlite", packed.data, scale.data,
                               extra={"meta": meta_scale.data})
        self._given.keep(made, codes, scales)
        return made

    def dequantize(self, weight):
        return self._given.decoded(weight)

    def matmul(self, x, weight):
        from gemlite import forward_functional

        if x.dtype != torch.bfloat16:
            raise NotImplementedError("the layer is prepared for bfloat16 activations")
        zeros, meta = self._arguments[weight.scheme.name, *weight.shape]
        return forward_functional(x, None, [weight.packed, weight.scales, zeros, weight.extra["meta"]], meta)
