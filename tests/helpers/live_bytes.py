"""Count the bytes of tensors that are alive while operations run."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The bytes of storages that operations made within, and of a model's parameters, at each moment and at most.

    live : now
    most : the largest value so far
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.most = 0
        self._sizes: dict[int, int] = {}
        for parameter in model.parameters():
            self._add(parameter.data)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is Tensor and not tensor.is_meta:
                self._add(tensor)
        return out
