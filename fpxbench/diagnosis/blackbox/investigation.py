"""Run the experiments on one implementation and scheme, and derive the verdict from them."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fpxbench.checking import activation_rules, contract, correctness, inputs, reference, serving_calls
from fpxbench.checking.error_statistic import ErrorStatistic, likeness_of_rows
from fpxbench.checking.examination import Examination, is_refusal, ranges
from fpxbench.checking.nonfinite_rows import check_nonfinite_rows
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.activation_explained import explain_activation
from fpxbench.diagnosis.blackbox.inspection import Inspection
from fpxbench.diagnosis.decode_fault import DecodeFault
from fpxbench.diagnosis.decode_faults import decode_faults, only_scales_finite_codes
from fpxbench.diagnosis.diagnosis import Diagnosis, nearness
from fpxbench.diagnosis.effective_weight import Readout
from fpxbench.diagnosis.encode_faults import EncodeFault, encode_faults, scale_choice_faults
from fpxbench.diagnosis.estimated_faults import estimated_faults
from fpxbench.diagnosis.experiment import Experiment
from fpxbench.diagnosis.hypotheses import Predictor
from fpxbench.diagnosis.naming import name_reading, single_weights
from fpxbench.diagnosis.probe_weight import probe_operands
from fpxbench.diagnosis.products import diagnose_product, on_a_larger_weight
from fpxbench.diagnosis.recovery.bench import Bench, small_case
from fpxbench.diagnosis.recovery.maps import RecoveredMaps
from fpxbench.diagnosis.scale_rules import find_scale_rule, follows_rule, holds_on_powers_of_two, other_rules
from fpxbench.diagnosis.stored import diagnose_quantization, probe_quantization
from fpxbench.implementation import Implementation
from fpxbench.numbers.tensor_codec import encode
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict
from fpxbench.workloads import WeightContents

CALLS_BUDGET_S = 5.0
"""Seconds for calls with other token counts, layouts and shapes."""
MODEL_TOKENS = 12
"""Tokens of a model-like activation: two of each kind of row."""
OWN_SQNR_SLACK_DB = 1.0


@dataclass(frozen=True)
class Given:
    """The user's own values to inspect with: a weight fp32 [N, K] instead of N(0, 1), activation rows fp32 [R, K]."""

    weight: Tensor | None = None
    activations: Tensor | None = None


@dataclass
class Investigation:
    """One inspection: `run` fills in its experiments and its verdict."""

    implementation: Implementation
    case: Case
    device: str
    inspection: Inspection
    given: Given
    probes: list[Readout] = field(default_factory=list)
    """Readouts of weights on which faults differ."""

    def run(self) -> None:
        self._find_rule()
        self.bench = Bench(self.implementation, self.case, self.device, self.inspection.seed)
        weight = self.bench.weight(self.case) if self.given.weight is None else self.given.weight.to(self.device)
        if getattr(self.implementation, "casts_weight", False):
            weight = weight.to(self.bench.dtype).float()
        operands = self.bench.quantized(weight)
        if self.given.activations is not None:
            operands.activations = self.given.activations.to(self.device)
        self.inspection.verdict = self._inspected(operands)
        if self.inspection.undeclared_rule:
            rule, found = self.inspection.undeclared_rule, self.inspection.verdict.summary
            summary = f"{rule}; {found}" if self.inspection.right else f"{found}; besides, {rule}"
            self.inspection.verdict = self.inspection.verdict.model_copy(update={"summary": summary})

    def _find_rule(self) -> None:
        """Find an undeclared, valid rule by which scales are chosen, and judge by it."""
        implementation = self.implementation
        if implementation.scale_rule is not None or type(implementation).quantize is Implementation.quantize:
            return
        small = small_case(self.case)
        bench = Bench(implementation, small, self.device, self.inspection.seed)
        operands = bench.quantized(bench.weight(small))
        if operands.weight.has_codes:
            if diagnose_quantization(operands.original, operands) is None:
                return
            rule = find_scale_rule(operands.original, operands.weight)
            if rule is not None and holds_on_powers_of_two(implementation, operands.original, rule, bench.scheme):
                implementation.scale_rule, self.inspection.undeclared_rule = rule.name, rule.message()
            return
        if Predictor(bench.readout(operands)).explains(()):
            return
        for rule in other_rules(bench.scheme):      # the one that explains the readout was used
            implementation.scale_rule = rule.name
            bench = Bench(implementation, small, self.device, self.inspection.seed)
            if Predictor(bench.readout(bench.quantized(bench.weight(small)))).explains(()):
                self.inspection.undeclared_rule = rule.message()
                return
        implementation.scale_rule = None

    def _inspected(self, operands: Operands) -> Verdict:
        activation = activation_rules.find_rule(self.implementation, operands, explain_activation)
        if activation is not None:
            return activation
        readout = self.bench.readout(operands)
        weights_right = Predictor(readout).explains(())
        self.inspection.weights_read = readout.seen.numel()
        self.inspection.weights_wrong = 0 if weights_right else int(readout.wrong().sum())
        if readout.original is not None and weights_right:
            # only the weights show which way a quotient beside a midpoint was rounded
            operands = replace(operands, decoded=readout.seen.float())
        if not self.implementation.slow(self.device):
            self.probes = self._probe_readouts()
            weights_right &= all(Predictor(one).explains(()) for one in self.probes)
        stored = self._stored(operands)
        _, sums = correctness.check_calls(self.implementation, operands)
        if sums is not None and sums.kind in (None, Kind.NOT_REPEATABLE):
            sums = (activation_rules.stale_scale(self.implementation, operands, sums.evidence["call"])
                    or activation_rules.undeclared_rule(self.implementation, operands) or sums)
        if sums is not None and sums.kind is not None:      # how a call misbehaves, whatever its numbers
            return sums
        # every weight read out includes the addend, and each experiment would report it
        if (added := self._added(operands)) is not None:
            self.inspection.experiments = [added]
            return Verdict(status=Status.WRONG, kind=nearness(readout.correlation()), summary=added.message)
        small = small_case(self.case)
        self.maps = RecoveredMaps(
            self.bench if small == self.case else Bench(self.implementation, small, self.device, self.inspection.seed)
        )
        self.inspection.experiments = experiments = self.maps.experiments
        wrong = any(experiment.right is False for experiment in experiments)
        if weights_right and stored is None and sums is None and not wrong:
            return self._square(small) or self._calls(operands) or self._values(operands) or self._right(readout)
        if not weights_right and (of_tokens := self._some_tokens()) is not None:
            return of_tokens
        reading = None
        if not weights_right or wrong:
            reading = self._remembered(readout) or self._diagnosed(operands, readout)
        elif sums is not None and bool(operands.decoded.isfinite().all()):
            reading = diagnose_product(self.implementation, operands)
        if stored is None and (own := self._as_its_own(operands, readout, reading)) is not None:
            return own
        return self._verdict(readout, stored, reading)

    def _as_its_own(self, operands: Operands, readout: Readout, reading: Diagnosis | None) -> Verdict | None:
        """Return the verdict "right" if no fault is known, weights match the implementation's own `dequantize`, and its
        SQNR is near the scheme's; else None."""
        if operands.weight.has_codes or type(self.implementation).dequantize is Implementation.dequantize \
                or (reading is not None and reading.kind not in (None, Kind.INACCURATE, Kind.GIBBERISH)):
            return None
        own = self.implementation.dequantize(operands.weight).double()
        tolerance = reference.one_hot_tolerance(own, self.bench.dtype) + reference.summed_weight_slack(own)
        of_scheme = reference.sqnr_db(operands.original, operands.decoded)
        reached = reference.sqnr_db(operands.original, own)
        if not bool(((readout.seen - own).abs() <= tolerance).all()) or of_scheme is None \
                or (reached is not None and reached < of_scheme - OWN_SQNR_SLACK_DB):
            return None
        self.inspection.experiments, self.inspection.weights_wrong = [], 0
        return Verdict(
            status=Status.OK,
            summary=f"reads all {readout.seen.numel():,} weights as its own `dequantize` says. They are stored in a"
                    f" layout of its own, and by no rule of {self.case.scheme} (rotated, say;"
                    f" {of_scheme if reached is None else reached:.2f} dB, the scheme reaches {of_scheme:.2f} dB): what"
                    " single codes and scales become was not asked")

    def _some_tokens(self) -> Verdict | None:
        """Return the verdict if codes are read as defined with some token counts and wrongly with others; else None."""
        small = small_case(self.case)
        if self.implementation.slow(self.device):
            return None
        bench = Bench(self.implementation, small, self.device, self.inspection.seed)
        operands = bench.quantized(bench.weight(small, WeightContents.CODES))
        readout = bench.readout(operands)
        columns = readout.columns[:: max(1, small.k // 8)]
        right: list[int] = []
        wrong: list[int] = []
        right_again: list[int] = []

        def reads_right(m: int) -> bool:
            near = True
            for part in columns.split(m):
                x = inputs.one_hot(part.tolist(), m, small.k, bench.dtype, self.device)
                y = contract.checked_matmul(self.implementation, x, operands.weight, self.device).double()
                wanted = readout.definition.weight[:, part[torch.arange(m, device=part.device) % len(part)]].T
                exact = bench.near(y, wanted) | ~wanted.isfinite() | readout.definition.tainted[None, :]
                near &= bool(exact.all())
            return near

        for m in sorted({small.m, *serving_calls.TOKEN_COUNTS, *serving_calls.MANY_TOKENS}):
            try:
                near = reads_right(m)
                if not near and reads_right(m):
                    right_again.append(m)
            except Exception as error:      # this M is unsupported
                if not is_refusal(error):
                    raise
                traceback.print_exc()
                continue
            (right if near else wrong).append(m)
        if wrong and wrong == right_again:
            self.inspection.kinds = [Kind.NOT_REPEATABLE]
            return Verdict(status=Status.WRONG, kind=Kind.NOT_REPEATABLE, evidence={"wrong_at_first_m": wrong},
                           summary=f"the first calls with M = {ranges(wrong)} read weights wrongly, and are right when"
                                   " made again: what a first call does (tuning, say) is left in its output")
        if not right or not wrong:
            return None
        self.inspection.kinds = [Kind.M_DEPENDENT]
        return Verdict(status=Status.WRONG, kind=Kind.M_DEPENDENT, evidence={"wrong_m": wrong, "right_m": right},
                       summary=f"wrong for M = {ranges(wrong)}, right for M = {ranges(right)}: weights are read wrongly"
                               " by one-hot activations of the former")

    def _values(self, operands: Operands) -> Verdict | None:
        """Return the verdict on model-like weights and activations, and on NaN in one token; None if both are right."""
        if self.implementation.slow(self.device):
            return None
        case = small_case(self.case).model_copy(update={"workload": "canary.values", "m": MODEL_TOKENS})
        bench = Bench(self.implementation, case, self.device, self.inspection.seed)
        made = replace(bench.quantized(bench.weight(case)), rule=operands.rule)
        if not made.weight.has_codes:
            made = replace(made, decoded=bench.readout(made).seen.float())
        if not bool(made.decoded.isfinite().all()):
            return None
        _, verdict = correctness.check_calls(self.implementation, made)
        if verdict is not None and verdict.kind is None:
            diagnosis = diagnose_product(self.implementation, made)
            verdict = verdict.model_copy(update={
                "kind": diagnosis.kind, "evidence": verdict.evidence | diagnosis.evidence,
                "summary": f"wrong for weights and activations as models have them: {diagnosis.message}"})
        verdict = verdict or self._nonfinite_rows(made)
        if verdict is not None and verdict.kind is not None:
            self.inspection.kinds = [verdict.kind]
        return verdict

    def _nonfinite_rows(self, operands: Operands) -> Verdict | None:
        """Return the verdict on NaN of one token in the output of another; None if it does not spread or is refused."""
        try:
            return check_nonfinite_rows(self.implementation, operands)
        except Exception as error:
            if not is_refusal(error):
                raise
            traceback.print_exc()
            return None

    def _remembered(self, readout: Readout) -> Diagnosis | None:
        """Return the fault of products that remain those of the first weight, whatever the weight; else None."""
        same = [probe for probe in self.probes if probe.seen.shape == readout.seen.shape and probe.original is None]
        if not same or readout.original is not None or not bool(torch.isfinite(readout.seen).all()):
            return None
        if not all(torch.equal(probe.seen, readout.seen) for probe in same):
            return None
        return Diagnosis(Kind.RESULT_REMEMBERED, "the products of another weight are those of the first one: results "
                         "are remembered by their activation, or the first weight is kept", {})

    def _square(self, small: Case) -> Verdict | None:
        """Return the verdict on a square weight, whose rows and columns can be confused; None if it is right."""
        if small.n == small.k or self.implementation.slow(self.device):
            return None
        side = min(small.n, small.k)
        try:
            square = small.model_copy(update={"n": side, "k": side})
            bench = Bench(self.implementation, square, self.device, self.inspection.seed)
            readout = bench.readout(bench.quantized(bench.weight(bench.case)))
        except Exception as error:      # this shape is unsupported
            if not is_refusal(error):
                raise
            traceback.print_exc()
            return None
        if Predictor(readout).explains(()):
            return None
        maps = RecoveredMaps(bench)
        self.inspection.experiments += [
            one.model_copy(update={"message": f"of a square weight [{side}, {side}]: {one.message}"})
            for one in maps.wrong]
        message = maps.messages() if maps.wrong else "its weights are read wrongly"
        found = maps.diagnosis() or Diagnosis(nearness(readout.correlation()), message)
        self.inspection.kinds = [found.kind] if found.kind else []
        return Verdict(status=Status.WRONG, kind=found.kind, evidence=found.evidence,
                       summary=f"wrong for a square weight [{side}, {side}] only: {found.message}")

    def _calls(self, operands: Operands) -> Verdict | None:
        """Return the verdict on calls with other token counts, memory layouts and shapes; None if all are right."""
        small = small_case(self.case)
        if small != self.case:
            bench = Bench(self.implementation, small, self.device, self.inspection.seed)
            operands = replace(bench.quantized(bench.weight(small)), rule=operands.rule)
            if not operands.weight.has_codes:
                operands = replace(operands, decoded=bench.readout(operands).seen.float())
        examination = Examination(self.implementation, operands, CALLS_BUDGET_S, diagnose=self._named,
                                  statistic=ErrorStatistic(likeness_of_rows(operands.decoded)))

        def another(n: int, k: int, purpose: object) -> Operands:
            like, original = serving_calls.prepared_like(operands, n, k, purpose)
            bench = Bench(self.implementation, like.case, self.device, like.seed)
            if getattr(self.implementation, "casts_weight", False):
                original = original.to(bench.dtype).float()
            made = replace(bench.quantized(original), rule=operands.rule)
            # Only the weights show which way a quotient beside a midpoint was rounded.
            if not made.weight.has_codes:
                readout = bench.readout(made)
                if Predictor(readout).explains(()):
                    made = replace(made, decoded=readout.seen.float())
            return made

        found = (serving_calls.check_tokens(examination) or serving_calls.check_layouts(examination)
                 or serving_calls.check_shapes(examination, another) or serving_calls.check_bias(examination)
                 or examination.statistic_verdict())
        if found is not None and found.kind is not None:
            self.inspection.kinds = [found.kind]
        return found

    def _named(self, verdict: Verdict, operands: Operands) -> Verdict:
        """Return the verdict on a product of other operands, with the fault's kind if it has one."""
        if verdict.kind is not None or not operands.weight.has_codes:
            return verdict
        found = diagnose_product(self.implementation, operands)
        return verdict.model_copy(update={"kind": found.kind, "summary": found.message,
                                          "evidence": verdict.evidence | found.evidence})

    def _added(self, operands: Operands) -> Experiment | None:
        """Return the experiment with x = 0 if its output is a number other than 0; else None."""
        if not bool(operands.decoded.isfinite().all()):
            return None
        x = torch.zeros(self.case.m, self.case.k, dtype=self.bench.dtype, device=self.device)
        y = contract.checked_matmul(self.implementation, x, operands.weight, self.device).double()
        if not bool(y.isfinite().all()) or not bool(y.any()):
            return None
        low, high = float(y.min()), float(y.max())
        much = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        return Experiment(
            name="zero",
            right=False,
            tried=y.numel(),
            message=f"the output is {much} for x = 0: something is added to the product, a bias or a zero point",
        )

    def _right(self, readout: Readout) -> Verdict:
        doubtful = [experiment for experiment in self.inspection.experiments if experiment.right is None]
        summary = f"reads all {readout.seen.numel():,} weights as the definition says"
        if doubtful:
            summary += f"; {'; '.join(f'{experiment.name}: {experiment.message}' for experiment in doubtful)}"
        return Verdict(status=Status.OK, summary=summary)

    def _stored(self, operands: Operands) -> Diagnosis | None:
        """Return the fault in the stored codes and scales, if they can be read, of this weight and of one with the
        values on which encoders differ; else None."""
        if not operands.weight.has_codes or type(self.implementation).quantize is Implementation.quantize:
            return None
        judged = replace(operands, weight=replace(operands.weight, scheme=self.bench.judged))
        rule = self.implementation.scale_rule
        if rule is None or not follows_rule(operands.original, operands.weight, rule):
            small = replace(judged, case=small_case(self.case))
            found = diagnose_quantization(operands.original, judged, probe_quantization(self.implementation, small))
            if found is not None:
                return found
        # Zeros and outliers, which N(0, 1) lacks.
        bench = Bench(self.implementation, small_case(self.case), self.device, self.inspection.seed)
        values = bench.quantized(bench.weight(bench.case, WeightContents.VALUES))
        if rule is not None and follows_rule(values.original, values.weight, rule):
            return None
        judged = replace(values, weight=replace(values.weight, scheme=bench.judged))
        found = diagnose_quantization(values.original, judged)
        if found is not None and rule is None:      # a rule without effect on N(0, 1), such as a floor under scales
            other = find_scale_rule(values.original, values.weight)
            if other is not None:
                self.inspection.undeclared_rule = other.message()
                return None
        return found

    # Experiments and names.

    def _diagnosed(self, operands: Operands, readout: Readout) -> Diagnosis:
        probes = self.probes or self._probe_readouts()
        readouts = [readout, *probes]
        if readout.original is None:
            known: list[DecodeFault | EncodeFault] = [*decode_faults(readout.weight)]
        else:       # its layout is unknown too, but codes narrower than a byte must be packed somehow
            fmt, scaling = self.bench.fmt, self.bench.scaling
            as_if = replace(readout.weight, layout="planar" if fmt.bits < 8 else "bytes")
            reached = probes[0].seen[probes[0].seen.isfinite()].abs()
            largest = int(encode(reached.amax(), fmt)) if reached.numel() else 0
            known = [
                *(fault for fault in decode_faults(as_if) if not only_scales_finite_codes(fault, fmt)),
                *encode_faults(fmt, "bytes", self.bench.k, largest),
                *scale_choice_faults(fmt, scaling),
                *estimated_faults(readouts),
            ]
            if all(bool(((one.seen - one.original).abs()
                         <= reference.one_hot_tolerance(one.original.double(), one.dtype)).all()) for one in readouts):
                return Diagnosis(Kind.INACCURATE, "the effective weight is the original: nothing was quantized", {})
        named = name_reading(readouts, known, self.maps)
        if named is not None and "fitting" in named.evidence:
            named = on_a_larger_weight(named, self.implementation, operands) or named
        if named is not None:
            return named
        if self.maps.wrong:
            return Diagnosis(nearness(readout.correlation()), f"no known fault fits; {self.maps.messages()}", {})
        return single_weights(readout) or diagnose_product(self.implementation, operands)

    def _probe_readouts(self) -> list[Readout]:
        """Return readouts of probe weights, which tell faults apart, on the smaller shape."""
        small = small_case(self.case)
        bench = Bench(self.implementation, small, self.device, self.inspection.seed)
        plain = bench.quantized(bench.weight(small))
        readouts = [bench.readout(bench.quantized(bench.weight(small, WeightContents.CODES)))]
        if bench.sets_codes:
            readouts.append(bench.readout(probe_operands(self.implementation, plain)))
        return readouts

    def _verdict(self, readout: Readout, stored: Diagnosis | None, reading: Diagnosis | None) -> Verdict:
        found = [one for one in (stored, reading) if one is not None]
        kinds = [one.evidence.get("kinds") or ([one.kind] if one.kind else []) for one in found]
        self.inspection.kinds = [Kind(kind) for kind in dict.fromkeys(kind for each in kinds for kind in each)]
        message = (
            found[0].message
            if len(found) == 1
            else f"stored wrongly: {found[0].message}; and read wrongly: {found[1].message}"
        )
        finite = bool(readout.seen.isfinite().all() or not readout.definition.weight.isfinite().all())
        status = Status.WRONG if finite else Status.NONFINITE
        evidence = {key: value for one in found for key, value in one.evidence.items()}
        return Verdict(status=status, kind=found[0].kind, summary=message, evidence=evidence)
