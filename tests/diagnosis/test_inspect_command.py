"""`fpxbench inspect`: modules, users' own files, its output, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from commands import command
from fault_injection import read, store
from inspecting import inspected
from places import FAULTY_IMPLS as FAULTY
from safetensors.torch import save_file
from torch import nn

from fpxbench import implementation as implementations
from fpxbench.cli.common import UsageError
from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import CannotInspect, inspect
from fpxbench.diagnosis.blackbox.module_adapter import Wrapped
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status

pytestmark = pytest.mark.usefixtures("one_thread")


class Fp8Linear(nn.Module):
    """E4M3FN with a scale a row, as a module of its own."""

    def __init__(self, linear: nn.Linear, **how) -> None:
        super().__init__()
        stored = store(linear.weight.detach().float(), scheme_named("e4m3fn-row"), "bytes", **how)
        self.weight = nn.Parameter(read(stored).to(linear.weight.dtype), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    ("how", "kind"),
    [({}, None), ({"rounding": "away"}, Kind.TIES_AWAY), ({"rounding": "zero"}, Kind.TRUNCATED),
     ({"maximum": 240}, Kind.WRONG_MAX), ({"flushed": True}, Kind.SUBNORMAL_FLUSHED),
     ({"positive": True}, Kind.SIGN_LOST)],
)
def test_a_module_is_diagnosed_through_forward_alone(how, kind) -> None:
    found = inspected(Wrapped(lambda linear: Fp8Linear(linear, **how), torch.bfloat16), "e4m3fn-row")
    assert found.verdict.kind is kind, found.verdict.summary
    assert found.right is (kind is None)


def test_a_module_that_quantizes_nothing_is_told() -> None:
    found = inspected(Wrapped(lambda linear: linear, torch.bfloat16), "mxfp4")
    assert "nothing was quantized" in found.verdict.summary


# The command.


def test_the_command_prints_what_differs_and_exits_with_1() -> None:
    result = command("inspect faulty_fn_as_fnuz e4m3fn-row --n 32 --k 64 --m 16 --device cpu --seed 1",
                     "--impls", FAULTY)
    assert result.exit_code == 1
    assert "fn_as_fnuz" in result.stdout
    assert "0x38 0.0111.000" not in result.stdout       # beyond the first rows
    assert "… and 239 more" in result.stdout


def test_the_command_gives_json_and_exits_with_0_for_what_is_right() -> None:
    result = command("inspect eager_upcast mxfp4 --n 32 --k 64 --m 16 --device cpu --json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["weights_read"] == 32 * 64


def of_files(*arguments: str):
    return command("inspect eager_upcast mxfp4 --device cpu", *arguments)


@pytest.fixture
def file_of_matrices(tmp_path):
    def written(name: str, **tensors) -> str:
        save_file(tensors, tmp_path / name)
        return str(tmp_path / name)

    return written


def test_ones_own_weight_and_activations_are_inspected(file_of_matrices) -> None:
    weights = file_of_matrices("w.safetensors", up=torch.randn(48, 96), down=torch.randn(32, 64))
    x = file_of_matrices("x.safetensors", x=3 * torch.randn(5, 96))
    result = of_files("--weights", f"{weights}:up", "--activations", x, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["n"], found["k"], found["weights_read"]) == (48, 96, 48 * 96)
    assert f"{weights}:up, [48, 96]" in of_files("--weights", f"{weights}:up").stdout


def test_mistakes_in_ones_own_files_are_told_with_the_way_out(file_of_matrices) -> None:
    weights = file_of_matrices("w.safetensors", up=torch.randn(48, 96), down=torch.randn(32, 64))
    x = file_of_matrices("x.safetensors", x=torch.randn(5, 90))
    for arguments, words in [(("--weights", weights), "holds 2 matrices: name one"),
                             (("--weights", f"{weights}:up", "--activations", x), "has K = 90, and the weight 96"),
                             (("--weights", f"{weights}:no"), "no matrix of floating-point numbers 'no'"),
                             (("--weights", f"{weights}:up", "--n", "8"), "brings its own N and K"),
                             (("--activations", x, "--k", "8"), "brings its own K"),
                             (("--weights", "absent.safetensors"), "no such file")]:
        mistake = of_files(*arguments).exception
        assert isinstance(mistake, UsageError) and words in str(mistake), (arguments, mistake)


def test_a_crash_is_a_result_with_its_log() -> None:
    result = command("inspect faulty_segfault e4m3fn-row --n 32 --k 64 --device cpu --json", "--impls", FAULTY)
    assert result.exit_code == 1
    verdict = json.loads(result.stdout)["verdict"]
    assert (verdict["status"], verdict["signal"]) == ("crash", "SIGSEGV")
    assert "Segmentation fault" in verdict["log_tail"]


@pytest.mark.parametrize(
    ("subject", "scheme", "words"),
    [
        ("eager_upcas", "mxfp4", "did you mean eager_upcast"),
        ("eager_upcast", "mxfp5", "did you mean mxfp4"),
        ("eager_upcast", "bf16", "stores weights as they are"),
        ("no.such.module:f", "mxfp4", "there is no module 'no'"),
        ("json:no_such", "mxfp4", "json has no function 'no_such'"),
        ("shutil:copy", "mxfp4",
         "must accept a single torch.nn.Linear, but takes .*: missing a required argument: 'dst'"),
    ],
)
def test_a_mistake_in_what_is_asked_for_is_one_sentence(subject, scheme, words) -> None:
    with pytest.raises(CannotInspect, match=words):
        inspect(InspectRequest(subject=subject, scheme=scheme, n=8, k=32, m=1, device="cpu", seed=1))


SMALL = {"scheme": "e4m3fn-row", "n": 8, "k": 32, "m": 16, "device": "cpu", "seed": 1}
AUTHORS = """
from fpxbench.implementation import Implementation, Support, implementation

class Any(Implementation):
    def supports(self, scheme, device):
        return Support.yes()

@implementation("of_no_layout")
class OfNoLayout(Any):
    layout = "nybbles"

@implementation("raising")
class Raising(Any):
    def matmul(self, x, weight):
        raise KeyError("the author's")

def five(linear):
    return 5

def raising(linear):
    raise KeyError("the author's")
"""


@pytest.fixture
def authors(tmp_path, monkeypatch):
    """Return the result of inspecting something in an author's file, and what it prints."""
    (tmp_path / "authors.py").write_text(AUTHORS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "authors", raising=False)
    monkeypatch.setattr(implementations, "_registry", dict(implementations._registry))

    def of(subject):
        impls = [] if ":" in subject else ["authors.py"]
        return inspect(InspectRequest(subject=subject, impls=impls, **SMALL)).verdict

    return of


@pytest.mark.parametrize("subject", ["raising", "authors:raising"])
def test_what_an_author_raises_is_shown_from_the_authors_file_on(authors, capsys, subject):
    assert authors(subject).summary.startswith("raised KeyError")
    frames = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  File ")]
    assert len(frames) == 1 and "authors.py" in frames[0]


@pytest.mark.parametrize(
    ("subject", "words"),
    [("of_no_layout", "no layout 'nybbles'"), ("authors:five", "the factory returned int, not a torch.nn.Module")],
)
def test_what_this_package_refuses_of_an_author_is_one_sentence_without_a_traceback(authors, capsys, subject, words):
    assert words in authors(subject).summary
    assert capsys.readouterr().err == ""


def test_a_file_that_could_not_be_loaded_is_named_whatever_is_inspected(tmp_path) -> None:
    (tmp_path / "broken.py").write_text("def (:\n")
    found = inspect(InspectRequest(subject="eager_upcast", impls=[str(tmp_path)], **SMALL | {"scheme": "mxfp4"}))
    assert found.right
    assert ["broken.py could not be loaded: SyntaxError" in message for message in found.not_loaded] == [True]


def test_a_factory_is_found_in_the_current_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_modules.py").write_text("def same(linear):\n    return linear\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = inspect(InspectRequest(subject="my_modules:same", **SMALL))
    assert found.verdict.status is Status.WRONG
