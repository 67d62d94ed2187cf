"""How does a quantized weight take a parameter's place?

A FloatTensor is what an `nn.Linear` holds. It looks like a 16-bit tensor [N, K], or [E, N, K] of experts, and stores
packed codes and scales. `F.linear` and `torch.matmul` call an implementation's fused product through one custom
operator, which `torch.compile` and `torch.export` keep whole. What a quantized tensor cannot do raises
NotImplementedError that names `dequantize()`.
"""

from fpxbench.model.float_tensor import cuts, handlers  # noqa: F401  (they register the operations)
from fpxbench.model.float_tensor.cuts import sliced
from fpxbench.model.float_tensor.files import load_file, save_file
from fpxbench.model.float_tensor.subclass import FloatTensor

__all__ = ["FloatTensor", "load_file", "save_file", "sliced"]
