"""Evaluate the answer of a compilation: right, miscompiled (it compiles and computes something else), refused or
failed.

Conversions and stores for NVIDIA are executed from their PTX: a decode on all 256 codes, an encode on inputs where
roundings differ, a store on one tile. A decode for AMD is judged by its conversion instruction if it has no other
arithmetic, a product by its matrix instructions. Everything else has `check` ``none``.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from fpxbench.numbers.formats import BF16, FORMATS, FP16, FP32, Format, format_named
from fpxbench.records.kinds import Kind, sibling_kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.settings import default_memory_limit
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.causes import excerpt, failure, native_errors
from fpxbench.targets.encode_check import encode_fault
from fpxbench.targets.inductor_probes import UNFUSED, launch_summary
from fpxbench.targets.matrix import CellOutcome, KernelMetrics
from fpxbench.targets.operations import CONVERTED_BY_A_THREAD, TRITON_DTYPES, ProbeSpec
from fpxbench.targets.ptx_execution import decoded_table
from fpxbench.targets.ptx_instructions import Miscompiled
from fpxbench.targets.ptx_parser import Unmodelled
from fpxbench.targets.store_check import QuantizeStore, own_store, store_fault

_FLOATS = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
_CHANGES_A_NUMBER = re.compile(r"\bv_(?:pk_|dual_)?(?:mul|fma|fmac|add|sub|ldexp|cmp|cndmask|max|min)_\w*")
_ADDRESSES = re.compile(r"\bv_(?:lshl_add|add|add3|addc|add_nc|mad)_(?:co_|co_ci_)?(?:u|i|nc_u)\d+\w*")
_FNUZ_HARDWARE = ("gfx942",)
"""Architectures whose ``fp8`` and ``bf8`` are FNUZ; those of gfx950 and gfx12 are OCP's. Source: AMD's CDNA 3 and CDNA
4 ISA guides, §7.
"""


def unknown_architecture(message: str) -> CellOutcome:
    """Return the outcome of a cell whose architecture the build does not know."""
    return CellOutcome(status=Status.MISSING, cause="not known to this build", message=excerpt(message))


def evaluate(spec: ProbeSpec, architecture: Architecture, answer: dict) -> tuple[CellOutcome, KernelMetrics | None]:
    """Return the outcome of a cell, and the metrics of its object if there is one."""
    if "compiled" not in answer:
        return failure(answer), None
    compiled = answer["compiled"]
    log = answer.get("log", "")
    objects = [compiled]
    if "launches" in compiled:
        objects = [launch["metadata"] for launch in compiled["launches"] if "metadata" in launch]
    if "store" in compiled:
        objects = [config["metadata"] for config in compiled["store"]["configs"] if "metadata" in config]
    if not all(metadata["object_bytes"] for metadata in objects):
        return CellOutcome(status=Status.ERROR, kind=Kind.EMPTY_OBJECT, message=excerpt(log),
                       cause="compiled without an error into an empty object, or one that is no ELF file"), None
    if error := native_errors(log):
        return CellOutcome(status=Status.ERROR, kind=error[1], cause=error[0], message=excerpt(log)), None
    if "store" in compiled:
        return _of_store(spec, architecture, compiled["store"])
    if "launches" in compiled:
        return _of_launches(spec, architecture, compiled["launches"])
    metrics = _metrics(compiled)
    if spec.operation in ("decode", "integer_decode"):
        if architecture.vendor == "nvidia":
            return _by_table(spec.format, spec.options["out"], compiled["assembly"]), metrics
        return _by_instruction(spec, architecture, compiled), metrics
    if spec.operation == "quantize_store" and architecture.vendor == "nvidia":
        return _by_stores(spec, compiled["assembly"]), metrics
    if spec.operation == "encode" and architecture.vendor == "nvidia":
        return _by_inputs(spec, compiled["assembly"]), metrics
    return _by_operands(spec, architecture, compiled), metrics


def _metrics(compiled: dict) -> KernelMetrics:
    a_weight = None
    if sass := compiled.get("sass"):
        memory = ("LD", "ST", "ULD", "EXIT", "S2")
        a_weight = sum(count for name, count in sass.items() if not name.startswith(memory)) / CONVERTED_BY_A_THREAD
    return KernelMetrics(
        **{name: compiled.get(name) for name in ("registers", "stack_bytes", "shared_bytes", "spills", "load_bits")},
        matrix=sorted(compiled["matrix"]), conversions=sorted(compiled["conversions"]), instructions_a_weight=a_weight,
    )


# A decode, by the table of all its codes.


def _by_table(format_name: str, out: str, ptx: str, codes_a_thread: int = CONVERTED_BY_A_THREAD,
              threads: int = 32) -> CellOutcome:
    try:
        table = _table(_body(ptx), out, codes_a_thread, threads)
    except Unmodelled as unknown:
        return _not_run(unknown)
    fmt = format_named(format_name)
    read, right = table[:1 << fmt.bits], tuple(fmt.value(code) for code in range(1 << fmt.bits))
    if _same(read, right):
        return CellOutcome(status=Status.OK, check="table", cause="decodes every code as defined")
    kind, cause = named_table(fmt, read)
    wrong = [code for code, (a, b) in enumerate(zip(read, right, strict=True)) if not _same((a,), (b,))]
    some = ", ".join(f"{fmt.describe_code(code)} to {read[code]:g} instead of {right[code]:g}" for code in wrong[:3])
    return CellOutcome(status=Status.WRONG, kind=kind, check="table", cause=cause,
                   message=f"{len(wrong)} of {len(read)} codes: {some}{' …' if len(wrong) > 3 else ''}; by "
                           f"{_instructions(ptx)}")


def _not_run(unknown: Unmodelled) -> CellOutcome:
    return CellOutcome(status=Status.OK, cause="compiles; not run, as the PTX interpreter does not model it",
                       message=str(unknown))


def _body(ptx: str) -> str:
    """Return the kernel alone, which several targets often share."""
    return re.sub(r"^\.(?:version|target|address_size)\b[^\n]*\n", "", ptx, flags=re.MULTILINE)


@lru_cache(maxsize=4096)
def _table(ptx: str, out: str, codes_a_thread: int, threads: int) -> tuple[float, ...]:
    return tuple(decoded_table(ptx, _FLOATS[out], codes_a_thread, threads))


def _same(read: tuple[float, ...], right: tuple[float, ...]) -> bool:
    """Return whether two tables are equal; NaN equals NaN, -0 is not 0."""
    return all(a == b and math.copysign(1, a) == math.copysign(1, b) or (math.isnan(a) and math.isnan(b))
               for a, b in zip(read, right, strict=True))


def named_table(fmt: Format, read: tuple[float, ...]) -> tuple[Kind | None, str]:
    """Return the kind and message of the known fault that gives exactly this table."""
    fault = _table_fault(fmt.name, read)
    if fault is not None:
        return fault
    right = tuple(fmt.value(code) for code in range(len(read)))
    for factor in (2.0, 0.5):
        if _same(read, tuple(number * factor for number in right)):
            return Kind.SCALED, (f"every code decodes to {factor:g} times its value, NaN and -0 as they are: a bias "
                                 f"that is off by one, or a product by {factor:g}")
    return Kind.GIBBERISH, "decodes by a table that is no known format's"


@lru_cache(maxsize=256)
def _table_fault(format_name: str, read: tuple[float, ...]) -> tuple[Kind | None, str] | None:
    """Return the kind and message of the fault, from a child: naming it needs PyTorch, which this process does not
    import."""
    with Isolation(default_memory_limit()) as isolation:
        outcome = isolation.call("fpxbench.diagnosis.decode_faults:table_fault_named", format_name,
                                 [repr(number) for number in read], timeout_s=300)
    if outcome.missing_module:      # an environment that holds a Triton alone
        return None, "decodes by another table than the format's; naming the fault takes PyTorch"
    if outcome.value is None:
        raise RuntimeError(f"the fault could not be named: {outcome.failure.summary}\n{outcome.log_tail}")
    return None if outcome.value == "null" else outcome.read(tuple[Kind, str])


def _instructions(ptx: str) -> str:
    names = sorted(set(re.findall(r"\bcvt[\w.]*\.(?:e4m3|e5m2|e2m1)x2\b[\w.]*", ptx)))
    return ", ".join(names) or "integer and float operations, no conversion instruction"


# An encode, by its codes.


def _by_inputs(spec: ProbeSpec, ptx: str) -> CellOutcome:
    try:
        found = _encode_fault(_body(ptx), spec.format, spec.options["source"], spec.options["rounding"])
    except Unmodelled as unknown:
        return _not_run(unknown)
    if found is None:
        return CellOutcome(status=Status.OK, check="inputs", cause="rounds every number up to the maximum as asked")
    kind, cause, message = found
    return CellOutcome(status=Status.WRONG, kind=kind, check="inputs", cause=cause,
                       message=f"{message}; by {_instructions(ptx)}")


@lru_cache(maxsize=4096)
def _encode_fault(ptx: str, format_name: str, source: str, rounding: str) -> tuple[Kind, str, str] | None:
    return encode_fault(ptx, format_name, source, rounding, CONVERTED_BY_A_THREAD)


# A store to two places, by the contents of both.


def _by_stores(spec: ProbeSpec, ptx: str) -> CellOutcome:
    options = spec.options
    # A tail is masked; divisibility by 16 holds where the kernel assumes it.
    rows, columns = (block - 16 if block > 16 else block for block in (options["yblock"], options["xblock"]))
    try:
        fault = store_fault(_body(ptx), spec.format, own_store(rows, columns), options["yblock"], options["xblock"],
                            32 * options["num_warps"])
    except Unmodelled as unknown:
        return _not_run(unknown)
    except Miscompiled as found:
        return CellOutcome(status=Status.WRONG, check="inputs", cause="is wrong for every input", message=str(found))
    if fault is None:
        return CellOutcome(status=Status.OK, check="inputs", cause="stores every value right in both places")
    kind, cause, message = fault
    return CellOutcome(status=Status.WRONG, kind=kind, check="inputs", cause=cause, message=message)


def _of_store(spec: ProbeSpec, architecture: Architecture, store: dict) -> tuple[CellOutcome, KernelMetrics | None]:
    """Return the outcome of all configurations of a kernel of Inductor's, and the metrics of the first that compiles.
    """
    configs = store["configs"]
    if not configs:
        return CellOutcome(status=Status.OK, cause="is not one kernel: PyTorch's own cast, or several kernels",
                           flags=(UNFUSED,)), None
    compiled = [config for config in configs if "metadata" in config]
    if not compiled:
        return failure({"raised": configs[0]["raised"]}), None
    metrics = _metrics(compiled[0]["metadata"])
    notes = [f"{_config(config)}: {' '.join(config['raised'][1].split())[:80]}"
             for config in configs if "raised" in config]
    executed, faults, unmodelled = 0, [], []
    for config in compiled if architecture.vendor == "nvidia" else ():
        try:
            fault = _store_fault(spec, store["arguments"], config)
        except Unmodelled as unknown:
            unmodelled.append(f"{_config(config)}: {unknown}")
        else:
            executed += 1
            faults += [(config, *fault)] if fault else []
    if faults:
        _, kind, cause, _ = faults[0]
        return CellOutcome(status=Status.WRONG, kind=kind, check="inputs", cause=cause, message=(
            f"{len(faults)} of {executed} configurations that were executed: "
            + "; ".join(f"{_config(config)}: {evidence}" for config, _, _, evidence in faults[:3]))), metrics
    message = "; ".join([*unmodelled[:1], *notes[:1]])
    if executed < len(compiled):
        cause = f"compiles; {executed} of {len(compiled)} configurations were executed, and are right"
        return CellOutcome(status=Status.OK, cause=cause, message=message), metrics
    cause = "stores every value right in both places, in every configuration"
    return CellOutcome(status=Status.OK, check="inputs", cause=cause, message=message), metrics


def _config(config: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items() if name not in ("metadata", "raised"))


def _store_fault(spec: ProbeSpec, arguments: list, config: dict) -> tuple[Kind | None, str, str] | None:
    strides = {name: at[0] for argument in arguments if isinstance(argument, dict) for name, at in argument.items()}
    names = tuple(next(iter(argument)) if isinstance(argument, dict) else argument for argument in arguments)
    if set(strides) != {"out", "transposed"}:
        raise Unmodelled(f"a kernel that stores {', '.join(strides) or 'nothing'}")
    store = QuantizeStore(spec.options["rows"], spec.options["columns"], names, strides["out"], strides["transposed"])
    try:
        return store_fault(_body(config["metadata"]["assembly"]), spec.format, store, config.get("YBLOCK", 1),
                           config["XBLOCK"], 32 * config["num_warps"])
    except Miscompiled as fault:
        return None, "is wrong for every input", str(fault)


# A decode, by its instruction.


def _hardware_format(name: str, architecture: Architecture) -> str | None:
    """Return the format of an instruction's ``fp8`` or ``bf8`` (AMD), ``e4m3`` or ``e5m2`` (NVIDIA)."""
    if architecture.vendor == "nvidia":
        return next((fmt for part, fmt in (("e4m3", "e4m3fn"), ("e5m2", "e5m2"), ("e2m1", "e2m1")) if part in name),
                    None)
    fnuz = "fnuz" if architecture.name in _FNUZ_HARDWARE else ""
    return f"e5m2{fnuz}" if "bf8" in name else (f"e4m3{fnuz or 'fn'}" if "fp8" in name else None)


def _by_instruction(spec: ProbeSpec, architecture: Architecture, compiled: dict) -> CellOutcome:
    used = {name: _hardware_format(name, architecture) for name in compiled["conversions"]}
    others = set(_CHANGES_A_NUMBER.findall(_ADDRESSES.sub("", compiled["assembly"])))
    if not used or others:
        return CellOutcome(status=Status.OK,
                           cause="compiles; by operations that are not modelled for this architecture")
    return _compared(spec.format, used) or CellOutcome(status=Status.OK, check="instruction",
                                                       cause="decoded by its own conversion instruction")


def _compared(format_name: str, used: dict[str, str | None]) -> CellOutcome | None:
    """Return the outcome if an instruction of another format converts the codes and nothing corrects that; else None.
    """
    requested = FORMATS.get(format_name)
    for name, hardware in used.items():
        if requested is not None and hardware is not None and hardware != format_name and hardware in FORMATS:
            read = FORMATS[hardware]
            siblings = (read.exponent_bits, read.mantissa_bits) == (requested.exponent_bits, requested.mantissa_bits)
            kind = sibling_kind(requested.specials) if siblings else Kind.GIBBERISH
            return CellOutcome(status=Status.WRONG, kind=kind, check="instruction", message=f"{name} takes {hardware}",
                           cause=f"{format_name} goes through an instruction for {hardware}, and nothing makes up for "
                                 "it")
    return None


# Anything else, by its matrix instructions.


def _by_operands(spec: ProbeSpec, architecture: Architecture, compiled: dict) -> CellOutcome:
    """Return whether fp8 operands reach instructions of their own format; nothing about earlier conversions."""
    compiles = CellOutcome(status=Status.OK, cause="compiles")
    if spec.operation != "fp8_dot":
        return compiles
    used = {_hardware_format(operand, architecture) for types in compiled["matrix_types"]
            for operand in re.split(r"[._]", types)}
    if not used or compiled["conversions"]:
        return compiles
    if used == set(spec.format.split("×")):
        return compiles.model_copy(update={"check": "instruction",
                                           "cause": "multiplied by matrix instructions of its own format"})
    # Integer operations may have converted one format to the other before; they are not examined.
    others = ", ".join(sorted(filter(None, used)))
    return compiles.model_copy(update={"cause": f"compiles; by matrix instructions for {others}, and what is done "
                                       "before is not known"})


# The kernels that torch.compile launches: how many, and the upcast if it is a separate kernel.


def _of_launches(spec: ProbeSpec, architecture: Architecture, launches: list[dict]) -> tuple[CellOutcome,
                                                                                             KernelMetrics | None]:
    """Return the outcome, and the metrics of the kernel that reads the weight unless it is PyTorch's own."""
    outcome = CellOutcome(status=Status.OK, cause=launch_summary(launches),
                          flags=(UNFUSED,) if len(launches) > 1 else ())
    upcast = next(launch for launch in launches if "upcast" in launch["does"])
    if "metadata" not in upcast:
        return outcome, None
    metadata, block = upcast["metadata"], upcast["block"]
    metrics = _metrics(metadata)
    if upcast["does"] == ["upcast"] and spec.format in TRITON_DTYPES:
        if architecture.vendor == "amd":
            alone = _by_instruction(spec, architecture, metadata)
        elif set(block) == {"threads", "XBLOCK"}:
            threads = block["threads"]
            alone = _by_table(spec.format, spec.options["x"], metadata["assembly"], block["XBLOCK"] // threads, threads)
        else:
            return outcome, metrics
        if alone.status is Status.WRONG:
            return alone, metrics
        outcome = outcome.model_copy(update={"check": alone.check, "message": alone.message})
    return outcome, metrics


def follow_decodes(outcomes: dict[tuple[str, str], CellOutcome], metrics: dict[tuple[str, str], KernelMetrics]) -> None:
    """Mark products as wrong whose conversion instruction decodes the same format wrongly on the same build.

    Changes `outcomes`, by probe and architecture.
    """
    by_instruction: dict[tuple[str, str, str], CellOutcome] = {}
    for (probe, architecture), outcome in outcomes.items():
        operation, fmt, _ = probe.split("/")
        if operation == "decode" and outcome.status is Status.WRONG and outcome.kind in (Kind.FNUZ_AS_FN,
                                                                                         Kind.FN_AS_FNUZ):
            for name in metrics[probe, architecture].conversions:
                by_instruction[fmt, architecture, name] = outcome
    for (probe, architecture), outcome in list(outcomes.items()):
        operation, fmt, _ = probe.split("/")
        if operation not in ("dequantized_dot", "inductor") or outcome.status is not Status.OK or (probe,
                architecture) not in metrics:
            continue
        for name in metrics[probe, architecture].conversions:
            if (decode := by_instruction.get((fmt, architecture, name))) is not None:
                message = f"{name}, with which this build also decodes that format wrongly"
                outcomes[probe, architecture] = decode.model_copy(update={"check": "instruction", "message": message})
