"""Run conversions in a child process: together where that saves a compilation, each checked by itself."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch

from fpxbench.casts.cast_record import (
    EXACT_PRODUCT,
    EXAMPLES,
    Behaviour,
    CastResult,
    DifferingInputs,
    Example,
    InputKind,
)
from fpxbench.casts.conformance import Conformance, ConformanceCheck, number_text
from fpxbench.casts.conformance_verdict import verdict_on
from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion, Engine
from fpxbench.casts.engines import Inputs, codes_of, inputs_of, right_bits, to_bits, to_tensor, torch_function
from fpxbench.casts.expected import expected_codes, sibling_of
from fpxbench.casts.finfo import check_finfo
from fpxbench.casts.probe_values import values
from fpxbench.diagnosis.blackbox.module_adapter import function_named
from fpxbench.numbers.rounding import Rounding
from fpxbench.records.compiler_messages import without_source
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict, classify_exception

_PADDING = 64
"""Longer than any vector, so that inputs of different conversions differ in length by more than one vector."""


def run_conversions(chosen: list[Conversion]) -> list[CastResult]:
    """Carry out and check conversions of one engine and device. An exception in one becomes that one's verdict."""
    if chosen[0].engine is Engine.COMPILED and len(chosen) > 1:
        compiled = _compiled_together(chosen)
        if compiled is not None:
            return [_result(conversion, inputs_of(conversion), partial(np.asarray, bits))
                    for conversion, bits in zip(chosen, compiled, strict=True)]
    return [_alone(conversion) for conversion in chosen]


def run_own(conversion: Conversion, name: str) -> CastResult:
    """Carry out and check a cast by ``package.module:function``. Raises ValueError where there is no such function."""
    function = function_named(name, "takes a tensor and returns its codes")
    inputs, source, target = inputs_of(conversion), DTYPES[conversion.source], DTYPES[conversion.target]

    def produce(exchanged: bool = False) -> np.ndarray:
        bits = inputs.operands[0]
        even = np.resize(bits, bits.size + bits.size % 2)       # an even count, as two codes share a byte
        codes = codes_of(function(to_tensor(even, source, conversion.device)), target, even.size)
        return (codes.reshape(-1, 2)[:, ::-1].reshape(-1) if exchanged else codes)[:bits.size]

    found = _result(conversion, inputs, produce)
    if found.verdict.status is not Status.WRONG or target.format is None or target.format.bits != 4 \
            or _result(conversion, inputs, partial(produce, True)).verdict.status is not Status.OK:
        return found
    swapped = Verdict(status=Status.WRONG, kind=Kind.NIBBLE_SWAP,
                      summary="the two codes of each byte are exchanged: the first one belongs in the low bits")
    return found.model_copy(update={"verdict": swapped})


def _alone(conversion: Conversion) -> CastResult:
    if conversion.operation is CastOperation.FINFO:
        return _result(conversion, None, None)
    inputs = inputs_of(conversion)
    return _result(conversion, inputs, lambda: convert(conversion, inputs.operands))


def convert(conversion: Conversion, operands: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return bits of the target for bits of the operands, by the conversion's engine."""
    source, target = DTYPES[conversion.source], DTYPES[conversion.target]
    if conversion.engine in (Engine.TRITON, Engine.TRITON_INTERPRETER):
        if conversion.engine is Engine.TRITON_INTERPRETER:
            os.environ["TRITON_INTERPRET"] = "1"
        from fpxbench.casts.triton_casts import convert as convert_by_triton

        return convert_by_triton(conversion, *operands)
    function = _function(conversion)
    return to_bits(function(*(to_tensor(bits, source, conversion.device) for bits in operands)), target)


@lru_cache(maxsize=1)       # all inputs come in many pieces, which share one compilation
def _function(conversion: Conversion) -> Callable[..., torch.Tensor]:
    function = torch_function(conversion)
    if conversion.engine is not Engine.COMPILED:
        return function
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _compiled_together(chosen: list[Conversion]) -> list[np.ndarray] | None:
    """Return the results of all from one compilation, or None if it failed: the caller then compiles each by itself, so
    that only the faulty one fails.

    Each has inputs of another length, so that Inductor does not fuse them into one loop: a loop is vectorised only if
    all in it can be, and users run each by itself.
    """
    functions, arguments, counts = [], [], []
    for number, conversion in enumerate(chosen):
        operands, dtype = inputs_of(conversion).operands, DTYPES[conversion.source]
        functions.append(torch_function(conversion))
        padded = [np.concatenate([bits, np.resize(bits, _PADDING * number)]) for bits in operands]
        arguments.append([to_tensor(bits, dtype, conversion.device) for bits in padded])
        counts.append(operands[0].size)

    def together(all_arguments):
        return [function(*arguments) for function, arguments in zip(functions, all_arguments, strict=True)]

    torch._dynamo.reset()
    try:
        results = torch.compile(together, fullgraph=True, dynamic=False)(arguments)
        return [to_bits(result, DTYPES[conversion.target])[:count]
                for result, conversion, count in zip(results, chosen, counts, strict=True)]
    except Exception:   # compiling each by itself shows which one
        traceback.print_exc()
        return None


def _result(conversion: Conversion, inputs: Inputs | None, produce: Callable[[], np.ndarray] | None) -> CastResult:
    try:
        if inputs is None:
            conformance = check_finfo(conversion.target)
        elif conversion.operation.on_bits:
            conformance = _check_bits(conversion, inputs, produce())
        else:
            conformance = _check_cast(conversion, inputs, produce())
    except Exception as error:  # a refusal
        result = refusal(conversion, error)
        return result.model_copy(update={"inputs": inputs.count, "inputs_digest": inputs.digest}) if inputs else result
    return checked(conversion, conformance, inputs.digest if inputs else "")


def checked(conversion: Conversion, conformance: Conformance, digest: str) -> CastResult:
    """Return the result of a conversion that ran."""
    return CastResult(conversion=conversion, verdict=verdict_on(conversion, conformance), inputs=conformance.inputs,
                      differing=conformance.differing, inputs_digest=digest, behaviour=conformance.behaviour,
                      differences=conformance.differences)


def refusal(conversion: Conversion, error: Exception) -> CastResult:
    """Return the result of a conversion that raised `error`."""
    traceback.print_exception(error)
    message = without_source(str(error))
    if not message and error.__cause__ is not None:     # Triton's error has the location, its cause the reason
        message = f"{type(error.__cause__).__name__}: {error.__cause__}"
    return CastResult(conversion=conversion, verdict=classify_exception(type(error).__name__, message, ""))


def rounding_of(conversion: Conversion) -> Rounding:
    """Return the rounding that a conversion asks for."""
    return Rounding.TOWARD_ZERO if conversion.operation is CastOperation.CAST_RTZ else Rounding.NEAREST_EVEN


def _check_cast(conversion: Conversion, inputs: Inputs, got: np.ndarray) -> Conformance:
    source, target = DTYPES[conversion.source], DTYPES[conversion.target]
    check = ConformanceCheck(source, target, rounding_of(conversion))
    x = values(inputs.operands[0], source)
    if conversion.operation is not CastOperation.SCALE_THEN_CAST:
        bits = inputs.operands[0]
        sibling = sibling_of(source)
        misread = {sibling.name: values(bits, sibling)} if sibling else {}
        check.add(x, got, lambda index: (_hex(bits[index]), number_text(x[index])), misread)
        return check.result()
    scales = values(inputs.operands[1], source)
    with np.errstate(invalid="ignore"):
        exact = x * scales      # two 16-bit numbers: exact in float64
    rounded = values(expected_codes(exact, source).astype(np.uint16), source)

    def describe(index: int) -> tuple[str, str]:
        return " x ".join(
            _hex(bits[index]) for bits in inputs.operands
        ), f"{number_text(x[index])} x {number_text(scales[index])}"

    check.add(rounded, got, describe, {EXACT_PRODUCT: exact})
    return check.result()


def _check_bits(conversion: Conversion, inputs: Inputs, got: np.ndarray) -> Conformance:
    right = right_bits(conversion, inputs.operands)
    if got.shape != right.shape:
        raise ValueError(f"{inputs.count} inputs gave a result of shape {list(got.shape)}")
    differing = np.flatnonzero(got != right)
    if not differing.size:
        return Conformance(inputs.count, 0, Behaviour(), [])
    examples = [
        Example(input=" , ".join(_hex(bits[index]) for bits in inputs.operands),
                input_value=" , ".join(str(bits[index]) for bits in inputs.operands), got=_hex(got[index]),
                got_value=str(got[index]), expected=_hex(right[index]), expected_value=str(right[index]))
        for index in differing[np.linspace(0, differing.size - 1, min(EXAMPLES, differing.size)).astype(int)]
    ]
    difference = DifferingInputs(kind=InputKind.OTHER, count=int(differing.size), permitted=False, examples=examples)
    return Conformance(inputs.count, int(differing.size), Behaviour(), [difference])


def _hex(bits: np.unsignedinteger) -> str:
    return f"0x{int(bits):0{bits.dtype.itemsize * 2}x}"
