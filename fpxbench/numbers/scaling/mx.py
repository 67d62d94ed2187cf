"""``mx``: the OCP Microscaling scale, a power of two for every 32 neighbours along K, and four ways to round it.

The standard rounds down, so that up to half of a binade saturates; hardware and libraries often round otherwise:

- ``mx``: ``2**(floor(log2(amax)) - emax)``. OCP MX v1.0 §6.3.
- ``.ceil``: ``2**(ceil(log2(amax)) - emax)``. torchao ScaleCalculationMode.CEIL.
- ``.even``: amax is rounded to the element's mantissa bits first, half upward; then as ``mx``. torchao EVEN.
- ``.rceil``: ``2**ceil(log2(amax / max))``. PTX cvt.rp.ue8m0, cuBLAS, torchao RCEIL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.formats import Format
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling.base import Scales, Scaling
from fpxbench.numbers.scaling.scale_format import E8M0_SCALE, ScaleFormat

if TYPE_CHECKING:
    from torch import Tensor

E8M0 = E8M0_SCALE.format


@dataclass(frozen=True)
class MXScaling(Scaling):
    block: int | None = 32
    scale_format: ScaleFormat = E8M0_SCALE
    mode: str = "floor"

    kind = "mx"
    description = "an E8M0 scale (a power of two) for every 32 neighbours along K"
    source = "OCP Microscaling Formats (MX) v1.0 §5.1, §6.3; .rceil: PTX cvt.rp.ue8m0, cuBLAS; .ceil, .even: torchao"

    @classmethod
    def modifiers(cls) -> dict[str, dict[str, Any]]:
        return {mode: {"mode": mode} for mode in ("ceil", "even", "rceil")}

    def scales_of(self, amax: Tensor, fmt: NumberFormat) -> Scales:
        """Return each block's power of two as an E8M0 code, rounded as `mode` says."""
        import torch

        if self.mode == "rceil":
            scale = amax / fmt.max
            return Scales(ScaleFormat(E8M0, Rounding.UP).encode(torch.where(scale > 0, scale, 1.0)))
        return Scales(power_of_two(amax, -self._with_exponent(fmt).emax, round_up_from=self._round_up_from(fmt)))

    def reach(self, fmt: NumberFormat) -> float:
        """Return the upper bound of the magnitudes that give the scale 1; under ``floor`` and ``even`` the bound itself
        is excluded."""
        return fmt.max if self.mode == "rceil" else 2.0**self._with_exponent(fmt).emax * self._round_up_from(fmt)

    def _round_up_from(self, fmt: NumberFormat) -> float:
        """Return the significand, in [1, 2], from which amax counts as the next power of two."""
        mantissa_bits = self._with_exponent(fmt).mantissa_bits
        return {"floor": 2.0, "ceil": 1.0, "even": 2.0 - 2.0 ** -(mantissa_bits + 1)}[self.mode]

    def _with_exponent(self, fmt: NumberFormat) -> Format:
        """Return `fmt` itself. Raise ValueError for a codebook: its largest number has no exponent field."""
        if isinstance(fmt, Format):
            return fmt
        raise ValueError(f"{self.name} scales depend on the exponent of the format's largest number, and {fmt.name} is"
                         f" a list of values: use {fmt.name}-mx.rceil")


def power_of_two(x: Tensor, exponent_offset: int = 0, *, round_up_from: float = 2.0) -> Tensor:
    """Return uint8 E8M0 codes of ``2**(e + exponent_offset)``, clamped to E8M0's range, for fp32 ``x = m * 2**e``, m in
    [1, 2).

    Where ``m >= round_up_from`` the next power is taken; ``round_up_from=1`` means ``m > 1``, so that a power of two
    keeps its own. Zero gives the code of 1.0: MX v1.0 leaves it open, and a scale of 2**-127 would be subnormal in
    fp32.
    """
    import torch

    # frexp is exact for subnormals too, where reading the exponent field is not.
    half, exponent = torch.frexp(x)
    up = half * 2 > 1 if round_up_from == 1 else half * 2 >= round_up_from
    code = (exponent - 1 + up.int() + exponent_offset + E8M0.bias).clamp(0, E8M0.max_code)
    return torch.where(x > 0, code, E8M0.bias).to(torch.uint8)
