"""How one scale is stored: a number format and the rounding by which a scale becomes one of its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fpxbench.numbers.formats import FORMATS, FP32, WEIGHT_BITS, Format
from fpxbench.numbers.rounding import Rounding

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScaleFormat:
    """A number format of scales.

    format : of up to 8 bits it is stored as uint8 codes, FP32 as fp32 numbers
    rounding : how a scale between two numbers of the format is rounded
    """

    format: Format
    rounding: Rounding = Rounding.NEAREST_EVEN

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def coded(self) -> bool:
        """Whether scales are stored as uint8 codes, not as numbers of a dtype of the framework's."""
        return self.format.bits <= WEIGHT_BITS

    @property
    def powers_of_two(self) -> bool:
        return self.format.mantissa_bits == 0

    def encode(self, numbers: Tensor) -> Tensor:
        """Return fp32 `numbers` as stored, same shape: uint8 codes, or the numbers themselves."""
        from fpxbench.numbers.codec import encode

        return encode(numbers, self.format, self.rounding) if self.coded else numbers

    def decode(self, stored: Tensor) -> Tensor:
        """Return the fp32 numbers of stored scales, same shape, exact."""
        from fpxbench.numbers.codec import decode

        return decode(stored, self.format) if self.coded else stored


FP32_SCALE = ScaleFormat(FP32)
E8M0_SCALE = ScaleFormat(FORMATS["e8m0"], Rounding.TOWARD_ZERO)
E4M3_SCALE = ScaleFormat(FORMATS["e4m3fn"])
