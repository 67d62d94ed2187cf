"""Which scheme to choose: the Pareto front, and mixed precision under a budget of bits."""

import pytest
import torch
from test_generation_page import records, row
from tiny_model import tiny_config
from transformers import LlamaForCausalLM

from fpxbench.model.mixed_precision import mixed
from fpxbench.model.recommendation import allocate, pareto_front


def test_the_front_holds_what_nothing_beats_in_quality_bytes_and_speed_and_no_wrong_row():
    beaten = row("e5m2-row", 160, 0.02, 0.2)
    assert [r.scheme for r in pareto_front([*records(), beaten])] == ["bf16", "int8-row", "e4m3fn-row", "mxfp4"]


def test_a_speed_above_the_roofline_puts_nothing_on_the_front():
    impossible = row("e5m2-row", 160, 160e6 / (5 * row("bf16", 1, 1, 0).machine.read_gb_per_s * 1e9), 0.2)
    assert impossible.flags
    assert "e5m2-row" not in [r.scheme for r in pareto_front([*records(), impossible])]


def test_the_layer_that_loses_least_per_bit_gives_up_its_bits_first():
    kl = {"a": {"8": 0.0, "4": 5.0}, "b": {"8": 0.0, "4": 1.0}, "c": {"8": 0.0, "4": 1.5}}
    bits = {"a": {"8": 800, "4": 400}, "b": {"8": 800, "4": 400}, "c": {"8": 1600, "4": 800}}
    assert allocate(kl, bits, 3200) == {"a": "8", "b": "8", "c": "8"}
    assert allocate(kl, bits, 2500) == {"a": "8", "b": "8", "c": "4"}, "1.5 over 800 bits is less than 1 over 400"
    assert allocate(kl, bits, 2000) == {"a": "8", "b": "4", "c": "4"}
    with pytest.raises(ValueError, match="below the 1600"):
        allocate(kl, bits, 1500)


def test_mixed_precision_meets_its_budget_beats_the_small_scheme_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).to(torch.bfloat16).eval().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = torch.randint(2, 120, (64,), generator=torch.Generator().manual_seed(3))
    found = mixed(model, text, ["e4m3fn-row", "mxfp4"], budget_bits=6.5)
    assert found.bits <= 6.5 and set(found.schemes.values()) == {"e4m3fn-row", "mxfp4"} and len(found.schemes) == 14
    uniform = {one.scheme: one for one in found.uniform}
    assert uniform["e4m3fn-row"].kl.value < found.kl.value < uniform["mxfp4"].kl.value
    assert found.rival.scheme == "mxfp4"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
