"""``mx``: the OCP Microscaling scale, a power of two for every 32 neighbours along K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fpxbench.numbers.formats import Format
from fpxbench.numbers.scaling.base import Scales, Scaling
from fpxbench.numbers.scaling.scale_format import E8M0_SCALE

if TYPE_CHECKING:
    from torch import Tensor

E8M0 = E8M0_SCALE.format


@dataclass(frozen=True)
class MXScaling(Scaling):
    block: int | None = 32

    kind = "mx"
    description = "an E8M0 scale (a power of two) for every 32 neighbours along K"
    source = "OCP Microscaling Formats (MX) v1.0 §5.1, §6.3"
    scale_format = E8M0_SCALE

    def scales_of(self, amax: Tensor, fmt: Format) -> Scales:
        """Return ``2**(floor(log2(amax)) - emax)`` of each block, as E8M0 codes."""
        return Scales(floor_power_of_two(amax, -fmt.emax))

    def reach(self, fmt: Format) -> float:
        """Return ``2**(emax + 1)``, below which every weight's exponent is emax at most."""
        return 2.0 ** (fmt.emax + 1)


def floor_power_of_two(x: Tensor, exponent_offset: int = 0) -> Tensor:
    """Return uint8 E8M0 codes of ``2**(floor(log2(x)) + exponent_offset)`` for fp32 x >= 0, clamped to E8M0's range.

    Zero gives the code of 1.0: MX v1.0 leaves it open, and a scale of 2**-127 would be subnormal in fp32.
    """
    import torch

    # frexp is exact for subnormals too, where reading the exponent field is not.
    exponent = torch.frexp(x).exponent - 1 + exponent_offset
    code = (exponent + E8M0.bias).clamp(0, E8M0.max_code)
    return torch.where(x > 0, code, E8M0.bias).to(torch.uint8)
