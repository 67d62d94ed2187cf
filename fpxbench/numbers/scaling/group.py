"""``gN``: one fp32 scale for every N neighbours along K."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from fpxbench.numbers.scaling.base import Scaling

SIZES = range(2, 65537)


@dataclass(frozen=True)
class GroupScaling(Scaling):
    block: int | None = 128

    kind = "group"
    description = f"gN: one fp32 scale for every N neighbours along K, {SIZES[0]} to {SIZES[-1]}"
    source = "torchao PerGroup, GPTQ and AWQ group_size"

    @property
    def base_name(self) -> str:
        return f"g{self.block}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"g(\d{1,6})", name)
        return cls(block=int(match[1])) if match and int(match[1]) in SIZES else None
