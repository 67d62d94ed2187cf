"""A kernel that does not end is told of once, and a device that something else uses is not taken for idle."""

import pytest
import torch

from fpxbench.checking import device_lock, device_wait
from fpxbench.checking.device_wait import HANG_S, HangWatch


@pytest.fixture
def told(monkeypatch):
    events = []
    monkeypatch.setattr(device_lock, "listener", lambda event, message: events.append((event, message)))
    return events


def ticks(watch, count):
    for _ in range(count):
        watch.tick()


def test_a_wait_that_lasts_is_told_of_once(told):
    watch = HangWatch()
    watch.waits, watch.waiting = 1, True
    ticks(watch, HANG_S)        # the first tick sees that a wait has begun
    assert told == []
    ticks(watch, 3 * HANG_S)
    assert [event for event, _ in told] == ["hung"] and f"still running {HANG_S} s" in told[0][1]


def test_waits_that_end_are_not_added_up(told):
    watch = HangWatch()
    for number in range(4):
        watch.waits, watch.waiting = number, True
        ticks(watch, HANG_S - 1)
    watch.waiting = False
    ticks(watch, 2 * HANG_S)
    assert told == []


def test_a_wait_that_raises_is_over(monkeypatch):
    def fault():
        assert device_wait._watch.waiting
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device_wait.synchronize()
    assert not device_wait._watch.waiting


@pytest.mark.parametrize(("answers", "idle", "events"), [
    ([True], True, []),
    ([False, True], True, [("busy", "")]),
    ([False, False], False, [("busy", "")]),
])
def test_a_busy_device_gets_a_second_look_after_the_watcher_had_its_turn(told, monkeypatch, answers, idle, events):
    left = list(answers)
    monkeypatch.setattr(device_wait, "_idle", lambda device: left.pop(0))
    assert device_wait.wait_until_idle("cuda") is idle
    assert told == events and not left


@pytest.mark.parametrize(("answer_s", "idle"), [(1e-4, True), (2e-3, False)])
def test_a_device_that_answers_late_is_in_use(monkeypatch, answer_s, idle):
    now = [0.0]

    def answered():
        now[0] += answer_s

    monkeypatch.setattr(torch.cuda, "synchronize", answered)
    monkeypatch.setattr(device_wait.time, "perf_counter", lambda: now[0])
    assert device_wait._idle("cpu") is idle
