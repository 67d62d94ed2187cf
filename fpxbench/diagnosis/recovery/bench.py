"""Designed experiments: store chosen codes and scales in an implementation, and read its effective weight."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fpxbench.checking import contract, inputs, reference
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.effective_weight import Prediction, Readout
from fpxbench.diagnosis.scale_rules import as_judged, judged_scheme
from fpxbench.implementation import Implementation
from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.scaling import Scales, Scaling
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.workloads import WeightContents

MOST_WEIGHTS = 1 << 17
"""Designed experiments are made on a shape of at most so many weights, where the case's own is larger."""
SMALLER = 256, 512
UNIT_EXPONENTS = (0, -1, 1, -2, 2, -4, 4, -6, 6)


def small_case(case: Case) -> Case:
    """Return the case, or one of a smaller weight to make experiments on: square where the case's is."""
    if case.n * case.k <= MOST_WEIGHTS:
        return case
    n, k = (SMALLER[0], SMALLER[0]) if case.n == case.k else (min(case.n, SMALLER[0]), min(case.k, SMALLER[1]))
    return case.model_copy(update={"n": n, "k": k})


class Bench:
    """An implementation on one shape.

    Where its codes lie in a known layout and nowhere else they are set directly (`sets_codes`). Otherwise it is given a
    weight to quantize for which the scheme's definition determines the very codes and scales wanted: each block then
    holds the format's largest number, in its middle, so that its scale is the one wanted.
    """

    def __init__(self, implementation: Implementation, case: Case, device: str, seed: int) -> None:
        self.implementation, self.case, self.device, self.seed = implementation, case, device, seed
        self.scheme: Scheme = scheme_named(case.scheme)
        self.judged: Scheme = judged_scheme(self.scheme, implementation.scale_rule)
        self.fmt: NumberFormat = self.scheme.format
        self.scaling: Scaling = self.judged.scaling
        self.n, self.k = case.n, case.k
        self.dtype = inputs.ACTIVATION_DTYPES[case.activation]
        self._alive: list[QuantizedWeight] = []
        """Every weight that was stored: an implementation may know a weight by its address, which must not be used
        again."""
        self.rows_mixed = False
        """Set once codes are seen to be read from other rows: experiments then keep to one code everywhere."""
        self.original = self.weight(case)
        self.template = self.quantized(self.original).weight
        if self.template.has_codes:
            self.judged = as_judged(self.template, implementation.scale_rule).scheme
            self.scaling = self.judged.scaling
        self.sets_codes = self.template.has_codes and not self.template.extra
        self.unit = 1.0
        """The scale under which codes are read, see `choose_unit`."""

    def weight(self, case: Case, contents: WeightContents | None = None) -> Tensor:
        """Return the weight of a case, fp32 [N, K], as a module is given it: in the activation's dtype."""
        weight = inputs.make_weight(case, self.seed, self.device, contents)
        return weight.to(self.dtype).float() if getattr(self.implementation, "casts_weight", False) else weight

    def quantized(self, original: Tensor) -> Operands:
        """Return `original` [N, K] as the implementation stores it; `decoded` is what the scheme's definition makes of
        it."""
        weight = self.implementation.quantize(original.clone(), self.scheme)
        self._alive.append(weight)
        decoded = (self._as_judged(weight).dequantize() if weight.has_codes
                   else self.judged.dequantize(*self.judged.quantize(original)))
        return Operands(self.case, self.device, self.seed, original, weight, decoded)

    def _as_judged(self, weight: QuantizedWeight) -> QuantizedWeight:
        return as_judged(weight, self.implementation.scale_rule)

    @property
    def divides_by_global_scale(self) -> bool:
        """Whether the scheme stores the second-level scale as a divisor."""
        return bool(getattr(self.scaling, "divides", False))

    # Scales: [1, 1], [N, 1] or [N, G], chosen by their numbers.

    @property
    def grid_shape(self) -> tuple[int, int]:
        return self.scaling.grid_shape(self.n, self.k)

    def scales(self, numbers: Tensor) -> Scales:
        """Return scales of these numbers, [grid_shape] or broadcast to it: numbers that the scaling's format holds."""
        return self.scaling.scales_from(numbers.float().to(self.device).expand(self.grid_shape).contiguous())

    def scales_of_codes(self, codes: Tensor) -> Scales:
        """Return scales of these stored codes, uint8 [grid_shape] or broadcast to it, under a tensor scale of 1."""
        grid = codes.to(torch.uint8).to(self.device).expand(self.grid_shape).contiguous()
        return Scales(grid, torch.ones(1, device=self.device) if self.scaling.has_tensor_scale else None)

    @cached_property
    def unscaled(self) -> Tensor:
        """Where weights were seen to be multiplied by another factor than their scale's, bool [N, K]; set by
        `recover_blocks`."""
        return torch.zeros(self.n, self.k, dtype=torch.bool, device=self.device)

    def choose_unit(self) -> None:
        """Read codes under the power of two nearest 1 under which a weight of one code is read as a number, not 0."""
        columns = torch.linspace(0, self.k - 1, min(self.k, 8)).round().long().unique().to(self.device)
        for exponent in UNIT_EXPONENTS:
            self.unit = 2.0**exponent
            seen = self.read_codes(torch.full((1, 1), self.fmt.max_code), columns)
            if bool((seen.isfinite() & (seen.abs() > 2.0**-60)).any()):
                return
        self.unit = 1.0

    @property
    def unit_scales(self) -> Scales:
        return self.scales(torch.full((1, 1), self.unit))

    def read_codes(self, codes: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the effective weight of uint8 `codes` under the unit scale, over that scale: float64 [N, C]."""
        return self.read(self.hold(codes, self.unit_scales), columns) / self.unit

    @cached_property
    def forced(self) -> Tensor:
        """Where a code cannot be chosen, bool [N, K]: a block's middle, which holds the largest number. Its ends are
        free: there, a neighbour's scale may be met."""
        forced = torch.zeros(self.n, self.k, dtype=torch.bool, device=self.device)
        if not self.sets_codes:
            rows, block = self.scaling.block_shape(self.n, self.k)
            starts = torch.arange(0, self.k, block, device=self.device)
            forced[::rows, (starts + (starts + block).clamp(max=self.k)) // 2] = True
        return forced

    @cached_property
    def free(self) -> Tensor:
        """Where both code and scale are the ones wanted, bool [N, K]."""
        free = ~self.forced
        if self._scale_is_forced:
            free[0, :self.scaling.block] = False
        return free

    @property
    def scaled(self) -> Tensor:
        """Where codes are read under the scale that is set, bool [N, K]: free, and not seen to meet a constant."""
        return self.free & ~self.unscaled

    @property
    def _scale_is_forced(self) -> bool:
        """Where codes cannot be set, nv's largest block scale decides the tensor scale: row 0's first block has the
        largest there is."""
        return self.scaling.has_tensor_scale and not self.sets_codes

    @property
    def forced_scale(self) -> float | None:
        """What that block multiplies by under the unit scales; None where scales can be set."""
        if not self._scale_is_forced or self.scaling.scale_format.format is None:
            return None
        tensor = float(self.unit_scales.tensor_scale)
        return self.scaling.scale_format.format.max * (1 / tensor if self.divides_by_global_scale else tensor)

    def hold(self, codes: Tensor, scales: Scales) -> Operands:
        """Return the implementation with uint8 `codes` [N, K] under `scales`, but for places that are not `free`."""
        codes = codes.to(torch.uint8).to(self.device).expand(self.n, self.k)
        codes = torch.where(self.forced, self.fmt.max_code, codes).contiguous()
        if self._scale_is_forced:
            scales = Scales(scales.stored.clone(), scales.tensor_scale)
            scales.stored[0, 0] = self.scaling.scale_format.format.max_code
        wanted = QuantizedWeight.from_codes(codes, scales, self.scheme, "bytes")
        if not self.sets_codes:
            return replace(self.quantized(wanted.dequantize()), decoded=wanted.dequantize())
        stored = QuantizedWeight.from_codes(codes, scales, self.scheme, self.template.layout)
        self._alive.append(stored)
        return Operands(self.case, self.device, self.seed, wanted.dequantize(), stored, stored.dequantize())

    def read(self, operands: Operands, columns: Tensor | None = None) -> Tensor:
        """Return the effective weight, float64 [N, C]: every column, or `columns`."""
        wanted = list(range(self.k)) if columns is None else columns.tolist()
        return torch.cat(
            [weights for _, weights in contract.one_hot_columns(self.implementation, operands, wanted)], dim=1
        ).double()

    def row_sums(self, operands: Operands) -> Tensor:
        """Return the sums of the effective weight's rows, float64 [N]: there, infinity is not multiplied by 0."""
        x = torch.ones(self.case.m, self.k, dtype=self.dtype, device=self.device)
        return contract.call(self.implementation.matmul, x, operands.weight, self.device).seen[0].double()

    def readout(self, operands: Operands, *, unseen: bool | None = None) -> Readout:
        """Return every weight read out. What became of `operands.original` is taken for `unseen` where its codes are
        not stored as such."""
        unseen = not operands.weight.has_codes if unseen is None else unseen
        weight = self._as_judged(operands.weight)
        if unseen:
            weight = QuantizedWeight.from_codes(*self.judged.quantize(operands.original), self.judged, "bytes")
        definition = Prediction(weight.dequantize().double(), ~weight.dequantize().isfinite().all(dim=1))
        return Readout(weight, torch.arange(self.k, device=self.device), self.read(operands), definition, self.dtype,
                       self.implementation.activation_format_under(self.scheme), operands.original if unseen else None)

    # What a number looks like once it was read.

    def near(self, seen: Tensor, wanted: Tensor, roundings: float | Tensor = 1) -> Tensor:
        """Return where numbers that were read are those wanted, which 16 bits hold exactly, but for so many roundings;
        NaN is NaN, and infinity infinity."""
        finfo = torch.finfo(self.dtype)
        tolerance = roundings * reference.unit_roundoff(self.dtype) * wanted.abs() + finfo.smallest_normal * finfo.eps
        past = wanted.abs() > finfo.max
        return (
            (((seen - wanted).abs() <= tolerance) & wanted.isfinite())
            | (seen.isnan() & wanted.isnan())
            | (seen == wanted)
            | (past & ~seen.isfinite())
        )

    @property
    def table(self) -> Tensor:
        """The definition's, float64 [2**bits]."""
        return decode_table(self.fmt, self.device).double()
