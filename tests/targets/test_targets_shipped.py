"""The matrix that the repository carries says what the published Tritons do, the failures that this suite began with
among it.
"""

import itertools
import random
from collections import defaultdict

import pytest
from places import CHECKOUT

from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.targets import version_spans as history
from fpxbench.targets.architectures import ARCHITECTURES
from fpxbench.targets.collection import evaluate_build
from fpxbench.targets.matrix import read_matrix
from fpxbench.targets.operations import probes_like
from fpxbench.targets.triton_builds import find_triton

FILE = CHECKOUT / "reports" / "targets" / "targets.json"


@pytest.fixture(scope="module")
def matrix():
    return read_matrix(FILE)


def outcomes(matrix, probe, architecture):
    """Return the outcome of a cell by version of Triton."""
    found, = (candidate for candidate in matrix.probes if candidate.id == probe)
    return {build.triton: matrix.outcome_of(found, architecture, at) for at, build in enumerate(matrix.builds)}


def versions(found, condition):
    return [version for version, outcome in found.items() if condition(outcome)]


def test_it_has_every_minor_release_from_3_0_on_and_every_architecture(matrix):
    minors = {build.triton.rsplit(".", 1)[0] for build in matrix.builds if not build.unusable}
    assert {f"3.{minor}" for minor in range(10)} <= minors
    assert [architecture.name for architecture in matrix.architectures] == list(ARCHITECTURES)
    assert {question.id for question in probes_like(["decode", "encode", "dequantized_dot"])} <= {probe.id
        for probe in matrix.probes}
    assert FILE.stat().st_size < 2 << 20


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_storing_e5m2fnuz_aborted_in_3_0_and_3_1_and_is_refused_since(matrix, architecture):
    found = outcomes(matrix, "encode/e5m2fnuz/fp16-rtne", architecture)
    aborted = versions(found, lambda o: o.status is Status.CRASH)
    assert aborted == ["3.0.0", "3.1.0"]
    first = found["3.0.0"]
    assert first.cause == "Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne"
    assert first.signal == "SIGABRT"
    assert all(o.kind is Kind.UNSUPPORTED_DTYPE for version, o in found.items() if version not in aborted)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_packing_elements_dumped_core_until_3_2(matrix, architecture):
    cells = [outcomes(matrix, probe.id, architecture)
             for probe in matrix.probes if probe.id.startswith("dequantized_dot/e5m2/")]
    broken = {version for found in cells
              for version in versions(found, lambda o: o.cause.startswith("size mismatch when packing elements"))}
    assert broken == {"3.0.0", "3.1.0", "3.2.0"}


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90"])
def test_e4m3fnuz_was_decoded_by_e4m3fns_instruction_in_3_0_and_3_1(matrix, architecture):
    found = outcomes(matrix, "decode/e4m3fnuz/fp16", architecture)
    wrong = versions(found, lambda o: o.status is Status.WRONG)
    assert wrong == ["3.0.0", "3.1.0"]
    assert found["3.0.0"].kind is Kind.FNUZ_AS_FN and "cvt.rn.f16x2.e4m3x2" in found["3.0.0"].message
    assert all(o.status is Status.UNSUPPORTED for version, o in found.items() if version not in wrong)


def test_every_row_has_a_history_as_text(matrix):
    for operation, fmt, probes in history.rows(matrix):
        for architecture in matrix.architectures:
            text = history.history_text(history.spans(matrix, probes, architecture.name))
            assert text and text != "not tried", (operation, fmt, architecture.name)


def test_the_installed_triton_still_matches_the_shipped_matrix(matrix, tmp_path, monkeypatch):
    """A cell of each cause, another one each time."""
    triton = pytest.importorskip("triton")
    position = next((at for at, build in enumerate(matrix.builds) if build.triton == triton.__version__), None)
    if position is None:
        pytest.skip(f"the matrix has no Triton {triton.__version__}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seed = random.randrange(1 << 32)
    # triton_fused belongs to this checkout, inductor to PyTorch: a change of theirs is no change of Triton's.
    questions = [q for q in probes_like([]) if q.operation not in ("triton_fused", "inductor")]
    written = {probe.id: probe for probe in matrix.probes}
    by_cause = defaultdict(list)
    for question, architecture in itertools.product([q for q in questions if q.id in written], ARCHITECTURES.values()):
        outcome = matrix.outcome_of(written[question.id], architecture.name, position)
        by_cause[outcome.status, outcome.kind, outcome.cause].append((question, architecture))
    cells = list(map(random.Random(seed).choice, by_cause.values()))
    # A wrong decode makes products wrong that use the same instruction.
    decodes = [(q, a) for q, a in itertools.product(questions, ARCHITECTURES.values()) if q.operation == "decode"
               and any((q.format, a) == (other.format, there) for other,
                       there in cells if other.operation == "dequantized_dot")]
    result = evaluate_build(find_triton("installed"), [*cells, *(cell for cell in decodes if cell not in cells)])
    for question, architecture in cells:
        then = matrix.outcome_of(written[question.id], architecture.name, position)
        now = result.outcomes[question.id, architecture.name]
        assert (now.status, now.kind, now.cause) == (then.status, then.kind,
                                                     then.cause), f"{question.id} on {architecture.name}, seed {seed}"
