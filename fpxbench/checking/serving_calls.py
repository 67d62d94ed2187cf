"""Check the calls that serving stacks make: other token counts, batched and strided activations, other shapes, a bias.

Each check has a share of the examination's budget. What did not fit, or was refused, is noted, and does not count as
right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fpxbench.checking import contract, device_wait, inputs, poison
from fpxbench.checking.contract import Output
from fpxbench.checking.correctness import check_configs
from fpxbench.checking.error_statistic import ErrorStatistic
from fpxbench.checking.examination import CLEARLY, Examination, ranges
from fpxbench.checking.operands import Operands
from fpxbench.checking.output_rounding import coarser_outputs
from fpxbench.checking.reference import Reference, compare
from fpxbench.checking.wrong_output import comparison_evidence, judge
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Group, Kind
from fpxbench.records.verdict import Status, Verdict

# All edges of the usual buckets, up and down, common ones first.
TOKEN_COUNTS = (2, 33, 1, 17, 65, 8, 16, 3, 64, 5, 32, 4, 15, 6, 31, 7, 63, 9, 14, 10, 13, 11, 12)
MANY_TOKENS = (129, 257, 96, 128, 513, 127, 256, 512, 255, 511)
_LARGEST_REFERENCE = 1 << 24
"""Limit of multiply-adds (M*N*K) for a reference on a CPU: some 50 ms."""
_LARGEST_REFERENCE_GPU = 1 << 34
_LARGEST_WEIGHT_CPU, _LARGEST_WEIGHT_GPU = 1 << 17, 1 << 25
_MORE_S = 2.0
"""Extra time once a token count is wrong, to find the range of wrong ones."""

_LEAST_CALLS_ALONE = 100

# Odd N, odd K, K shorter than a block, K = 32 mod 64, 128 and 256, a square, a ragged second tile of N.
OTHER_SHAPES = ((48, 288), (64, 64), (17, 33), (5, 7), (33, 96), (80, 160), (24, 544), (16, 100), (200, 64))


def check_tokens(examination: Examination) -> Verdict | None:
    """Check one weight with other token counts, M going up and down; record whether row 0 is the same for all."""
    if examination.new_shapes_cost_too_much("token counts") or _too_large(examination, "token counts"):
        return None
    sweep = _TokenSweep(examination)
    deadline = examination.deadline(0.3)
    for counts in (TOKEN_COUNTS, MANY_TOKENS):
        if not sweep.prepare(max(counts)):
            break
        for m in counts:
            if deadline.passed(_MORE_S if sweep.wrong else 0.0):
                break
            took, _ = examination.ask(f"M = {m}", partial(sweep.ask, m))
            if not took:
                break
    return sweep.verdict()


class _TokenSweep:
    """Products of the first M rows of one activation, for many M."""

    def __init__(self, examination: Examination) -> None:
        self.examination, self.operands = examination, examination.operands
        self.right: list[int] = []
        self.wrong: dict[int, Verdict] = {}
        self.errors: dict[int, float] = {}
        """Token count -> relative error."""
        self.coarser: str | None = None
        self.first_rows: list[Tensor] = []
        self.all_tokens = self.operands.activation("token counts", max(MANY_TOKENS))
        self.x = self.all_tokens[:1]
        self.expected: Reference | None = None

    def prepare(self, most: int) -> bool:
        """Compute the reference of the first `most` tokens; return False, without computing it, if it is too expensive.
        """
        case = self.operands.case
        limit = _LARGEST_REFERENCE if self.operands.device == "cpu" else _LARGEST_REFERENCE_GPU
        if most * case.n * case.k > limit:
            return False
        self.x = self.all_tokens[:most]
        self.expected = self.operands.reference(self.x, self.examination.implementation)
        return True

    def reference(self, m: int) -> Reference:
        rule = self.operands.rule
        if rule is None or not _has_a_scale_of_all_tokens(rule):
            return self.expected.rows(m)
        return self.operands.reference(self.x[:m], self.examination.implementation)     # a scale of all tokens

    def ask(self, m: int) -> None:
        x = self.x[:m].clone()
        again = partial(contract.watched_matmul, self.examination.implementation, x, self.operands.weight,
                        self.operands.device, None)
        pattern = poison.PATTERNS[len(self.right) % 2]
        output, expected = again(pattern), self.reference(m)
        comparison = compare(output.seen, expected)
        self.errors[m] = comparison.relative_error
        self.coarser = coarser_outputs(output.seen) or self.coarser
        if comparison.within:
            self.right.append(m)
            self.first_rows.append(output.seen[0])
            statistic = ErrorStatistic(self.examination.statistic.alike)
            statistic.add(output.seen, expected)
            self.examination.by_tokens[m] = statistic
            if m == len(self.x):
                self.examination.statistic.add(output.seen, expected)
            return
        verdict = judge(again, output, comparison, expected, pattern=pattern)
        if not bool(output.seen.any()):
            verdict.summary = f"every output is 0: {verdict.summary}"
        self.wrong[m] = verdict

    def verdict(self) -> Verdict | None:
        examination, case = self.examination, self.operands.case
        asked = sorted({*self.right, *self.wrong, case.m})
        examination.covered["token counts"] = ranges(asked, most=32)
        examination.properties["tokens_checked"] = asked
        left = set(TOKEN_COUNTS + MANY_TOKENS) - set(asked)
        if left and "token counts" not in examination.not_asked:
            examination.not_asked["token counts"] = f"M = {ranges(left, most=32)}: no time, or too large"
        if not self.wrong:
            if len(self.first_rows) > 1 and (self.operands.rule is None):
                same = all(contract.same_bits(self.first_rows[0], row) for row in self.first_rows[1:])
                examination.properties["batch_invariant"] = same
            return None
        first = self.wrong[min(self.wrong)]
        right = sorted({*self.right, case.m} - set(self.wrong))
        if first.kind is None and self._errors_are_alike():
            of_all = max(self.errors.values())
            return first.model_copy(update={
                "kind": Kind.INACCURATE, "evidence": first.evidence | {"wrong_m": sorted(self.wrong)},
                "summary": f"outputs are outside their bounds for M = {ranges(self.wrong)}, and errors are as large for"
                           f" other M (relative error up to {of_all:.3g}):"
                           f" {self.coarser or 'more tokens meet the bound more often'}; {first.summary}"})
        return first.model_copy(update={
            "kind": first.kind or Kind.M_DEPENDENT,
            "evidence": first.evidence | {"wrong_m": sorted(self.wrong), "right_m": right},
            "summary": f"wrong for M = {ranges(self.wrong)}, right for M = {ranges(right)}: {first.summary}",
        })


    def _errors_are_alike(self) -> bool:
        """Return whether wrong token counts have no larger errors than right ones: then outputs are outside their
        bounds by chance."""
        wrong, right = ([self.errors[m] for m in counts if m in self.errors] for counts in (self.wrong, self.right))
        return bool(right) and max(wrong) <= CLEARLY * max(right)


def _too_large(examination: Examination, name: str) -> bool:
    """Return whether the case is too large for check `name`; if so, note it."""
    case = examination.operands.case
    if case.m == 0:
        examination.not_asked[name] = "no tokens"
    elif case.n * case.k > (_LARGEST_WEIGHT_CPU if examination.device == "cpu" else _LARGEST_WEIGHT_GPU):
        examination.not_asked[name] = "the weight is large; asked of canaries"
    return name in examination.not_asked


def _has_a_scale_of_all_tokens(rule: ActivationRule) -> bool:
    scaling = scheme_named(rule.scheme).scaling
    return scaling.has_tensor_scale or scaling.block_rows is None


def check_layouts(examination: Examination) -> Verdict | None:
    """Check activations of other ranks and memory layouts: batched, strided, transposed, misaligned, empty."""
    operands, implementation = examination.operands, examination.implementation
    if examination.new_shapes_cost_too_much("activation layouts") or _too_large(examination, "activation layouts"):
        return None
    deadline = examination.deadline(0.2)
    covered: list[str] = []
    for name, x in activation_layouts(operands):
        if deadline.passed() and covered:
            examination.not_asked.setdefault("activation layouts", f"{name} and what follows: no time")
            break
        flat = x.reshape(-1, x.shape[-1]).clone(memory_format=torch.contiguous_format)      # clone() keeps a transpose
        again = partial(_flat_output, implementation, x, operands)
        output: list[Output] = []
        took, _ = examination.ask(name, lambda again=again, output=output: output.append(again(poison.NAN)))
        if not took:
            continue
        covered.append(name)
        expected = operands.reference(flat, implementation)
        comparison = compare(output[0].seen, expected)
        if comparison.within or not _right_if_contiguous(examination, flat, expected):
            continue    # not the layout: other checks find the cause
        verdict = judge(again, output[0], comparison, expected, pattern=poison.NAN)
        if verdict.kind is Kind.NOT_REPEATABLE:
            return verdict
        return Verdict(
            status=verdict.status, kind=Kind.ACTIVATION_LAYOUT, evidence=verdict.evidence | {"activation": name},
            summary=f"wrong for {name} (shape {list(x.shape)}, strides {list(x.stride())}), right for the same numbers"
                    f" as a contiguous [{len(flat)}, {x.shape[-1]}]: {verdict.summary}")
    if covered:
        examination.covered["activation layouts"] = ", ".join(covered)
    return None


def _right_if_contiguous(examination: Examination, flat: Tensor, expected: Reference) -> bool:
    operands = examination.operands
    y = contract.checked_matmul(examination.implementation, flat, operands.weight, operands.device)
    return compare(y, expected).within


def _flat_output(implementation, x: Tensor, operands: Operands, pattern: int) -> Output:
    output = contract.watched_matmul(implementation, x, operands.weight, operands.device, None, pattern)
    n = operands.case.n
    return Output(output.seen.reshape(-1, n), output.returned.reshape(-1, n))


def activation_layouts(operands: Operands):
    """Yield name and activation. Memory between their elements is NaN, since it must not be read."""
    case = operands.case
    m, k = max(2, min(case.m, 16)), case.k

    def among_nan(shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, torch.nan, dtype=inputs.ACTIVATION_DTYPES[case.activation], device=operands.device)

    batched = operands.activation("batched", 3 * m).reshape(3, m, k)
    yield "[B, M, K]", batched
    wide = among_nan((m, k + 24))
    wide[:, 8:k + 8] = operands.activation("strided", m)
    yield "a slice of wider rows", wide[:, 8:k + 8]
    yield "a transposed [K, M]", operands.activation("transposed", m).T.contiguous().T
    shifted = among_nan((m * k + 9,))
    shifted[1:m * k + 1] = operands.activation("misaligned", m).reshape(-1)
    yield "an offset of 2 bytes", shifted[1:m * k + 1].reshape(m, k)
    turned = operands.activation("turned", 2 * m).reshape(m, 2, k).transpose(0, 1)
    yield "a transposed [B, M, K]", turned
    spaced = among_nan((2 * m, k))
    spaced[::2] = operands.activation("spaced", m)
    yield "every second row", spaced[::2]
    yield "no tokens, [0, K]", among_nan((0, k))


def check_shapes(examination: Examination, prepare: Callable[[int, int, object], Operands]) -> Verdict | None:
    """Check weights of other N and K in the same instance, then the case's own again.

    prepare : (N, K, purpose) -> operands of another weight, quantized
    """
    own = examination.operands
    if examination.new_shapes_cost_too_much("other shapes") or _too_large(examination, "other shapes"):
        return None
    deadline = examination.deadline(0.3)
    covered: list[str] = []
    kept: list[Operands] = []       # kept alive, so that addresses are not reused
    for number, (n, k) in enumerate(OTHER_SHAPES):
        if deadline.passed() and covered:
            examination.not_asked["other shapes"] = f"[{n}, {k}] and what follows: no time"
            break
        took, verdict = examination.ask(f"a weight [{n}, {k}]",
                                        partial(_check_shape, examination, prepare, n, k, number, kept))
        if verdict is not None:
            return verdict
        covered += [f"[{n}, {k}]"] * took
    if covered:
        examination.covered["other shapes"] = ", ".join(covered)
    another = prepare(own.case.n, own.case.k, "another weight")
    kept.append(another)
    for operands, purpose in ((another, "another weight"), (own, "back to this weight")):
        verdict = _checked_once(examination, operands, purpose)
        if verdict is not None and operands is another and verdict.kind is None:
            named = examination.diagnose(verdict, operands)     # codes that the case's weight lacks may be misread
            if named.kind is not None and named.kind.group not in (Group.RESULT, Group.CALL):
                return named
        if verdict is not None:
            return verdict.model_copy(update={
                "kind": verdict.kind or Kind.WEIGHT_DEPENDENT,
                "summary": f"wrong for {purpose}, where one process multiplies by several: {verdict.summary}"})
    examination.covered["several weights"] = f"{len(kept) + 1} in one process"
    return None


def _check_shape(examination: Examination, prepare: Callable[[int, int, object], Operands], n: int, k: int, number: int,
                 kept: list[Operands]) -> Verdict | None:
    operands = prepare(n, k, ("other shapes", number))
    kept.append(operands)
    verdict = (_checked_once(examination, operands, "other shapes")
               or check_configs(examination.implementation, operands))
    if verdict is None:
        return None
    if verdict.kind is None:
        verdict = examination.diagnose(verdict, operands)
    own = examination.operands.case
    named = verdict.kind is not None and verdict.kind.group is not Group.RESULT
    kind = verdict.kind if named else Kind.SHAPE_DEPENDENT
    return verdict.model_copy(update={
        "kind": kind, "evidence": verdict.evidence | {"n": n, "k": k},
        "summary": f"wrong for a weight [{n}, {k}], right for [{own.n}, {own.k}]: {verdict.summary}"})


def _checked_once(examination: Examination, operands: Operands, purpose: str) -> Verdict | None:
    x = operands.activation(purpose)
    again = partial(contract.watched_matmul, examination.implementation, x, operands.weight, operands.device, None)
    output, expected = again(poison.NAN), operands.reference(x, examination.implementation)
    comparison = compare(output.seen, expected)
    if comparison.within:
        return None
    return judge(again, output, comparison, expected, pattern=poison.NAN)


def _with_bias(implementation: Any, bias: Tensor, x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Call a `matmul` with a bias, which the base class does not declare."""
    return implementation.matmul(x, weight, bias)


def check_bias(examination: Examination) -> Verdict | None:
    """Check the product with a bias, if the implementation supports one."""
    implementation, operands = examination.implementation, examination.operands
    if not implementation.supports_bias or operands.case.m == 0:
        examination.not_asked["bias"] = "takes none" if operands.case.m else "no tokens"
        return None
    x = operands.activation("bias")
    rng = inputs.generator(operands.seed, "bias", operands.case.n, device=operands.device)
    bias = torch.randn(operands.case.n, generator=rng, device=operands.device).to(x.dtype) * operands.case.k**0.5
    again = partial(contract.watched_matmul, implementation, x, operands.weight, operands.device,
                    partial(_with_bias, implementation, bias))
    output, expected = again(poison.NAN), operands.reference(x, implementation, bias)
    comparison = compare(output.seen, expected)
    examination.covered["bias"] = "one, added to each row"
    if comparison.within:
        return None
    verdict = judge(again, output, comparison, expected, pattern=poison.NAN)
    return verdict.model_copy(update={"kind": verdict.kind or Kind.BIAS_WRONG,
                                      "summary": f"right without a bias, wrong with one: {verdict.summary}"})


def check_repeats(examination: Examination, most: int = 1000) -> Verdict | None:
    """Repeat one call as often as the budget allows, on a GPU beside other work; outputs whose bits differ are compared
    with the reference."""
    implementation, operands = examination.implementation, examination.operands
    if operands.case.m == 0 or implementation.slow(operands.device):
        examination.not_asked["repeats"] = "an interpreter takes too long" if operands.case.m else "no tokens"
        return None
    x = operands.activation("repeats")
    first: Tensor | None = None
    deadline, count, differing, wrong = examination.deadline(0.2), 0, 0, []
    busy = _Busy(operands.device)
    with contract.weight_unchanged(operands.weight):
        while count < 2 or (count < most and not deadline.passed()):
            with busy:
                y = contract.call(implementation.matmul, x, operands.weight, operands.device,
                                  poison.PATTERNS[count % 2]).seen
            first = y if first is None else first
            if not contract.same_bits(first, y):
                differing += count > 0
                comparison = compare(y, operands.reference(x, implementation))
                if not comparison.within:
                    wrong.append(comparison)
            count += 1
    examination.covered["repeats"] = f"{count} calls with the same operands"
    examination.properties |= {"repeats": count, "repeatable": differing == 0}
    if not wrong:
        return None
    return Verdict(status=Status.WRONG if wrong[0].finite else Status.NONFINITE, kind=Kind.NOT_REPEATABLE,
                   evidence=comparison_evidence(wrong[0]) | {"repeats": count, "repeats_wrong": len(wrong)},
                   summary=f"wrong in {len(wrong)} of {count} calls with the same operands: {wrong[0].message()}")


class _Busy:
    """A context that keeps a GPU busy on another stream; does nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self.stream = torch.cuda.Stream() if device != "cpu" else None
        self.matrix = torch.randn(1024, 1024, device=device) if device != "cpu" else None

    def __enter__(self) -> None:
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                torch.mm(self.matrix, self.matrix)

    def __exit__(self, *error: object) -> None:
        pass


def check_streams(examination: Examination, prepare: Callable[[int, int, object], Operands]) -> Verdict | None:
    """Check concurrent calls on two CUDA streams, each with its own weight and activation."""
    implementation, own = examination.implementation, examination.operands
    if own.device == "cpu":
        examination.not_asked["streams"] = "a CPU has none"
        return None
    if implementation.slow(own.device):
        examination.not_asked["streams"] = "an interpreter takes too long"
        return None
    if _too_large(examination, "streams"):
        return None
    pairs = [own, prepare(own.case.n, own.case.k, "second stream")]
    xs = [each.activation(("stream", number)) for number, each in enumerate(pairs)]
    expected = [each.reference(x, implementation) for each, x in zip(pairs, xs, strict=True)]
    streams = [torch.cuda.Stream() for _ in pairs]
    device_wait.synchronize()
    deadline, rounds, queueing_s = examination.deadline(0.1), 0, 0.0
    while rounds < 3 or (not deadline.passed() and rounds < 100):
        outputs = []
        for stream in streams:      # both wait until all calls are queued, since short kernels would not overlap
            with torch.cuda.stream(stream):
                device_wait.hold_stream(2 * queueing_s)
        began = perf_counter()
        for _ in range(4):      # several in flight on each
            for each, x, stream in zip(pairs, xs, streams, strict=True):
                with torch.cuda.stream(stream), torch.no_grad():
                    outputs.append(implementation.matmul(x, each.weight))
        queueing_s = perf_counter() - began
        device_wait.synchronize()
        rounds += 1
        for number, y in enumerate(outputs):
            comparison = compare(y, expected[number % 2])
            if not comparison.within:
                kind, when = _alone(implementation, pairs[number % 2], xs[number % 2], expected[number % 2], 8 * rounds)
                return Verdict(status=Status.WRONG if comparison.finite else Status.NONFINITE, kind=kind,
                               evidence=comparison_evidence(comparison) | {"rounds": rounds},
                               summary=f"wrong {when}: {comparison.message()}")
    examination.covered["streams"] = f"two at once, {8 * rounds} calls"
    return None


def _alone(implementation: Any, operands: Operands, x: Tensor, expected: Reference, calls: int) -> tuple[Kind, str]:
    """Return the kind and a clause for a product that is wrong beside another stream, from synchronized calls."""
    calls, wrong, frozen = max(calls, _LEAST_CALLS_ALONE), 0, False
    for _ in range(calls):
        y = implementation.matmul(x, operands.weight)
        device_wait.synchronize()
        wrong += not compare(y, expected).within
    if wrong == calls:
        x.neg_()
        frozen = contract.same_bits(y, implementation.matmul(x, operands.weight))
        x.neg_()
    if frozen:
        return Kind.FROZEN_INPUT, "with another weight: the product is of an activation that its buffer held before"
    if wrong:
        return Kind.NOT_REPEATABLE, f"in {wrong} of {calls} calls one after the other"
    return Kind.STREAM_UNSAFE, "when two CUDA streams multiply at once, and right one after the other"


def prepared_like(operands: Operands, n: int, k: int, purpose: object) -> tuple[Operands, Tensor]:
    """Return the operands of another weight [N, K] before quantization, and that weight."""
    case = operands.case.model_copy(update={"n": n, "k": k, "workload": "other"})
    rng = inputs.generator(operands.seed, "weight", purpose, n, k, device=operands.device)
    original = torch.randn(n, k, generator=rng, device=operands.device)
    return replace(operands, case=case, original=original), original
