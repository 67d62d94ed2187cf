"""A right implementation in four small steps, so that an injected fault is one step done wrongly."""

import torch

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.numbers import tensor_codec
from fpxbench.numbers.packing import padded_k
from fpxbench.numbers.weight import QuantizedWeight

# in the child that loads this: small loops lose ten times their time to barriers on a busy machine
torch.set_num_threads(1)


class Right(Implementation):
    """Decode, scale, multiply in fp32."""

    schemes = ("e4m3fn-row",)
    """Those on which the fault makes a difference."""

    def supports(self, scheme, device):
        if scheme.name in self.schemes:
            return Support.yes()
        return Support.no(f"is injected in {', '.join(self.schemes)}")

    def codes(self, weight):
        return weight.codes()

    def table(self, fmt):
        return tensor_codec.decode_table(fmt)

    def factors(self, weight):
        return weight.scheme.scaling.spread(weight.scale_grid(), *weight.shape)

    def decoded(self, weight):
        return self.table(weight.scheme.format).to(weight.device)[self.codes(weight).int()] * self.factors(weight)

    def product(self, x, w):
        return x.float() @ w.T

    def matmul(self, x, weight):
        return self.product(x, self.decoded(weight)).to(x.dtype)


class RightEncoder(Right):
    """The same with the encoder spelled out: a fault is a wrong scale or a wrong code."""

    def scales(self, weight, scheme):
        return scheme.scaling.choose(weight, scheme.format)

    def encode(self, values, fmt):
        return tensor_codec.encode(values, fmt)

    def quantize(self, weight, scheme):
        scales = self.scales(weight, scheme)
        codes = self.encode(scheme.scaling.divide(weight, scales), scheme.format)
        return QuantizedWeight.from_codes(codes, self.stored(scales), scheme, self.layout)

    def stored(self, scales):
        return scales


def faulty(step, *schemes, base=Right):
    """Register `base` with this one step done by the decorated function, as ``faulty_`` and the function's name."""
    def register(function):
        fields = {step: function, "__doc__": function.__doc__, "__module__": function.__module__}
        if schemes:
            fields["schemes"] = schemes
        return implementation(f"faulty_{function.__name__.rstrip('_')}")(type(function.__name__, (base,), fields))
    return register


def swapped(codes, order):
    """Return codes [N, K] of which the len(order) planes, equal parts of the padded K, are taken in another order."""
    k = codes.shape[1]
    planes = torch.nn.functional.pad(codes, (0, padded_k(k) - k)).chunk(len(order), dim=1)
    return torch.cat([planes[plane] for plane in order], dim=1)[:, :k]
