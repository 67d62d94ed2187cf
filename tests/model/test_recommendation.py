"""Which scheme to choose: the Pareto front, and mixed precision under a budget of bits."""

import pytest
import torch
from generation_records import HOSTILE, row
from sample_records import BUILD, CPU
from test_generation_page import records
from tiny_model import tiny_llama

from fpxbench.model import mixed_precision
from fpxbench.model.generate_record import Estimate
from fpxbench.model.mixed_precision import mixed
from fpxbench.model.recommendation import Mixed, MixedRecord, Uniform, allocate, pareto_front
from fpxbench.records.store import Store
from fpxbench.reports.model.model_chapter import write_models
from fpxbench.reports.pages import Pages


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
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = torch.randint(2, 120, (64,), generator=torch.Generator().manual_seed(3))
    found = mixed(model, text, ["e4m3fn-row", "mxfp4"], budget_bits=6.5)
    assert found.bits <= 6.5 and set(found.schemes.values()) == {"e4m3fn-row", "mxfp4"} and len(found.schemes) == 14
    uniform = {one.scheme: one for one in found.uniform}
    assert uniform["e4m3fn-row"].kl.value < found.kl.value < uniform["mxfp4"].kl.value
    assert found.rival.scheme == "mxfp4"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_budget_that_no_scheme_meets_is_refused_before_any_layer_is_measured(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(mixed_precision, "rounded", lambda *args: pytest.fail("nothing may be quantized"))
    with pytest.raises(ValueError, match=r"a budget of 3 bits is below the 4\.25"):
        mixed(model, torch.arange(2, 40), ["e4m3fn-row", "mxfp4"], budget_bits=3.0)


def test_mixed_precision_is_stored_and_drawn_beside_the_uniform_schemes(tmp_path):
    estimate = Estimate(value=0.1, low=0.09, high=0.12)
    found = Mixed(budget_bits=6, bits=5.8, kl=estimate, schemes={"layers.0.up": "mxfp4", HOSTILE: "e4m3fn-row"},
                  uniform=[Uniform(scheme="mxfp4", bits=4.25, kl=estimate)], tokens=63)
    store = Store(tmp_path, MixedRecord)
    store.append(MixedRecord(model=row("bf16", 1, 1, 0).model, mixed=found, build=BUILD, machine=CPU))
    pages = Pages(tmp_path / "site")
    [page] = write_models(tmp_path, pages, set()).models
    text = (tmp_path / "site" / page.path).read_text()
    assert not pages.failures and "mixed precision within 6 bits per weight" in text and HOSTILE not in text
    assert "the best uniform scheme within the budget is mxfp4" in text
    assert page.mixed[0].chart(0).figure["data"][0]["x"] == [4.25, 5.8]
