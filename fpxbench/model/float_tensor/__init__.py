"""How does a quantized weight take a parameter's place?

A FloatTensor is the weight of an `nn.Linear`. It looks like a 16-bit tensor [N, K] ([E, N, K] for experts) and stores
packed codes and scales. `F.linear` and `torch.matmul` call an implementation's fused product through one custom
operator, which `torch.compile` and `torch.export` keep whole. Unsupported operations raise a NotImplementedError that
names `dequantize()`.
"""

from fpxbench.model.float_tensor import cuts, handlers  # noqa: F401  (importing them registers the operations)
from fpxbench.model.float_tensor.cuts import sliced
from fpxbench.model.float_tensor.files import load_file, save_file
from fpxbench.model.float_tensor.subclass import FloatTensor

__all__ = ["FloatTensor", "load_file", "save_file", "sliced"]
