"""Implementations of a few lines: a right one, and ones that read a weight with a fault."""

from __future__ import annotations

from fault_injection import read

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.model.float_tensor import FloatTensor


class Right(Implementation):
    """Decode, multiply in fp32."""

    name = "right"

    def supports(self, scheme, device):
        return Support.yes()

    def matmul(self, x, weight):
        return (x.float() @ weight.dequantize().T).to(x.dtype)


def fragments_mxfp4(values):
    """Return a FloatTensor as a model on a GPU has it: codes in tiles of 8 rows. Here Triton's interpreter reads it."""
    return FloatTensor.from_float(values, "mxfp4", "triton_fused")


def register_reader(name, how, only=None):
    """Register an implementation that reads weights (of the shape `only`, or all) as `read` does with `how`, and return
    its name."""

    @implementation(name)
    class Reading(Right):
        def __init__(self):
            self.decoded = {}

        def matmul(self, x, weight):
            if only is not None and weight.shape != only:
                return super().matmul(x, weight)
            key = weight.packed.data_ptr()
            if key not in self.decoded:     # numpy takes its time
                self.decoded[key] = weight.packed, read(weight, **how).float()
            return (x.float() @ self.decoded[key][1].T).to(x.dtype)

    return name
