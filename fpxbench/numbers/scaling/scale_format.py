"""How one scale is stored: a number format and the rounding by which a scale becomes one of its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fpxbench.numbers.dtypes import DTYPE_NAMES
from fpxbench.numbers.formats import BF16, FORMATS, FP16, FP32, WEIGHT_BITS, Format
from fpxbench.numbers.rounding import Overflow, Rounding

if TYPE_CHECKING:
    from torch import Tensor



@dataclass(frozen=True)
class ScaleFormat:
    """A number format of scales.

    format : of up to 8 bits it is stored as uint8 codes, FP32, BF16 and FP16 as numbers of torch's dtype
    rounding : how a scale between two numbers of the format is rounded
    """

    format: Format
    rounding: Rounding = Rounding.NEAREST_EVEN

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def coded(self) -> bool:
        """Whether scales are stored as uint8 codes, not as numbers of a torch dtype."""
        return self.format.bits <= WEIGHT_BITS

    @property
    def powers_of_two(self) -> bool:
        return self.format.mantissa_bits == 0

    def encode(self, numbers: Tensor) -> Tensor:
        """Return fp32 `numbers` as stored, same shape: uint8 codes, or numbers of the format's dtype."""
        import torch

        from fpxbench.numbers.codec_definition import rounded_codes
        from fpxbench.numbers.tensor_codec import encode

        if self.coded:
            return encode(numbers, self.format, self.rounding)
        if self.format == FP32:
            return numbers
        codes = rounded_codes(numbers, self.format, self.rounding, Overflow.SATURATE)
        return codes.to(torch.int16).view(getattr(torch, DTYPE_NAMES[self.format.name].torch))

    def decode(self, stored: Tensor) -> Tensor:
        """Return the fp32 numbers of stored scales, same shape, exact."""
        from fpxbench.numbers.tensor_codec import decode

        return decode(stored, self.format) if self.coded else stored.float()     # widening is exact


FP32_SCALE = ScaleFormat(FP32)
E8M0_SCALE = ScaleFormat(FORMATS["e8m0"], Rounding.TOWARD_ZERO)
E4M3_SCALE = ScaleFormat(FORMATS["e4m3fn"])

STORED_AS = {
    "bf16": ScaleFormat(BF16),
    "fp16": ScaleFormat(FP16),
    # Rounded up, so that no weight saturates: DeepSeek-V3.1's and V4's ``ue8m0`` scales.
    "e8m0": ScaleFormat(FORMATS["e8m0"], Rounding.UP),
}
"""What an fp32 scale may be stored as instead, by the modifier in a scaling's name (``g128.bf16``)."""
