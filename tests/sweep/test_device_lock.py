"""Only what is timed waits for the device, and a wait names the process that holds it up."""

import multiprocessing
import os
import tempfile
import threading
from pathlib import Path

import pytest

from fpxbench.checking import device_lock as locks
from fpxbench.checking.device_lock import device_lock, lock_file
from fpxbench.records.verdict import Status
from fpxbench.sweep.isolation import Isolation

GIB = 1 << 30


@pytest.fixture
def device():
    """Return a device of this test's own."""
    name = f"test-{os.getpid()}"
    yield name
    lock_file(name).unlink(missing_ok=True)


def hold(device, released, taken):
    locks._watcher_pid = lambda: ANOTHER_SWEEP
    with device_lock(device, "a/case/of/another/sweep"):
        taken.set()
        released.wait()


ANOTHER_SWEEP = 1 << 22


@pytest.fixture
def holder(device):
    """Return the event that ends another sweep's hold of the device's lock."""
    context = multiprocessing.get_context("fork")
    released, taken = context.Event(), context.Event()
    process = context.Process(target=hold, args=(device, released, taken))
    process.start()
    taken.wait()
    yield released
    released.set()
    process.join()


def test_a_call_that_waits_longer_than_its_time_limit_is_not_a_timeout_and_the_holder_is_named(device, holder):
    announced = []

    def announce(message):
        announced.append(message)
        threading.Timer(0.5, holder.set).start()

    with Isolation(4 * GIB, announce) as isolation:
        isolation.call("harmful:say", "warm", timeout_s=600)
        outcome = isolation.call("harmful:use_the_device", device, 0.0, timeout_s=1.0)
    assert outcome.value is not None, outcome.verdict
    assert outcome.waited_s >= locks.ANNOUNCE_AFTER_S and outcome.waited_s <= outcome.elapsed_s
    (message,) = announced
    assert f"process {ANOTHER_SWEEP} (" in message and "timing a/case/of/another/sweep" in message


def test_the_time_limit_goes_on_once_the_device_is_free(device):
    with Isolation(4 * GIB) as isolation:
        outcome = isolation.call("harmful:use_the_device", device, 600.0, timeout_s=1.0)
    assert outcome.verdict.status is Status.TIMEOUT and outcome.waited_s < locks.ANNOUNCE_AFTER_S


def test_the_lock_is_free_after_its_holder_was_killed(device):
    with Isolation(4 * GIB) as isolation:
        assert isolation.call("harmful:use_the_device", device, 600.0, timeout_s=1.0).verdict.status is Status.TIMEOUT
        assert isolation.call("harmful:use_the_device", device, 0.0, timeout_s=600).value is not None
    assert lock_file(device).read_text() == ""


def test_a_child_uses_the_folder_of_locks_that_is_named_to_its_parent():
    """The tests name one of their own: no sweep on the same machine makes them wait."""
    with Isolation(4 * GIB) as isolation:
        used = isolation.call("fpxbench.checking.device_lock:lock_file", "cpu", timeout_s=600).read(Path)
    assert used == lock_file("cpu") and used.parent == Path(os.environ[locks.FOLDER_VARIABLE])
    assert used.parent != Path(tempfile.gettempdir())


def test_each_gpu_of_a_machine_has_a_lock_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, cpu = lock_file("cuda"), lock_file("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert lock_file("cuda") == first
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert lock_file("cuda") != first and lock_file("cpu") == cpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1b2c/../x")
    assert lock_file("cuda").parent == first.parent


def test_cases_of_one_sweep_that_take_turns_are_not_announced(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(locks, "listener", lambda event, message: told.append(message))
    for sweep in (os.getpid(), ANOTHER_SWEEP):
        monkeypatch.setattr(locks, "_watcher_pid", lambda sweep=sweep: sweep)
        with open(tmp_path / "lock", "a+") as file:
            locks._write_holder(file, "a case")
            monkeypatch.undo()
            monkeypatch.setattr(locks, "listener", lambda event, message: told.append(message))
            locks._announce(file, "cuda")
    assert len(told) == 1 and f"process {ANOTHER_SWEEP} (" in told[0]


def test_a_holder_that_is_about_to_name_itself_is_waited_for(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(locks, "listener", lambda event, message: told.append(message))
    with open(tmp_path / "lock", "a+") as file:
        def write(seconds):
            file.write("process 7 (fpxbench run), timing a case")
            file.flush()

        monkeypatch.setattr(locks.time, "sleep", write)
        locks._announce(file, "cuda")
    assert told == ["waiting to time on cuda, which is in use by process 7 (fpxbench run), timing a case"]
