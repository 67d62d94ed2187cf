"""humming (vLLM, Ant Group): CUDA kernels compiled on demand, for weights of up to 8 bits."""

from dataclasses import replace

import torch

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls.peers._libraries import GivenWeights, library, missing
from fpxbench.numbers.weight import QuantizedWeight

FORMATS = {
    "e4m3fn": "float8e4m3",
    "e5m2": "float8e5m2",
    "e3m2": "float6e3m2",
    "e2m3": "float6e2m3",
    "e2m1": "float4e2m1",
}
SCALES = {
    "row": {},
    "mx": {"scale_dtype": "float8e8m0", "group_size": 32},
    "nv": {"scale_dtype": "float8e4m3", "group_size": 16, "scale_2_type": "tensor"},
}


@implementation("humming")
class Humming(Implementation):
    """`humming_forward` on the weight of a `HummingLayer`, for bfloat16 activations.

    It is given the oracle's codes, and the oracle's scales as the layer stores them: those of rows are rounded to
    bfloat16. The layer's bytes are in an order of its own, so the weight that was given to it is read back from a copy
    in host memory. Each weight has its own locks: two concurrent products that share locks deadlock.
    """

    def __init__(self):
        self._given = GivenWeights()
        self._configs = {}

    def supports(self, scheme, device):
        if (reason := missing("humming", "humming-kernels", device, needs_gpu=True)) is not None:
            return reason
        if (
            not scheme.quantized
            or scheme.activation
            or scheme.format.name not in FORMATS
            or scheme.scaling.name not in SCALES
        ):
            return Support.no(f"supports {', '.join(FORMATS)} with a scale per row, mx or nv only, not {scheme.name}")
        return Support.yes()

    def library(self):
        return library("humming-kernels")

    def quantize(self, weight, scheme):
        from humming.layer import HummingLayer
        from humming.ops import pack_weight

        n, k = weight.shape
        if n % 64 or k % 128:
            raise NotImplementedError(f"humming needs N in multiples of 64 and K of 128, not [{n}, {k}]")
        codes, scales = scheme.quantize(weight)
        stored = {"row": lambda s: s.to(torch.bfloat16), "mx": lambda s: s.view(torch.float8_e8m0fnu),
                  "nv": lambda s: s.view(torch.float8_e4m3fn)}[scheme.scaling.name](scales.stored)
        given = {"weight": pack_weight(codes.to(torch.int32), scheme.format.bits), "weight_scale": stored}
        if scales.tensor_scale is not None:
            given["weight_scale_2"] = scales.tensor_scale.float()
        layer = HummingLayer(shape_n=n, shape_k=k, torch_dtype=torch.bfloat16,
                             weight_config={"dtype": FORMATS[scheme.format.name], **SCALES[scheme.scaling.name]}).cuda()
        layer.load_from_tensors(given)
        layer.transform()
        made = QuantizedWeight(scheme, (n, k), "humming", layer.weight.data, layer.weight_scale.data,
                               getattr(layer, "weight_scale_2", None), extra={"locks": layer.locks})
        self._configs[scheme.name, n, k] = layer.humming_config
        as_given = scales.stored.to(torch.bfloat16).float() if scheme.scaling.name == "row" else scales.stored
        self._given.keep(made, codes, replace(scales, stored=as_given))
        return made

    def dequantize(self, weight):
        return self._given.decoded(weight)

    def matmul(self, x, weight):
        from humming.forward import humming_forward

        if x.dtype != torch.bfloat16:
            raise NotImplementedError("the layer is prepared for bfloat16 activations")
        n, k = weight.shape
        config = self._configs[weight.scheme.name, n, k]
        rows = x.reshape(-1, k).contiguous()
        if not len(rows):
            return x.new_empty(*x.shape[:-1], n)
        y = humming_forward(config, inputs=rows, weight=weight.packed, weight_scale=weight.scales,
                            weight_scale_2=weight.tensor_scale, locks=weight.extra["locks"])
        return y.reshape(*x.shape[:-1], n)
