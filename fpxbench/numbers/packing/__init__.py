"""Where do the codes lie in the bytes?

Layouts of this suite and of other libraries; docs/layouts.md specifies each bit by bit. A layout is one `Layout`; a new
one is an entry of `LAYOUTS`, from which the tests, the speed table and `QuantizedWeight` use it. Fragments, which
differ by the codes' mantissa bits, are a family of layouts: `layout_named` makes each from its name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.numbers.packing.fp6_llm import FP6_LLM
from fpxbench.numbers.packing.fragment import fragment_named
from fpxbench.numbers.packing.grouped import BITSTREAM, NIBBLES_HIGH_FIRST, NIBBLES_LOW_FIRST, TORCHAO_FP6
from fpxbench.numbers.packing.layout import CPU_GRAIN, Layout, parts
from fpxbench.numbers.packing.planar import K_MULTIPLE, PLANAR, padded_k, pieces

__all__ = [
    "K_MULTIPLE", "LAYOUTS", "Layout", "is_layout", "layout_named", "pack", "padded_k", "pieces", "row_bytes", "unpack"]

BYTES = Layout("bytes", "one code per byte, without padding: torch's float8 dtypes are views of it",
               widths=tuple(range(1, 9)), row_bytes=lambda k, bits: k,
               write=lambda codes, bits, packed: packed.copy_(codes),
               read=lambda packed, bits, codes: codes.copy_(packed))

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (PLANAR, BYTES, NIBBLES_LOW_FIRST, NIBBLES_HIGH_FIRST, BITSTREAM, TORCHAO_FP6, FP6_LLM)
}


def layout_named(name: str) -> Layout:
    """Return the layout of that name. Raise ValueError, listing the names, for an unknown one."""
    found = LAYOUTS.get(name) or fragment_named(name)
    if found is None:
        raise ValueError(f"no layout {name!r}: one of {', '.join(LAYOUTS)}, fragment_int, fragment_m0 to fragment_m6,"
                         " fragment_quad_int, fragment_quad_m0 to fragment_quad_m6")
    return found


def is_layout(name: str) -> bool:
    """Return whether there is a layout of that name."""
    return name in LAYOUTS or fragment_named(name) is not None


def row_bytes(k: int, bits: int, layout: str) -> int:
    """Return the bytes of a row of `k` codes, padding included."""
    return layout_named(layout).row_bytes(k, bits)


def pack(codes: Tensor, bits: int, layout: str = "planar") -> Tensor:
    """Return uint8 ``[N, row_bytes]`` from uint8 codes ``[N, K]``.

    Raises ValueError for a code wider than `bits`, and for a width or a shape that the layout does not support.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise TypeError(f"pack takes uint8 codes [N, K], not {codes.dtype} {list(codes.shape)}")
    chosen, (n, k) = layout_named(layout), codes.shape
    chosen.check(bits, n, k)
    codes = _readable_as_words(codes)
    if bits < 8:
        for part in parts(codes.numel(), CPU_GRAIN, codes.device):
            largest = int(codes.view(-1)[part].max())
            if largest >> bits:
                raise ValueError(f"code {largest} does not fit {bits} bits")
    packed = codes.new_empty(n, chosen.row_bytes(k, bits))
    if packed.numel():
        chosen.write(codes, bits, packed)
    return packed


def unpack(packed: Tensor, bits: int, k: int, layout: str = "planar") -> Tensor:
    """Return uint8 codes ``[N, K]`` from bytes in the layout, written by `pack` or by another library.

    Raises ValueError for bytes that are not rows of k codes, and for a width or a shape that the layout does not
    support.
    """
    chosen = layout_named(layout)
    size = chosen.row_bytes(k, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != size:
        raise ValueError(
            f"{k} codes of {bits} bits take uint8 [N, {size}] in layout {layout!r},"
            f" not {packed.dtype} {list(packed.shape)}"
        )
    chosen.check(bits, packed.shape[0], k)
    codes = packed.new_empty(packed.shape[0], k)
    if codes.numel():
        chosen.read(_readable_as_words(packed), bits, codes)
    return codes


def _readable_as_words(codes: Tensor) -> Tensor:
    """Return the same bytes, contiguous and aligned to words of 8 bytes."""
    codes = codes.contiguous()
    return codes.clone() if codes.storage_offset() % 8 else codes
