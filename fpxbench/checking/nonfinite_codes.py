"""Check that NaN and infinity codes, of weights and of scales, are not read as numbers."""

from __future__ import annotations

import torch

from fpxbench.checking import contract, inputs
from fpxbench.checking.operands import Operands
from fpxbench.implementation import Implementation
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.tensor_codec import decode_table, encode
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict


def can_be_stored(operands: Operands) -> str | None:
    """Return why a NaN or infinity code cannot be put into the stored weight; None if it can."""
    weight = operands.weight
    if not weight.scheme.quantized:
        return "the scheme has no codes"
    if not weight.has_codes or weight.extra:
        return "the weight is stored in a layout of the implementation's own"
    return None if _codes(weight) or _scale_codes(weight) else "the scheme has no code that is not a number"


def check_nonfinite_codes(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Return the verdict if a NaN or infinity code, or a NaN scale, is read as a number; else None.

    Quantizers store no such codes. Here rows of ones hold one each, in the column that a one-hot activation reads.
    """
    stored = operands.weight
    of_codes, of_scales = _codes(stored), _scale_codes(stored)
    n, k = stored.shape
    read: list[float] = []
    wanted = of_codes + of_scales
    for start in range(0, len(wanted), n):
        part = wanted[start:start + n]
        one = encode(torch.ones(1), stored.scheme.format)
        codes = one.expand(n, k).clone()
        scales = stored.scheme.scaling.scales_from(torch.ones(stored.scheme.scaling.grid_shape(n, k)))
        grid = scales.stored.clone()
        for row, code in enumerate(part):
            if start + row < len(of_codes):
                codes[row, 0] = code
            else:
                grid[row, 0] = code
        weight = QuantizedWeight.from_codes(codes, Scales(grid, scales.tensor_scale), stored.scheme, stored.layout)
        case = operands.case
        x = inputs.one_hot([0], max(1, case.m), k, inputs.ACTIVATION_DTYPES[case.activation], operands.device)
        y = contract.checked_matmul(implementation, x, weight.to(operands.device), operands.device)[0].tolist()
        if any(not abs(value - 1) < 0.01 for value in y[len(part):]):
            return None     # another fault
        read += y[:len(part)]
    return _verdict(operands, of_codes, of_scales, read)


def _verdict(operands: Operands, of_codes: list[int], of_scales: list[int], read: list[float]) -> Verdict | None:
    """Return the verdict on the numbers `read` for codes, then scale codes."""
    weight = operands.weight
    fmt = weight.scheme.format
    table = decode_table(fmt)
    lost = [(code, value) for code, value in zip(of_codes, read, strict=False) if abs(value) < float("inf")]
    lost_scales = [value for value in read[len(of_codes):] if abs(value) < float("inf")]
    if lost:
        code, value = lost[-1]
        what = "NaN" if bool(table[code].isnan()) else "infinity"
        return Verdict(
            status=Status.WRONG, kind=Kind.NAN_CODE_LOST,
            evidence={"codes_lost": [fmt.describe_code(code) for code, _ in lost], "read_as": repr(value)},
            summary=f"{fmt.describe_code(code)}, {what} in {fmt.name}, is read as {value:.6g}"
                    f" ({len(lost)} of {len(of_codes)} codes that are not numbers are read as numbers)")
    if lost_scales:
        scale_format = weight.scheme.scaling.scale_format.format
        return Verdict(
            status=Status.WRONG, kind=Kind.SCALE_ENDS_LOST,
            evidence={"scale_code": scale_format.describe_code(of_scales[0]), "read_as": repr(lost_scales[0])},
            summary=f"the NaN code 0x{of_scales[0]:02x} of the scale format {scale_format.name} multiplies by"
                    f" {lost_scales[0]:.6g}")
    return None


def _codes(weight: QuantizedWeight) -> list[int]:
    return (~decode_table(weight.scheme.format).isfinite()).nonzero().reshape(-1).tolist()


def _scale_codes(weight: QuantizedWeight) -> list[int]:
    """Return the scale format's NaN code, if it has one."""
    stored = weight.scheme.scaling.scale_format
    return [] if not stored.coded or stored.format.nan_code is None else [stored.format.nan_code]
