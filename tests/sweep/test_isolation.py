"""Nothing that a case does can end the sweep: each end has a verdict, and the next case runs."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from places import HELPERS

from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.isolation import LOG_TAIL_BYTES, Isolation

GIB = 1 << 30


@pytest.fixture(scope="module")
def isolation():
    with Isolation(memory_limit=4 * GIB) as shared:
        shared.call("harmful:say", "warm", timeout_s=600)
        yield shared


def still_works(isolation):
    outcome = isolation.call("harmful:say", "here", timeout_s=600)
    return outcome.read(str) == "here" and outcome.verdict is None and outcome.log_tail == "here\n"


def test_healthy_cases_share_a_warm_child(isolation):
    assert isolation.call("harmful:pid", timeout_s=600).value == isolation.call("harmful:pid", timeout_s=600).value


def test_a_segfault_is_a_crash_with_its_signal_and_what_native_code_wrote(isolation):
    outcome = isolation.call("harmful:segfault", timeout_s=600)
    assert outcome.value is None
    verdict = outcome.verdict
    assert (verdict.status, verdict.signal, verdict.exit_code) == (Status.CRASH, "SIGSEGV", -signal.SIGSEGV)
    assert "native code says: reading address 0" in verdict.log_tail
    assert "harmful.py" in verdict.log_tail, "Python's stack at the fault is part of the log"
    assert still_works(isolation)


def test_an_abort_inside_llvm_is_a_crash_of_its_kind(isolation):
    words = "LLVM ERROR: Unsupported conversion from f16 to f8E5M2FNUZ with rounding mode rtne\n"
    verdict = isolation.call("harmful:abort", words, timeout_s=600).verdict
    assert (verdict.status, verdict.kind, verdict.signal) == (Status.CRASH, Kind.UNSUPPORTED_ROUNDING, "SIGABRT")
    assert words in verdict.log_tail
    assert still_works(isolation)


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_exits_is_a_crash_with_its_exit_code(isolation, code):
    verdict = isolation.call("harmful:exit_with", code, timeout_s=600).verdict
    assert (verdict.status, verdict.exit_code, verdict.signal) == (Status.CRASH, code, None)
    assert f"exit code {code}" in verdict.summary
    assert still_works(isolation)


def test_an_exit_is_noticed_although_a_child_of_the_process_holds_its_pipes_open(isolation):
    verdict = isolation.call("harmful:exit_with_a_child_that_lives_on", timeout_s=600).verdict
    assert (verdict.status, verdict.exit_code) == (Status.CRASH, 0)
    assert still_works(isolation)


@pytest.mark.parametrize(
    ("function", "says"),
    [("harmful:raise_error", "LookupError: no such kernel"), ("harmful:system_exit", "SystemExit: 4"),
     ("harmful:pretend_ctrl_c", "KeyboardInterrupt")],
)
def test_whatever_is_raised_in_the_child_is_an_error_and_not_the_end(isolation, function, says):
    verdict = isolation.call(function, timeout_s=600).verdict
    assert verdict.status is Status.ERROR and says in verdict.summary
    assert still_works(isolation)


def test_an_error_that_the_user_has_to_correct_is_told_from_a_failure(isolation):
    outcome = isolation.call("harmful:reject", 7, timeout_s=600)
    assert outcome.mistake == "7 is not allowed" and outcome.value is None
    assert isolation.call("harmful:raise_error", timeout_s=600).mistake == ""


def test_a_library_may_start_processes_of_its_own(isolation):
    assert isolation.call("harmful:use_multiprocessing", timeout_s=600).read(int) == 4


def test_a_hang_that_ignores_sigterm_is_killed_with_all_that_it_started(isolation, tmp_path):
    pid_file = tmp_path / "pid"
    verdict = isolation.call("harmful:hang_deaf", str(pid_file), timeout_s=4.0).verdict
    assert verdict.status is Status.TIMEOUT and "hanging" in verdict.log_tail
    assert gone(int(pid_file.read_text()))
    assert still_works(isolation)


def gone(pid, within_s=60.0):
    """Return whether a process is dead, or dead within a moment."""
    try:
        psutil.Process(pid).wait(within_s)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("function", ["harmful:allocate", "harmful:allocate_in_a_child"])
def test_endless_allocation_is_oom_by_itself_or_by_a_child_of_its_own(function):
    with Isolation(memory_limit=GIB) as small:
        verdict = small.call(function, timeout_s=600).verdict
        assert verdict.status is Status.OOM and "more than the limit of 1.00 GiB" in verdict.summary
        still_works(small)


def test_only_the_last_4_kb_of_a_log_are_kept_whatever_bytes_they_are(isolation):
    verdict = isolation.call("harmful:flood", timeout_s=600).verdict
    assert verdict.signal == "SIGBUS"
    assert len(verdict.log_tail.encode()) <= LOG_TAIL_BYTES + 16       # a byte that is no UTF-8 becomes three
    assert "x" * 100 in verdict.log_tail or "Fatal Python error" in verdict.log_tail


def test_a_kernel_that_does_not_end_is_ended_long_before_the_time_limit(isolation):
    outcome = isolation.call("harmful:hanging_kernel", timeout_s=600)
    assert outcome.verdict.status is Status.TIMEOUT
    assert outcome.verdict.summary == "a kernel was still running 20 s after its launch and was ended"
    assert still_works(isolation)


def test_nothing_can_be_read_from_the_terminal(isolation):
    assert isolation.call("harmful:read_stdin", timeout_s=600).read(str) == "''"


def test_a_call_leaves_no_file_behind(isolation):
    isolation.call("harmful:say", "x", timeout_s=600)
    assert list(Path(isolation._folder.name).iterdir()) == []


INTERRUPTED = """
    import sys, time
    from fpxbench.sweep.isolation import Isolation

    if __name__ == "__main__":
        with Isolation(1 << 32) as isolation:
            print(isolation.call("harmful:pid", timeout_s=600).value, flush=True)
            try:
                isolation.call("harmful:hang_deaf", sys.argv[1], timeout_s=600)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
"""


def test_ctrl_c_reaches_the_caller_and_ends_the_child(tmp_path):
    (tmp_path / "main.py").write_text(textwrap.dedent(INTERRUPTED))
    pid_file = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])}
    command = [sys.executable, tmp_path / "main.py", pid_file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        child = int(process.stdout.readline())
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted\n"
        assert process.wait(600) == 0
    assert gone(child) and gone(int(pid_file.read_text()))


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    (tmp_path / "main.py").write_text(textwrap.dedent(INTERRUPTED))
    pid_file = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])}
    with subprocess.Popen(
        [sys.executable, tmp_path / "main.py", pid_file], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        child = int(process.stdout.readline())
        process.kill()
    assert gone(child)


def test_what_the_fork_server_loads_asks_cuda_for_nothing():
    """A process that asked CUDA for its devices cannot fork children that use them."""
    script = """
import torch, torch.cuda as cuda
asked = []
for name in ("is_available", "device_count", "_lazy_init", "get_device_capability", "get_device_properties"):
    setattr(cuda, name, lambda *args, name=name, **kwargs: asked.append(name) or 0)
from fpxbench.sweep.preload import preload
preload()
print("asked", asked)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "asked []"


def test_the_compiler_is_loaded_by_what_compiles_on_its_share_of_cores_and_shows_its_loops_in_the_profiler():
    """Importing it takes as long as the rest of PyTorch."""
    script = """
import os, sys
from fpxbench.records.case import Case
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.preload import preload
from fpxbench.sweep.trial import run_trial
os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
preload()
case = Case(implementation="eager_upcast", scheme="e4m3fn-row", workload="canary.seed", m=1, n=32, k=32)
run_trial(TrialRequest(case=case, seed=1, timing_budget_s=0, cores=3))
before = "torch._dynamo" in sys.modules, "torch._inductor" in sys.modules
import torch._inductor.config as options
print(*before, options.compile_threads, options.cpp.enable_kernel_profile)
options.cpp.enable_kernel_profile, options.compile_threads = False, 32
preload()
run_trial(TrialRequest(case=case, seed=1, timing_budget_s=0, cores=3))
print(options.compile_threads, options.cpp.enable_kernel_profile)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False 3 True", "3 True"]
