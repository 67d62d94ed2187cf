"""How steps are enqueued and timed, and energy measured beside them."""

from types import SimpleNamespace

import pytest
import torch

from fpxbench.model import generate_measurement, token_speed
from fpxbench.model.generate_measurement import joules_per_token


@pytest.mark.parametrize("waiting", [False, True])
def test_on_a_gpu_steps_are_enqueued_without_waiting_unless_asked_for(monkeypatch, waiting):
    """A stand-in for a device on which a step takes 2 ms, and the host's clock stands still."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.at = log.count("step")

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.0 * (end.at - self.at)

    class OnGpu:
        device = SimpleNamespace(type="cuda")

        def make_ready(self, batch): pass

        def empty_cache(self, batch): pass

        def prefill(self, tokens, cache):
            return torch.eye(4)[:len(tokens)]

        def decode(self, tokens, cache):
            log.append("step")
            return torch.eye(4)[:len(tokens)]

    class Prompt(list):
        def to(self, device):
            return self

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(token_speed.time, "perf_counter", lambda: 0.0)
    tokens, _, steps_s = token_speed.generate(OnGpu(), Prompt([0, 1]), 4, waiting=waiting)
    assert tokens.tolist() == [[0] * 4, [1] * 4]
    if waiting:
        assert log == ["wait", "wait", "wait", *["step", "wait"] * 3, "wait"] and steps_s == [0.0] * 3
    else:
        assert log == ["wait", "wait", "event", *["step", "event"] * 3, "wait"] and steps_s == [2e-3] * 3


@pytest.mark.parametrize(("device", "capability", "expected"), [
    ("cpu", (9, 0), {}), ("cuda", (8, 9), {}), ("cuda", (9, 0), {"triton.enable_pdl": True}),
    ("cuda", (12, 0), {"triton.enable_pdl": True})])
def test_kernels_overlap_where_the_device_can(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    options = token_speed.overlap_options(torch.device(device))
    assert options == expected
    compiled = torch.compile(lambda x: x + 1, options=options)     # an option that Inductor does not know raises here
    assert compiled is not None


@pytest.mark.parametrize(("device", "overlaps", "method"), [("cpu", False, 1), ("cuda", False, 2), ("cuda", True, 3)])
def test_a_record_says_how_its_steps_were_run_and_timed(device, overlaps, method):
    decoder = SimpleNamespace(device=SimpleNamespace(type=device), overlaps=overlaps)
    assert token_speed.Decoder.method.fget(decoder) == method


def test_energy_is_of_a_time_beside_which_the_counters_steps_are_small(monkeypatch):
    """A device of 200 W whose counter steps every 100 ms; a generation of 8 tokens takes 30 ms."""
    now = [7.03]
    monkeypatch.setattr(generate_measurement, "energy_joules", lambda device: 200 * (now[0] // 0.1) * 0.1)

    def generation():
        now[0] += 0.03
        return 8

    found = joules_per_token(generation, "cuda", clock=lambda: now[0])
    assert found == pytest.approx(200 * 0.03 / 8, rel=0.05)
    monkeypatch.setattr(generate_measurement, "energy_joules", lambda device: 5.0)
    assert joules_per_token(generation, "cuda", clock=lambda: now[0]) is None, "a counter that stands still"
    monkeypatch.setattr(generate_measurement, "energy_joules", lambda device: None)
    assert joules_per_token(generation, "cpu", clock=lambda: pytest.fail("nothing to wait for")) is None


def test_windows_that_slide_are_left_to_pytorch_to_capture():
    class Config:
        layer_types = ["full_attention", "full_attention"]
        sliding_window = 4096

    assert not token_speed.slides(Config())
    Config.layer_types = ["full_attention", "sliding_attention"]
    assert token_speed.slides(Config())
    Config.layer_types = None
    assert token_speed.slides(Config())
    Config.sliding_window = None
    assert not token_speed.slides(Config())
