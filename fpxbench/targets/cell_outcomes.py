"""What an answer amounts to: compiled and right, compiled and silently wrong, refused, failed.

A conversion for NVIDIA is run from its PTX: a decode on all 256 codes, an encode where roundings differ. A decode for AMD is judged by its
conversion instruction where that is all there is, a product by the instructions that it is made of. What neither settles has `check` ``none``.
"""

from __future__ import annotations

import importlib.util
import math
import re
from functools import lru_cache

from fpxbench.numbers.formats import BF16, FORMATS, FP16, FP32, Format, format_named
from fpxbench.records.kinds import Kind, sibling_kind
from fpxbench.records.verdict import Status
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.causes import excerpt, failure, native_errors
from fpxbench.targets.encode_check import mistake
from fpxbench.targets.inductor_probes import UNFUSED, told
from fpxbench.targets.matrix import CellOutcome, KernelMetrics
from fpxbench.targets.operations import CONVERTED_BY_A_THREAD, TRITON_DTYPES, ProbeSpec
from fpxbench.targets.ptx import Unmodelled, decoded_table

_FLOATS = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
_CHANGES_A_NUMBER = re.compile(r"\bv_(?:pk_|dual_)?(?:mul|fma|fmac|add|sub|ldexp|cmp|cndmask|max|min)_\w*")
_ADDRESSES = re.compile(r"\bv_(?:lshl_add|add|add3|addc|add_nc|mad)_(?:co_|co_ci_)?(?:u|i|nc_u)\d+\w*")
_FNUZ_HARDWARE = ("gfx942",)
"""Whose ``fp8`` and ``bf8`` are FNUZ; those of gfx950 and gfx12 are OCP's. Source: AMD's CDNA 3 and CDNA 4 ISA guides, §7."""


def unknown_architecture(words: str) -> CellOutcome:
    return CellOutcome(status=Status.MISSING, cause="not known to this build", message=excerpt(words))


def judged(question: ProbeSpec, architecture: Architecture, answer: dict) -> tuple[CellOutcome, KernelMetrics | None]:
    """The outcome of a cell, and the metrics of its object if there is one."""
    if "compiled" not in answer:
        return failure(answer), None
    compiled = answer["compiled"]
    log = answer.get("log", "")
    objects = [launch["facts"] for launch in compiled["launches"] if "facts" in launch] if "launches" in compiled else [compiled]
    if not all(facts["object_bytes"] for facts in objects):
        return CellOutcome(status=Status.ERROR, kind=Kind.EMPTY_OBJECT, message=excerpt(log),
                       cause="compiled without an error into an empty object, or one that is no ELF file"), None
    if said := native_errors(log):
        return CellOutcome(status=Status.ERROR, kind=said[1], cause=said[0], message=excerpt(log)), None
    if "launches" in compiled:
        return _of_launches(question, architecture, compiled["launches"])
    metrics = _metrics(question, compiled)
    if question.operation in ("decode", "integer_decode"):
        if architecture.vendor == "nvidia":
            return _by_table(question.format, question.options["out"], compiled["assembly"]), metrics
        return _by_instruction(question, architecture, compiled), metrics
    if question.operation == "encode" and architecture.vendor == "nvidia":
        return _by_inputs(question, compiled["assembly"]), metrics
    return _by_operands(question, architecture, compiled), metrics


def _metrics(question: ProbeSpec, compiled: dict) -> KernelMetrics:
    a_weight = None
    if sass := compiled.get("sass"):
        a_weight = sum(count for name, count in sass.items() if not name.startswith(("LD", "ST", "ULD", "EXIT", "S2"))) / CONVERTED_BY_A_THREAD
    return KernelMetrics(
        **{name: compiled.get(name) for name in ("registers", "stack_bytes", "shared_bytes", "spills", "load_bits")},
        matrix=sorted(compiled["matrix"]), conversions=sorted(compiled["conversions"]), instructions_a_weight=a_weight,
    )


# A decode, by the table that it decodes by.


def _by_table(format_name: str, out: str, ptx: str, codes_a_thread: int = CONVERTED_BY_A_THREAD, threads: int = 32) -> CellOutcome:
    try:
        table = _table(_body(ptx), out, codes_a_thread, threads)
    except Unmodelled as unknown:
        return _not_run(unknown)
    fmt = format_named(format_name)
    read, right = table[:1 << fmt.bits], tuple(fmt.value(code) for code in range(1 << fmt.bits))
    if _same(read, right):
        return CellOutcome(status=Status.OK, check="table", cause="decodes every code as defined")
    kind, sentence = _mistake(fmt, read)
    wrong = [code for code, (a, b) in enumerate(zip(read, right, strict=True)) if not _same((a,), (b,))]
    some = ", ".join(f"{fmt.describe_code(code)} to {read[code]:g} instead of {right[code]:g}" for code in wrong[:3])
    return CellOutcome(status=Status.WRONG, kind=kind, check="table", cause=sentence,
                   message=f"{len(wrong)} of {len(read)} codes: {some}{' …' if len(wrong) > 3 else ''}; by {_instructions(ptx)}")


def _not_run(unknown: Unmodelled) -> CellOutcome:
    return CellOutcome(status=Status.OK, cause="compiles; not run, as the PTX interpreter does not model it", message=str(unknown))


def _body(ptx: str) -> str:
    """The kernel alone, which is often the same for several targets."""
    return re.sub(r"^\.(?:version|target|address_size)\b[^\n]*\n", "", ptx, flags=re.MULTILINE)


@lru_cache(maxsize=4096)
def _table(ptx: str, out: str, codes_a_thread: int, threads: int) -> tuple[float, ...]:
    return tuple(decoded_table(ptx, _FLOATS[out], codes_a_thread, threads))


def _same(read: tuple[float, ...], right: tuple[float, ...]) -> bool:
    """NaN equals NaN; -0 is not 0."""
    return all(a == b and math.copysign(1, a) == math.copysign(1, b) or (math.isnan(a) and math.isnan(b)) for a, b in zip(read, right, strict=True))


def _mistake(fmt: Format, read: tuple[float, ...]) -> tuple[Kind | None, str]:
    """The known mistake that gives exactly this table."""
    try:
        import torch
    except ModuleNotFoundError:     # an environment that holds a Triton alone
        return None, "decodes by another table than the format's; it takes PyTorch to say which mistake that is"

    from fpxbench.diagnosis.decode_faults import table_faults
    from fpxbench.numbers.codec import decode_table

    right, read_table = decode_table(fmt), torch.tensor(read)
    for fault in table_faults(fmt):
        if torch.equal(torch.nan_to_num(fault.apply(right), nan=math.pi), torch.nan_to_num(read_table, nan=math.pi)):
            return fault.kind, fault.message
    for factor in (2.0, 0.5):
        if _same(read, tuple(float(number) * factor for number in right)):
            return Kind.SCALED, f"every code decodes to {factor:g} times its value, NaN and -0 as they are: a bias that is off by one, or a product by {factor:g}"
    return Kind.GIBBERISH, "decodes by a table that is no known format's"


def _instructions(ptx: str) -> str:
    names = sorted(set(re.findall(r"\bcvt[\w.]*\.(?:e4m3|e5m2|e2m1)x2\b[\w.]*", ptx)))
    return ", ".join(names) or "integer and float operations, no conversion instruction"


# An encode, by what it gives.


def _by_inputs(question: ProbeSpec, ptx: str) -> CellOutcome:
    if importlib.util.find_spec("torch") is None:       # an environment that holds a Triton alone
        return CellOutcome(status=Status.OK, cause="compiles; not run, as the codec that it is compared with takes PyTorch")
    try:
        found = _encode_mistake(_body(ptx), question.format, question.options["source"], question.options["rounding"])
    except Unmodelled as unknown:
        return _not_run(unknown)
    if found is None:
        return CellOutcome(status=Status.OK, check="inputs", cause="rounds every number up to the maximum as asked")
    kind, cause, words = found
    return CellOutcome(status=Status.WRONG, kind=kind, check="inputs", cause=cause, message=f"{words}; by {_instructions(ptx)}")


@lru_cache(maxsize=4096)
def _encode_mistake(ptx: str, format_name: str, source: str, rounding: str) -> tuple[Kind, str, str] | None:
    return mistake(ptx, format_name, source, rounding, CONVERTED_BY_A_THREAD)


# A decode, by its instruction.


def _hardware_format(name: str, architecture: Architecture) -> str | None:
    """Which format an instruction reads or writes as ``fp8`` or ``bf8`` (AMD), ``e4m3`` or ``e5m2`` (NVIDIA)."""
    if architecture.vendor == "nvidia":
        return next((fmt for part, fmt in (("e4m3", "e4m3fn"), ("e5m2", "e5m2"), ("e2m1", "e2m1")) if part in name), None)
    fnuz = "fnuz" if architecture.name in _FNUZ_HARDWARE else ""
    return f"e5m2{fnuz}" if "bf8" in name else (f"e4m3{fnuz or 'fn'}" if "fp8" in name else None)


def _by_instruction(question: ProbeSpec, architecture: Architecture, compiled: dict) -> CellOutcome:
    used = {name: _hardware_format(name, architecture) for name in compiled["conversions"]}
    others = set(_CHANGES_A_NUMBER.findall(_ADDRESSES.sub("", compiled["assembly"])))
    if not used or others:
        return CellOutcome(status=Status.OK, cause="compiles; by operations that are not modelled for this architecture")
    return _compared(question.format, used) or CellOutcome(status=Status.OK, check="instruction", cause="decoded by its own conversion instruction")


def _compared(format_name: str, used: dict[str, str | None]) -> CellOutcome | None:
    """What follows where a format's codes meet instructions of another's with nothing to make up for it; None where all is well."""
    asked = FORMATS.get(format_name)
    for name, hardware in used.items():
        if asked is not None and hardware is not None and hardware != format_name and hardware in FORMATS:
            read = FORMATS[hardware]
            siblings = (read.exponent_bits, read.mantissa_bits) == (asked.exponent_bits, asked.mantissa_bits)
            kind = sibling_kind(asked.specials) if siblings else Kind.GIBBERISH
            return CellOutcome(status=Status.WRONG, kind=kind, check="instruction", message=f"{name} takes {hardware}",
                           cause=f"{format_name} goes through an instruction for {hardware}, and nothing makes up for it")
    return None


# Anything else, by what its operands meet.


def _by_operands(question: ProbeSpec, architecture: Architecture, compiled: dict) -> CellOutcome:
    """Whether fp8 operands go straight into instructions of their own format; nothing about what was converted before."""
    compiles = CellOutcome(status=Status.OK, cause="compiles")
    if question.operation != "fp8_dot":
        return compiles
    used = {_hardware_format(operand, architecture) for types in compiled["matrix_types"] for operand in re.split(r"[._]", types)}
    if not used or compiled["conversions"]:
        return compiles
    if used == set(question.format.split("×")):
        return compiles.model_copy(update={"check": "instruction", "cause": "multiplied by matrix instructions of its own format"})
    # Operations on integers may have made the one format of the other on the way; they are not looked into.
    others = ", ".join(sorted(filter(None, used)))
    return compiles.model_copy(update={"cause": f"compiles; by matrix instructions for {others}, and what is done before is not known"})


# What torch.compile launches: how much of it at once, and its upcast where that is a kernel of its own.


def _of_launches(question: ProbeSpec, architecture: Architecture, launches: list[dict]) -> tuple[CellOutcome, KernelMetrics | None]:
    """KernelMetrics are those of the kernel that reads the weight, unless that is PyTorch's own."""
    outcome = CellOutcome(status=Status.OK, cause=told(launches), flags=(UNFUSED,) if len(launches) > 1 else ())
    upcast = next(launch for launch in launches if "upcast" in launch["does"])
    if "facts" not in upcast:
        return outcome, None
    metrics, facts, block = _metrics(question, upcast["facts"]), upcast["facts"], upcast["block"]
    if upcast["does"] == ["upcast"] and question.format in TRITON_DTYPES:
        if architecture.vendor == "amd":
            alone = _by_instruction(question, architecture, facts)
        elif set(block) == {"threads", "XBLOCK"}:
            alone = _by_table(question.format, question.options["x"], facts["assembly"], block["XBLOCK"] // block["threads"], block["threads"])
        else:
            return outcome, metrics
        if alone.status is Status.WRONG:
            return alone, metrics
        outcome = outcome.model_copy(update={"check": alone.check, "message": alone.message})
    return outcome, metrics


def follow_decodes(outcomes: dict[tuple[str, str], CellOutcome], metrics: dict[tuple[str, str], KernelMetrics]) -> None:
    """Products whose conversion instruction is one by which the same build decodes the same format wrongly are wrong too.

    Changes `outcomes`, by probe and architecture.
    """
    by_instruction: dict[tuple[str, str, str], CellOutcome] = {}
    for (probe, architecture), outcome in outcomes.items():
        operation, fmt, _ = probe.split("/")
        if operation == "decode" and outcome.status is Status.WRONG and outcome.kind in (Kind.FNUZ_AS_FN, Kind.FN_AS_FNUZ):
            for name in metrics[probe, architecture].conversions:
                by_instruction[fmt, architecture, name] = outcome
    for (probe, architecture), outcome in list(outcomes.items()):
        operation, fmt, _ = probe.split("/")
        if operation not in ("dequantized_dot", "inductor") or outcome.status is not Status.OK or (probe, architecture) not in metrics:
            continue
        for name in metrics[probe, architecture].conversions:
            if (decode := by_instruction.get((fmt, architecture, name))) is not None:
                words = f"{name}, by which this build decodes that format wrongly on its own"
                outcomes[probe, architecture] = decode.model_copy(update={"check": "instruction", "message": words})
