"""``bRxC``: one scale for every R rows by C columns, as DeepSeek-V3's ``b128x128``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from fpxbench.numbers.scaling.base import Scaling

SIZES = range(2, 65537)


@dataclass(frozen=True)
class Block2DScaling(Scaling):
    block_rows: int | None = 128
    block: int | None = 128

    kind = "block2d"
    description = f"bRxC: one scale for every R rows by C columns, {SIZES[0]} to {SIZES[-1]} each"
    source = "DeepSeek-V3 Technical Report, arXiv:2412.19437 §3.3.2; weight_scale_inv in its checkpoints"

    @property
    def base_name(self) -> str:
        return f"b{self.block_rows}x{self.block}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"b(\d{1,6})x(\d{1,6})", name)
        if match and all(int(size) in SIZES for size in match.groups()):
            return cls(int(match[1]), int(match[2]))
        return None
