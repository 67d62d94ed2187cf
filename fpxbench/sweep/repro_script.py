"""Write a script that reproduces a record's case in one plain process, for a bug report or a debugger."""

from __future__ import annotations

from fpxbench.records.record import Record
from fpxbench.records.verdict import Status
from fpxbench.workloads import FROM_CHECKPOINT, is_from_file

_HEAD = '''\
# {case_id}
# was found {headline} with torch {torch}, Triton {triton}, on {device} ({arch}), {started_at}:
#   {summary}
#
# Needs fpxbench, and that torch. For implementations that are not fpxbench's own: python THIS_FILE THEIR_FILE.py
# Exits with 0 if the result is right and 1 if it is wrong, or crashes.
import sys

import torch

from fpxbench.checking import activation_rules, correctness, inputs
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import compare
from fpxbench.implementation import discover, find
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.verdict import Status
from fpxbench.sweep import trial
from fpxbench.sweep.messages import TrialRequest

case = Case(
    {fields},
)
device, seed = {kind!r}, {seed}{seed_note}

known, _ = discover(sys.argv[1:])
implementation = find(case.implementation, known)()
scheme = scheme_named(case.scheme)
print(f"{{case.id}} on {{device}}, torch {{torch.__version__}}")

support = implementation.support(scheme, device)
if not support.supported:
    sys.exit(f"{{case.implementation}} refuses {{case.scheme}} on {{device}}: {{support.reason}}")
'''

_ONE_WEIGHT = '''
weight = inputs.make_weight(case, seed, device)              # fp32 [N, K]
stored = implementation.quantize(weight, scheme)
decoded = implementation.dequantize(stored).float()         # what the stored codes and scales stand for
operands = Operands(case, device, seed, weight, stored, decoded)
activation_rules.find_rule(implementation, operands, trial.explain_in_a_sweep)     # how it rounds x, if it does
product = implementation
'''

_EXPERTS = '''
from fpxbench.checking.expert_operands import GroupedProduct

operands = trial.prepare_experts(implementation, case, device, seed)
stored = operands.weight                                    # of all experts
# x [T, K] -> implementation.grouped_matmul(x, stored, operands.offsets), with the offsets drawn with x
product = GroupedProduct(implementation, operands)
'''

_CALLS = '''
for number in range(correctness.CALLS):
    x = operands.activation(number)                         # [M, K], fresh for each call
    y = product.matmul(x, stored)                           # [M, N]
    # x @ decoded.T in float64, and how far a right y may lie from it
    exact = operands.reference(x, implementation)
    found = compare(y, exact)
    print(f"call {number}: relative error {found.relative_error:.4g}, at most {found.bound:.4g} is right;"
          f" {found.outside} of {y.numel()} elements outside")

# Every check of a sweep, on an instance of its own: single codes, other token counts and layouts, unwritten memory, ...
request = TrialRequest(case=case, device=device, seed=seed, timing_budget_s=0, check_budget_s=5)
verdict = trial.diagnosed_trial(find(case.implementation, known)(), request)
right = verdict.status is Status.OK
if not right:
    print(f"{verdict.headline}: {verdict.summary}")
'''

_TIMING = """
# Recorded: {median_us:.4g} us, dense {baseline}. Weights are not rotated here, so a small one stays in cache.
from torch.utils.benchmark import Timer

dense = operands.dense()
with torch.inference_mode():
    took, dense_took = (
        Timer(call, globals=globals(), num_threads=torch.get_num_threads()).blocked_autorange().median
        for call in ("product.matmul(x, stored)", "operands.dense_product(x, dense)")
    )
print(f"{{took * 1e6:.4g}} us; dense {{dense_took * 1e6:.4g}} us; speedup {{dense_took / took:.3g}}")
"""

_END = '''
print("right" if right else "wrong")
sys.exit(0 if right else 1)
'''


_OF_A_FILE = '''\
# {case_id}
# was found {headline} with torch {torch}: {summary}
import sys

sys.exit(
    "the {what} of this case comes from a file, which the record does not hold; measure it again with: "
    "fpxbench run --fresh --seed {seed} {option} -i {implementation}{scheme} -w '{workload}/m{m}'"
)
'''


def repro_script(record: Record) -> str:
    """Return Python source that quantizes the record's weight, multiplies by it and compares with the reference.

    It needs fpxbench, but no child process and no records. A record's free text (a summary, a device's name) may come
    from another machine: it appears only in comments, as a single printable line.
    """
    case, timing = record.case, record.timing
    names: tuple[str, ...] = ("implementation", "scheme", "workload")
    shape: tuple[str, ...] = ("m", "n", "k", "activation")
    if case.experts is not None:
        shape = (*shape, "experts", "experts_per_token", "routing")
    fields = ",\n    ".join(", ".join(f"{name}={_literal(getattr(case, name))}" for name in line)
                            for line in (names, shape))
    if is_from_file(case.workload) or record.activations:
        options = [] if not is_from_file(case.workload) else [
            "--checkpoint PATH --layer '*'" if case.workload.startswith(FROM_CHECKPOINT) else "--weights FILE"]
        option = " ".join([*options, *(["--activations FILE"] if record.activations else [])])
        return _OF_A_FILE.format(
            what="weight" if options else "activation",
            case_id=case.id, headline=record.verdict.headline, torch=record.build.torch, option=option,
            summary=_one_line(record.verdict.summary or record.verdict.headline), seed=record.seed or 0,
            implementation=case.implementation, workload=case.workload, m=case.m,
            scheme="" if case.workload.startswith(FROM_CHECKPOINT) else f" -s {case.scheme}",
        )
    script = _HEAD.format(case_id=case.id, headline=record.verdict.headline, torch=record.build.torch,
                          triton=_one_line(record.build.triton or "none"), device=_one_line(record.machine.device),
                          arch=_one_line(record.machine.arch), started_at=_one_line(record.started_at),
                          summary=_one_line(record.verdict.summary or record.verdict.headline), fields=fields,
                          kind=record.machine.kind, seed=record.seed or 0,
                          seed_note="" if record.seed is not None else "   # the record has none")
    script += (_ONE_WEIGHT if case.experts is None else _EXPERTS) + _CALLS
    if record.verdict.status is Status.OK and timing is not None:
        baseline = f"{timing.baseline_us:.4g} us" if timing.baseline_us is not None else "not recorded"
        script += _TIMING.format(median_us=timing.median_us, baseline=baseline)
    return script + _END


def _literal(value: object) -> str:
    return repr(str(value)) if isinstance(value, str) else repr(value)      # str: an enumeration's value, not its name


def _one_line(text: str) -> str:
    """Return `text` for a comment: one line of printable characters."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else " " for character in line)[:300]
