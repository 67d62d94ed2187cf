"""Numbers that may be right, given in a way that is not."""

import torch

from fpxbench.implementation import implementation

from ._right import Right


@implementation("faulty_stale_output")
class StaleOutput(Right):
    """Returns the output of the call before."""

    previous = None

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        self.previous, y = y, self.previous if self.previous is not None else y
        return y


@implementation("faulty_first_call_only")
class FirstCallOnly(Right):
    """Right once; after that the scale is applied twice."""

    calls = 0

    def factors(self, weight):
        self.calls += 1
        return super().factors(weight) ** min(self.calls, 2)


@implementation("faulty_first_call_wrong")
class FirstCallWrong(Right):
    """Wrong once, right after that."""

    calls = 0

    def product(self, x, w):
        self.calls += 1
        return super().product(x, w) * (1 if self.calls > 1 else 2)


@implementation("faulty_activation_modified")
class ActivationModified(Right):
    """Scales its activation in place."""

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        x *= 2
        return y


@implementation("faulty_weight_modified")
class WeightModified(Right):
    """Changes a stored scale after use."""

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        weight.scales[0, 0] = 1
        return y


@implementation("faulty_original_modified")
class OriginalModified(Right):
    """Changes the weight that it quantizes."""

    def quantize(self, weight, scheme):
        stored = super().quantize(weight, scheme)
        weight[0, 0] = 0
        return stored


@implementation("faulty_unwritten_output")
class UnwrittenOutput(Right):
    """Leaves the last output column to whatever memory held."""

    def matmul(self, x, weight):
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        y[:, :-1] = super().matmul(x, weight)[:, :-1]
        return y


@implementation("faulty_shape")
class WrongShape(Right):
    """Returns the output transposed."""

    def matmul(self, x, weight):
        return super().matmul(x, weight).T


@implementation("faulty_dtype")
class WrongDtype(Right):
    """Returns fp32."""

    def matmul(self, x, weight):
        return super().matmul(x, weight).float()


@implementation("faulty_one_config")
class OneConfig(Right):
    """Wrong with one autotuning configuration, which is not the one that the tuner picks."""

    def configs(self, x, weight):
        return (32, 64, 128)

    def matmul_with(self, x, weight, config):
        y = self.matmul(x, weight)
        return y if config != 64 else y * 0.5
