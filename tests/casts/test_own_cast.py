"""`fpxbench numerics --cast`: a cast of one's own against the definition of its format."""

from __future__ import annotations

import sys

import pytest
from commands import command

from fpxbench.casts.own_cast import check_own_cast
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.settings import Settings
from fpxbench.user_error import UserError

CASTS = """
import torch


def nearest(x):
    return x.to(torch.float8_e4m3fn)


def truncated(x):
    return (x.float().view(torch.int32) & ~0xFFFFF).view(torch.float32).to(torch.float8_e4m3fn)


def four_bits(x):
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    size = x.float().abs().nan_to_num(0.0, torch.inf)
    below, above = torch.bucketize(size, middle), torch.bucketize(size, middle, right=True)
    code = torch.where(below % 2 == 0, below, above)        # they differ at ties, and then one is even
    return (code | (x.float().signbit() & ~x.isnan()).long() << 3).to(torch.uint8)


def packed(x):
    codes = four_bits(x)
    return (codes[0::2] | codes[1::2] << 4).view(torch.float4_e2m1fn_x2)


def swapped(x):
    codes = four_bits(x)
    return codes[1::2] | codes[0::2] << 4


def another_dtype(x):
    return x
"""


@pytest.fixture
def casts(tmp_path, monkeypatch):
    (tmp_path / "own_casts.py").write_text(CASTS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_casts", None)


@pytest.mark.parametrize(("function", "target", "status", "kind", "words"), [
    ("nearest", "e4m3fn", Status.OK, None, "all 65,536 inputs"),
    ("truncated", "e4m3fn", Status.WRONG, Kind.INACCURATE, "toward zero"),
    ("four_bits", "e2m1", Status.OK, None, "all 65,536 inputs"),
    ("packed", "e2m1", Status.OK, None, "all 65,536 inputs"),
    ("swapped", "e2m1", Status.WRONG, Kind.NIBBLE_SWAP, "exchanged"),
    ("four_bits", "e3m2", Status.WRONG, None, ""),
    ("another_dtype", "e4m3fn", Status.ERROR, None, "returned torch.bfloat16, not a tensor of torch.float8_e4m3fn"),
])
def test_a_cast_of_ones_own_is_judged_by_its_format(casts, tmp_path, function, target, status, kind, words) -> None:
    found = check_own_cast(Settings(device="cpu", results=tmp_path), f"own_casts:{function}", "bf16", target)
    assert found.verdict.status is status and words in found.verdict.summary, found.verdict
    assert kind is None or found.verdict.kind is kind


def test_a_function_or_a_dtype_that_is_not_there_is_a_usage_error(casts, tmp_path) -> None:
    settings = Settings(device="cpu", results=tmp_path)
    for function, target, words in (("own_casts:none", "e4m3fn", "no function 'none'"),
                                    ("no_such_module:f", "e4m3fn", "no module 'no_such_module'"),
                                    ("own_casts:nearest", "e9m9", "no dtype 'e9m9'")):
        with pytest.raises(UserError, match=words):
            check_own_cast(settings, function, "bf16", target)


def test_the_command_says_which_inputs_differ_and_exits_with_1(casts, tmp_path) -> None:
    ended = command("numerics --cast own_casts:truncated --results", tmp_path)
    assert ended.exit_code == 1 and "rounding: 1,772 inputs" in ended.output
    assert not list(tmp_path.glob("**/*.jsonl"))
