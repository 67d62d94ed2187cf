"""What a scaling is: which weights share a scale, how a scale is chosen, how it is stored.

Callers use a scaling's methods and need not know its family. A new one is a file beside this one with a subclass of
`Scaling`, and a line in the table of `fpxbench.numbers.scaling`. Importing this loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.scaling.scale_format import FP32_SCALE, STORED_AS, ScaleFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """Scales as stored, one per block, in the shape of `Scaling.grid_shape`.

    stored : ``[R, G]``, in the scaling's `scale_format`: fp32, bf16 or fp16 numbers, or uint8 codes
    tensor_scale : the second level of a scaling that has one (nv), fp32 ``[1]``
    """

    stored: Tensor
    tensor_scale: Tensor | None = None


@dataclass(frozen=True)
class Scaling:
    """Blocks of an [N, K] weight that share a scale: the base class, and the rule ``scale = amax / max`` in fp32.

    A subclass sets what differs: its `kind`, its blocks, how a scale is stored, and `parse`; where the rule differs,
    also `scales_of` and `reach`. Blocks at the right and lower edge may be smaller.

    block_rows : rows of a block; None: all N
    block : columns of a block; None: all K
    scale_format : how a scale is stored
    """

    block_rows: int | None = 1
    block: int | None = None
    scale_format: ScaleFormat = FP32_SCALE

    kind: ClassVar[str]
    """The family's name, for messages and compiled kernels. Use the scaling's methods instead of comparing it."""
    description: ClassVar[str]
    source: ClassVar[str]
    """Where the scaling is defined."""
    has_tensor_scale: ClassVar[bool] = False
    """Whether block scales are themselves scaled, by one fp32 number per weight matrix."""

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return the scaling of that name, without modifiers; None if it is of another family. Raise nothing."""
        return cls() if name == cls.kind else None

    @property
    def base_name(self) -> str:
        """The name without modifiers, as `parse` reads it."""
        return self.kind

    @classmethod
    def modifiers(cls) -> dict[str, dict[str, Any]]:
        """Return the modifiers that a name of this family may end in, each with the fields that it sets."""
        return {name: {"scale_format": stored} for name, stored in STORED_AS.items()}

    @property
    def name(self) -> str:
        """As in a scheme's name: ``g128``, ``g128.bf16``, ``mx.rceil``."""
        names = [name for name, fields in self.modifiers().items()
                 if all(getattr(self, field) == value for field, value in fields.items())]
        return ".".join([self.base_name, *names])

    # Blocks.

    def block_shape(self, n: int, k: int) -> tuple[int, int]:
        """Return the rows and columns of a whole block of an [n, k] weight."""
        return n if self.block_rows is None else self.block_rows, k if self.block is None else self.block

    def grid_shape(self, n: int, k: int) -> tuple[int, int]:
        """Return the shape ``[R, G]`` of the block scales of an [n, k] weight."""
        rows, columns = self.block_shape(n, k)
        return -(-n // rows), -(-k // columns)

    def blocks(self, k: int) -> int:
        """Return the number of scales along a row of `k` weights."""
        return self.grid_shape(1, k)[1]

    def block_index(self, n: int, k: int, device: str | torch.device = "cpu") -> Tensor:
        """Return which scale each weight has, int64 ``[n, k]``: an index into the flattened grid of scales."""
        import torch

        (rows, columns), (_, blocks) = self.block_shape(n, k), self.grid_shape(n, k)
        row, column = torch.arange(n, device=device), torch.arange(k, device=device)
        return (row // rows * blocks)[:, None] + (column // columns)[None, :]

    def bits_per_weight(self, n: int, k: int) -> float:
        """Return the bits that the scales add to each element of an [n, k] weight."""
        rows, blocks = self.grid_shape(n, k)
        return (self.scale_format.bits * rows * blocks + 32 * self.has_tensor_scale) / (n * k)

    def spread(self, factors: Tensor, n: int, k: int) -> Tensor:
        """Return block `factors` ``[R, G]`` expanded to one per element, ``[n, k]``; a view where possible."""
        import torch

        if self.block is not None:
            if torch.compiler.is_compiling():
                # A repeat that is sliced and then used as a divisor: Inductor 2.13 on a CPU reads wrong factors for the
                # last block.
                factors = factors.index_select(1, torch.arange(k, device=factors.device) // self.block)
            else:
                factors = factors.repeat_interleave(self.block, dim=1)[:, :k]
        if self.block_rows not in (1, None):
            factors = factors.index_select(0, torch.arange(n, device=factors.device) // self.block_rows)
        return factors.expand(n, k)

    def block_amax(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of each block of `weight` [N, K]: ``[R, G]``."""
        import torch

        n, k = weight.shape
        (rows, columns), (row_blocks, blocks) = self.block_shape(n, k), self.grid_shape(n, k)
        magnitude = weight.abs()
        if k % columns or n % rows:
            magnitude = torch.nn.functional.pad(magnitude, (0, -k % columns, 0, -n % rows))
        # Along K first, where the weights of a block are neighbours.
        along_k = magnitude.reshape(row_blocks * rows, blocks, columns).amax(dim=2)
        return along_k.reshape(row_blocks, rows, blocks).amax(dim=1)

    # Scales.

    def choose(self, weight: Tensor, fmt: NumberFormat) -> Scales:
        """Return the scales under which float `weight` [N, K] is stored in `fmt`."""
        return self.scales_of(self.block_amax(weight), fmt)

    def scales_of(self, amax: Tensor, fmt: NumberFormat) -> Scales:
        """Return the scales of blocks whose largest magnitudes are fp32 `amax` ``[R, G]``; 1 for a block of zeros."""
        import torch

        scale = amax / fmt.max
        return Scales(self.scale_format.encode(torch.where(scale > 0, scale, 1.0)))

    def reach(self, fmt: NumberFormat) -> float:
        """Return how large a weight may be in a block whose scale is 1. Past ``fmt.max`` it saturates."""
        return fmt.max

    def scales_from(self, numbers: Tensor) -> Scales:
        """Return scales that store the factors fp32 `numbers` ``[R, G]``, rounded to the scale format."""
        tensor_scale = numbers.new_ones(1) if self.has_tensor_scale else None
        return Scales(self.scale_format.encode(numbers), tensor_scale)

    def levels(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return the block scales, fp32 ``[R, G]``, and what they are multiplied by, fp32 ``[1]`` (1 without a second
        level).
        """
        block = self.scale_format.decode(scales.stored)
        return block, block.new_ones(1) if scales.tensor_scale is None else scales.tensor_scale

    def factors(self, scales: Scales) -> Tensor:
        """Return what each block's codes are multiplied by, fp32 ``[R, G]``: both levels, rounded once to fp32."""
        block = self.scale_format.decode(scales.stored)
        return block * scales.tensor_scale if self.has_tensor_scale else block

    def divide(self, weight: Tensor, scales: Scales) -> Tensor:
        """Return fp32 `weight` [N, K] over its scales; 0 where the stored scale is 0 (nv, tiny block)."""
        import torch

        factors = self.factors(scales)
        divided = weight / self.spread(torch.where(factors > 0, factors, 1.0), *weight.shape)
        if self.scale_format.coded and self.scale_format.format.has_zero:
            divided = torch.where(self.spread(factors > 0, *weight.shape), divided, 0.0)
        return divided
