"""Store chosen codes and scales in an implementation, and read its effective weight."""

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
"""Experiments use a smaller shape if the case's own has more weights than this."""
SMALLER = 256, 512
UNIT_EXPONENTS = (0, -1, 1, -2, 2, -4, 4, -6, 6)


def small_case(case: Case) -> Case:
    """Return the case, or one with a smaller weight for experiments: square if the case's is."""
    if case.n * case.k <= MOST_WEIGHTS:
        return case
    n, k = (SMALLER[0], SMALLER[0]) if case.n == case.k else (min(case.n, SMALLER[0]), min(case.k, SMALLER[1]))
    return case.model_copy(update={"n": n, "k": k})


class Bench:
    """A test bench for an implementation on one shape.

    If the implementation keeps codes only in a known layout, they are set directly (`sets_codes`). Otherwise it
    quantizes a weight for which the scheme's definition determines the wanted codes and scales: each block then holds
    the format's largest number, in its middle, which determines its scale.
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
        """All stored weights: an implementation may identify a weight by its address, which must not be reused."""
        self.rows_mixed = False
        """Set if codes are read from other rows: experiments then use one code everywhere."""
        self.original = self.weight(case)
        self.template = self.quantized(self.original).weight
        if self.template.has_codes:
            self.judged = as_judged(self.template, implementation.scale_rule).scheme
            self.scaling = self.judged.scaling
        self.sets_codes = self.template.has_codes and not self.template.extra
        self.unit = 1.0
        """The scale under which codes are read; see `choose_unit`."""

    def weight(self, case: Case, contents: WeightContents | None = None) -> Tensor:
        """Return the weight of a case, fp32 [N, K], rounded to the activation's dtype if the implementation casts it.
        """
        weight = inputs.make_weight(case, self.seed, self.device, contents)
        return weight.to(self.dtype).float() if getattr(self.implementation, "casts_weight", False) else weight

    def quantized(self, original: Tensor) -> Operands:
        """Return `original` [N, K] as the implementation stores it; `decoded` follows the scheme's definition."""
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

    # Scales: [1, 1], [N, 1] or [N, G], given by their values.

    @property
    def grid_shape(self) -> tuple[int, int]:
        return self.scaling.grid_shape(self.n, self.k)

    def scales(self, numbers: Tensor) -> Scales:
        """Return scales of these values, [grid_shape] or broadcast to it, which the scale format must represent."""
        return self.scaling.scales_from(numbers.float().to(self.device).expand(self.grid_shape).contiguous())

    def scales_of_codes(self, codes: Tensor) -> Scales:
        """Return scales of these stored codes, uint8 [grid_shape] or broadcast to it, under a tensor scale of 1."""
        grid = codes.to(torch.uint8).to(self.device).expand(self.grid_shape).contiguous()
        return Scales(grid, torch.ones(1, device=self.device) if self.scaling.has_tensor_scale else None)

    @cached_property
    def unscaled(self) -> Tensor:
        """Where weights are not multiplied by their scale, bool [N, K]; set by `recover_blocks`."""
        return torch.zeros(self.n, self.k, dtype=torch.bool, device=self.device)

    def choose_unit(self) -> None:
        """Set the unit scale to the power of two nearest 1 under which the largest code reads as a nonzero number."""
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
        """Return the effective weight of uint8 `codes` under the unit scale, divided by that scale: float64 [N, C]."""
        return self.read(self.hold(codes, self.unit_scales), columns) / self.unit

    @cached_property
    def forced(self) -> Tensor:
        """Where a code cannot be chosen, bool [N, K]: a block's middle, which holds the largest number. Its ends stay
        free, to detect a neighbour's scale."""
        forced = torch.zeros(self.n, self.k, dtype=torch.bool, device=self.device)
        if not self.sets_codes:
            rows, block = self.scaling.block_shape(self.n, self.k)
            starts = torch.arange(0, self.k, block, device=self.device)
            forced[::rows, (starts + (starts + block).clamp(max=self.k)) // 2] = True
        return forced

    @cached_property
    def free(self) -> Tensor:
        """Where both code and scale can be chosen, bool [N, K]."""
        free = ~self.forced
        if self._scale_is_forced:
            free[0, :self.scaling.block] = False
        return free

    @property
    def scaled(self) -> Tensor:
        """Where codes are read under the chosen scale, bool [N, K]: free, and not multiplied by a constant."""
        return self.free & ~self.unscaled

    @property
    def _scale_is_forced(self) -> bool:
        """Whether row 0's first block must have the largest block scale: if codes cannot be set, nv's tensor scale is
        derived from the largest block scale."""
        return self.scaling.has_tensor_scale and not self.sets_codes

    @property
    def forced_scale(self) -> float | None:
        """The factor of that block under the unit scales; None if scales can be set."""
        if not self._scale_is_forced or self.scaling.scale_format.format is None:
            return None
        tensor = float(self.unit_scales.tensor_scale)
        return self.scaling.scale_format.format.max * (1 / tensor if self.divides_by_global_scale else tensor)

    def hold(self, codes: Tensor, scales: Scales) -> Operands:
        """Store uint8 `codes` [N, K] under `scales`, except where they are not `free`."""
        codes = codes.to(torch.uint8).to(self.device).expand(self.n, self.k)
        codes = torch.where(self.forced, self.fmt.max_code, codes).contiguous()
        if self._scale_is_forced:
            scales = Scales(scales.stored.clone(), scales.tensor_scale)
            scales.stored[0, 0] = self.scaling.scale_format.format.max_code
        decoded = self.scheme.dequantize(codes, scales)
        if not self.sets_codes:
            return replace(self.quantized(decoded), decoded=decoded)
        stored = QuantizedWeight.from_codes(codes, scales, self.scheme, self.template.layout)
        self._alive.append(stored)
        return Operands(self.case, self.device, self.seed, decoded, stored, decoded)

    def read(self, operands: Operands, columns: Tensor | None = None) -> Tensor:
        """Return the effective weight, float64 [N, C]: all columns, or `columns`."""
        wanted = list(range(self.k)) if columns is None else columns.tolist()
        return torch.cat(
            [weights for _, weights in contract.one_hot_columns(self.implementation, operands, wanted)], dim=1
        ).double()

    def row_sums(self, operands: Operands) -> Tensor:
        """Return the sums of the effective weight's rows, float64 [N]; unlike one-hot products, they keep infinity."""
        x = torch.ones(self.case.m, self.k, dtype=self.dtype, device=self.device)
        return contract.call(self.implementation.matmul, x, operands.weight, self.device).seen[0].double()

    def readout(self, operands: Operands, *, unseen: bool | None = None) -> Readout:
        """Read out every weight. `unseen`: treat the codes of `operands.original` as hidden (None: unless the
        implementation stores codes)."""
        unseen = not operands.weight.has_codes if unseen is None else unseen
        weight = self._as_judged(operands.weight)
        if unseen:
            weight = QuantizedWeight.from_codes(*self.judged.quantize(operands.original), self.judged, "bytes")
        definition = Prediction(weight.dequantize().double(), ~weight.dequantize().isfinite().all(dim=1))
        return Readout(weight, torch.arange(self.k, device=self.device), self.read(operands), definition, self.dtype,
                       self.implementation.activation_format_under(self.scheme), operands.original if unseen else None)

    # Comparison of numbers read.

    def near(self, seen: Tensor, wanted: Tensor, roundings: float | Tensor = 1) -> Tensor:
        """Return where `seen` equals `wanted`, which 16 bits hold exactly, within `roundings`; NaN equals NaN, and
        infinity infinity."""
        finfo = torch.finfo(self.dtype)
        tolerance = roundings * reference.unit_roundoff(self.dtype) * wanted.abs() + finfo.smallest_normal * finfo.eps
        past = wanted.abs() > finfo.max
        return ((((seen - wanted).abs() <= tolerance) & wanted.isfinite()) | (seen.isnan() & wanted.isnan())
                | (seen == wanted) | (past & ~seen.isfinite()))

    @property
    def table(self) -> Tensor:
        """The format's decode table, float64 [2**bits]."""
        return decode_table(self.fmt, self.device).double()
