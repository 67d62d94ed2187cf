"""Inspect one implementation on one scheme, in whatever process it is called in (`fpxbench.sweep.isolation` gives it a safe one)."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules import module

import fpxbench.implementation as implementations
from fpxbench.checking import contract, correctness, inputs, machine, reference
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.blackbox.inspection import Experiment, Inspection, InspectRequest
from fpxbench.diagnosis.blackbox.module_adapter import Wrapped, factory_named
from fpxbench.diagnosis.blackbox.probing import Bench
from fpxbench.diagnosis.blackbox.recovered_places import recover_blocks, recover_order
from fpxbench.diagnosis.blackbox.recovered_values import gives_table, recover_scales, recover_table
from fpxbench.diagnosis.decode_faults import decode_faults
from fpxbench.diagnosis.effective_weight import Readout
from fpxbench.diagnosis.encode_faults import encode_faults, scale_choice_faults
from fpxbench.diagnosis.hypotheses import Faults, Predictor, explanations
from fpxbench.diagnosis.products import (
    Diagnosis,
    diagnose_product,
    named,
    nearness,
    off_by_one_factor,
    probe_operands,
    single_weights,
)
from fpxbench.diagnosis.stored import diagnose_quantization, probe_quantization
from fpxbench.implementation import Implementation
from fpxbench.numbers.codec import encode
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict, classify_exception
from fpxbench.workloads import WeightContents, workload_named

MOST_WEIGHTS = 1 << 17
"""Designed experiments are made on a shape of at most so many weights, where the case's own is larger."""
SMALLER = 256, 512
WITHIN_LIMIT = 64, 64, 128
"""M, N and K for an implementation that names a limit (an interpreter), unless a shape was asked for."""


class CannotInspect(ValueError):
    """A mistake in the request, as one sentence."""


def inspect(request: InspectRequest) -> Inspection:
    """Recover the maps that an implementation applies. What it raises becomes the verdict. Raises CannotInspect."""
    implementation, not_loaded = _subject(request)
    inspection = inspect_implementation(implementation, request)
    inspection.not_loaded = not_loaded
    return inspection


def inspect_implementation(implementation: Implementation, request: InspectRequest) -> Inspection:
    """Inspect an instance; `request.subject` is its name."""
    started = time.perf_counter()
    try:
        scheme = scheme_named(request.scheme)
        layer = workload_named(request.workload) if request.workload else None
    except ValueError as error:
        raise CannotInspect(str(error)) from None
    if not scheme.quantized:
        raise CannotInspect(f"{scheme.name} stores weights as they are: there is no code, scale or order to inspect")
    device = request.device or machine.default_device()
    try:
        machine.describe(device)
    except machine.NoDevice as error:
        raise CannotInspect(str(error)) from None
    m, (n, k) = request.m, (layer.n, layer.k) if layer else (request.n, request.k)
    limit = implementation.max_elements(device)
    if not request.given and limit is not None and m * n * k > limit:
        m, n, k = WITHIN_LIMIT
    case = Case(implementation=implementation.name, scheme=request.scheme, workload=request.workload or f"inspect.{n}x{k}", m=m, n=n, k=k,
                activation=request.activation)
    inspection = Inspection(subject=request.subject, scheme=request.scheme, n=n, k=k, m=m, activation=request.activation, device=device,
                            seed=request.seed, verdict=Verdict(status=Status.OK))
    try:
        support = implementation.supports(scheme, device)
        if support.supported:
            _Inspector(implementation, case, device, inspection).run()
        else:
            status = Status.MISSING if support.missing else Status.UNSUPPORTED
            inspection.verdict = Verdict(status=status, summary=support.reason)
    except ContractViolation as violation:
        inspection.verdict = violation.verdict
    except BaseException as error:  # whatever an implementation raises is a experiment about it, SystemExit included
        _print_from_its_own_file(error)
        inspection.verdict = classify_exception(type(error).__name__, str(error), "")
    inspection.seconds = time.perf_counter() - started
    return inspection


def _print_from_its_own_file(error: BaseException) -> None:
    """The traceback of what an implementation raised, from its own file on: how it was called is nothing to its author.

    A ValueError without a frame of the author's is a check of this package's, whose message says everything.
    """
    frame = error.__traceback__
    while frame is not None and _calls_it(Path(frame.tb_frame.f_code.co_filename)):
        frame = frame.tb_next
    if frame is not None or not isinstance(error, ValueError):
        traceback.print_exception(type(error), error, frame or error.__traceback__)


def _calls_it(file: Path) -> bool:
    """Whether a file is of the road to an implementation: this package's, but for its implementations, or `torch.nn.Module`'s call."""
    package = Path(implementations.__file__).parent
    ours = file.is_relative_to(package) and not file.is_relative_to(implementations.shipped_folder())
    return ours or file == Path(module.__file__)


def _subject(request: InspectRequest) -> tuple[Implementation, list[str]]:
    """The implementation, and a message for each file that could not be loaded on the way to it."""
    if ":" in request.subject:
        try:
            return Wrapped(factory_named(request.subject), inputs.ACTIVATION_DTYPES[request.activation]), []
        except ValueError as error:
            raise CannotInspect(str(error)) from None
    try:
        known, failures = implementations.discover(request.impls)
        return implementations.find(request.subject, known, failures)(), [str(failure) for failure in failures]
    except (FileNotFoundError, ValueError) as error:
        raise CannotInspect(str(error)) from None


@dataclass
class _Inspector:
    implementation: Implementation
    case: Case
    device: str
    inspection: Inspection
    probes: list[Readout] = field(default_factory=list)
    """Readouts of weights on which faults differ."""
    table: Tensor | None = None
    """The decode table that was recovered, if it was."""

    def run(self) -> None:
        self.bench = Bench(self.implementation, self.case, self.device, self.inspection.seed)
        operands = self.bench.quantized(self.bench.weight(self.case))
        readout = self.bench.readout(operands)
        weights_right = Predictor(readout).explains(())
        self.inspection.weights_read = readout.seen.numel()
        self.inspection.weights_wrong = 0 if weights_right else int(readout.wrong().sum())
        if readout.original is not None:
            if weights_right:   # which way a quotient beside a midpoint was rounded is told by the weights only
                operands = replace(operands, decoded=readout.seen.float())
            self.probes = self._probe_readouts()
            weights_right &= all(Predictor(one).explains(()) for one in self.probes)
        stored = self._stored(operands)
        _, sums = correctness.check_calls(self.implementation, operands)
        if sums is not None and sums.kind is not None:      # how a call misbehaves, whatever its numbers
            self.inspection.verdict = sums
            return
        if (added := self._added(operands)) is not None:     # to every weight read out as well: the experiments would show that, over and over
            self.inspection.experiments = [added]
            self.inspection.verdict = Verdict(status=Status.WRONG, kind=nearness(readout.correlation()), summary=added.message)
            return
        self.inspection.experiments = experiments = self._experiments()
        if weights_right and stored is None and sums is None and all(experiment.right is not False for experiment in experiments):
            self.inspection.verdict = self._right(readout)
            return
        reading = None
        if not weights_right or any(experiment.right is False for experiment in experiments):
            reading = self._diagnosed(operands, readout)
        elif sums is not None and bool(operands.decoded.isfinite().all()):
            reading = diagnose_product(self.implementation, operands)
        self.inspection.verdict = self._verdict(readout, stored, reading)

    def _added(self, operands: Operands) -> Experiment | None:
        """What comes out for x = 0, if it is a number other than 0."""
        if not bool(operands.decoded.isfinite().all()):
            return None
        x = torch.zeros(self.case.m, self.case.k, dtype=self.bench.dtype, device=self.device)
        y = contract.checked_matmul(self.implementation, x, operands.weight, self.device).double()
        if not bool(y.isfinite().all()) or not bool(y.any()):
            return None
        low, high = float(y.min()), float(y.max())
        much = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        return Experiment(name="zero", right=False, tried=y.numel(),
                       message=f"the output is {much} for x = 0: something is added to the product, a bias or a zero point")

    def _right(self, readout: Readout) -> Verdict:
        doubtful = [experiment for experiment in self.inspection.experiments if experiment.right is None]
        summary = f"reads all {readout.seen.numel():,} weights as the definition says"
        if doubtful:
            summary += f"; {'; '.join(f'{experiment.name}: {experiment.message}' for experiment in doubtful)}"
        return Verdict(status=Status.OK, summary=summary)

    def _stored(self, operands: Operands) -> Diagnosis | None:
        """The fault in what is stored, where that can be seen: of this weight, and of one that holds the values on which encoders
        differ."""
        if not operands.weight.has_codes or type(self.implementation).quantize is Implementation.quantize:
            return None
        small = replace(operands, case=self._smaller())
        return diagnose_quantization(operands.original, operands, probe_quantization(self.implementation, small))

    # Experiments.

    def _smaller(self) -> Case:
        n, k = self.case.n, self.case.k
        if n * k <= MOST_WEIGHTS:
            return self.case
        return self.case.model_copy(update={"n": min(n, SMALLER[0]), "k": min(k, SMALLER[1])})

    def _experiments(self) -> list[Experiment]:
        small = self._smaller()
        bench = self.bench if small == self.case else Bench(self.implementation, small, self.device, self.inspection.seed)
        table, decode = recover_table(bench)
        self.table = table if decode.right is not None else None
        experiments = [decode, recover_scales(bench, table), recover_blocks(bench, table)]
        return experiments if self.implementation.slow(self.device) else [*experiments, recover_order(bench, table)]

    # Names.

    def _diagnosed(self, operands: Operands, readout: Readout) -> Diagnosis:
        probes = self.probes or self._probe_readouts()
        readouts = [readout, *probes]
        if readout.original is None:
            known = list(decode_faults(readout.weight))
        else:       # its layout cannot be seen either, but codes of less than a byte are packed somehow
            fmt, scaling = self.bench.fmt, self.bench.scaling
            as_if = replace(readout.weight, layout="planar" if fmt.bits < 8 else "bytes")
            reached = probes[0].seen[probes[0].seen.isfinite()].abs()
            largest = int(encode(reached.amax(), fmt)) if reached.numel() else 0
            known = [*decode_faults(as_if), *encode_faults(fmt, "bytes", self.bench.k, largest), *scale_choice_faults(fmt, scaling)]
            if all(bool((one.seen - one.original).abs().le(reference.one_hot_tolerance(one.original.double(), one.dtype)).all()) for one in readouts):
                return Diagnosis(Kind.INACCURATE, "the effective weight is the original: nothing was quantized", {})
        numbers_read = any(bool(one.seen.isfinite().any()) for one in readouts)
        fitting = explanations(readouts, known)
        if fitting and not numbers_read:
            return Diagnosis(None, "not one output is finite, which several faults would explain", {})
        agreeing = [faults for faults in fitting if not self._contradicted(faults)]
        if agreeing:
            return named(agreeing, readout)
        if not fitting and (factor := off_by_one_factor(readouts)) is not None:
            return factor
        by_experiments = self._by_experiments()
        if fitting and by_experiments is None:
            return Diagnosis(nearness(readout.correlation()), "cannot tell: what explains every weight read out is at odds with the experiments"
                             f" ({self._facts()})", {})
        return (by_experiments or self._unnamed(readout) or single_weights(readout) or diagnose_product(self.implementation, operands))

    def _unnamed(self, readout: Readout) -> Diagnosis | None:
        facts = self._facts()
        return Diagnosis(nearness(readout.correlation()), f"no known fault fits; {facts}", {}) if facts else None

    def _probe_readouts(self) -> list[Readout]:
        """Readouts of weights on which faults differ, on the smaller shape."""
        small = self._smaller()
        bench = Bench(self.implementation, small, self.device, self.inspection.seed)
        plain = bench.quantized(bench.weight(small))
        readouts = [bench.readout(bench.quantized(bench.weight(small, WeightContents.CODES)))]
        if bench.sets_codes:
            readouts.append(bench.readout(probe_operands(self.implementation, plain)))
        return readouts

    def _contradicted(self, faults: Faults) -> bool:
        """Whether an experiment found a step right that one of `faults` is made in."""
        right = {experiment.name: experiment.right for experiment in self.inspection.experiments}
        steps = {getattr(one, "step", "stored") for one in faults}
        numbers_right = right.get("table") is True and right.get("scales") is True
        # Bits that are exchanged within each code look like another table.
        return bool("codes" in steps and right.get("order") is True and right.get("table") is True
                    or steps & {"places", "blocks"} and right.get("blocks") is True
                    or steps & {"table", "scales"} and numbers_right
                    or self.table is not None and not gives_table(self.bench, faults, self.table))

    def _by_experiments(self) -> Diagnosis | None:
        """Each step's fault by the name that its own experiment gives it, if every wrong one has a name."""
        wrong = [experiment for experiment in self.inspection.experiments if experiment.right is False]
        if not wrong or any(not experiment.kinds for experiment in wrong):
            return None
        kinds = list(dict.fromkeys(kind for experiment in wrong for kind in experiment.kinds))
        what = "; and ".join(experiment.message for experiment in wrong)
        count = {1: "", 2: "two faults at once: ", 3: "three faults at once: "}.get(len(kinds), f"{len(kinds)} faults at once: ")
        return Diagnosis(kinds[0], count + what, {"kinds": sorted(map(str, kinds))})

    def _facts(self) -> str:
        return "; ".join(f"{experiment.name}: {experiment.message}" for experiment in self.inspection.experiments if experiment.right is False)

    def _verdict(self, readout: Readout, stored: Diagnosis | None, reading: Diagnosis | None) -> Verdict:
        found = [one for one in (stored, reading) if one is not None]
        kinds = [one.evidence.get("kinds") or ([one.kind] if one.kind else []) for one in found]
        self.inspection.kinds = [Kind(kind) for kind in dict.fromkeys(kind for each in kinds for kind in each)]
        message = found[0].message if len(found) == 1 else f"stored wrongly: {found[0].message}; and read wrongly: {found[1].message}"
        finite = bool(readout.seen.isfinite().all() or not readout.definition.weight.isfinite().all())
        status = Status.WRONG if finite else Status.NONFINITE
        evidence = {key: value for one in found for key, value in one.evidence.items()}
        return Verdict(status=status, kind=found[0].kind, summary=message, evidence=evidence)
