"""Check that two equal GPUs of one machine do not disturb each other: a case timed alone, and beside a busy neighbour.

Run it on a machine with two GPUs, from a checkout: ``python tools/two_gpus.py``.

1. A local fleet runs the same task on both at once: one on each, each with its share of the cores.
2. On each GPU one process then times the cases again and again, while one that multiplies matrices on the other GPU is
   stopped and goes on by turns, idle and busy next to each other. Two processes differ by several percent whatever
   their neighbours do, and so do two minutes of one; two neighbouring rounds of one process do not.
3. For each case and GPU the median ratio of a round beside the busy neighbour to the one beside the idle one must lie
   within 2% of 1. What the neighbour reached meanwhile is printed.

What runs is printed on stderr.

Exit status: 0; 1 if a case differs by more; 2 if there are not two equal GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fpxbench.builds.environments.specification import EnvironmentSpec
from fpxbench.builds.installed import installed_build
from fpxbench.builds.timeline import Timeline
from fpxbench.fleet import cluster
from fpxbench.fleet.builds import spec_for
from fpxbench.fleet.device_worker import LAUNCHER, share
from fpxbench.fleet.fleet_messages import Delivery, Device, Hello, Seat, SweepOptions, Task, TaskEnd
from fpxbench.fleet.inbox import Asked
from fpxbench.fleet.spool import node_folder
from fpxbench.records.case import Case
from fpxbench.records.record import Record
from fpxbench.stats import median_interval

MOST_DIFFERENCE = 0.02
FLEET = "two-gpus"
PROGRESS_EVERY_S = 5.0
SETTLED_S = 0.3
"""After the neighbour was stopped or goes on."""
SAMPLES = 40
_BEGAN = time.monotonic()
SHAPES = {"llama2-7b.o": (4096, 4096), "llama3-8b.down": (4096, 14336)}
CASES = [Case(implementation=name, scheme=scheme, workload=workload, m=1, n=n, k=k)
         for name, scheme in (("dense", "bf16"), ("triton_fused", "e4m3fn-row")) for workload, (n, k) in SHAPES.items()]
TIME_CASES = [sys.executable, __file__, "--time-cases"]

Ratios = dict[tuple[int, str], list[float]]
"""Times beside a busy neighbour over those beside an idle one, by the GPU's index and the case."""

LOAD = """
import time, torch
size, calls = 8192, 20
a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
c = a @ b
torch.cuda.synchronize()
while True:
    began = time.monotonic()
    for _ in range(calls):
        torch.mm(a, b, out=c)
    torch.cuda.synchronize()
    print(calls * 2e-12 * size ** 3 / (time.monotonic() - began), began, flush=True)
"""
"""What keeps the neighbour busy. It prints the TFLOP/s of the last 20 products, and when they began."""


class Gpu:
    """One GPU's worker."""

    def __init__(self, node: cluster.Node, number: int) -> None:
        seat = Seat(fleet=FLEET, device="cuda", share=number, shares=2, accelerator_type=node.accelerator_type)
        say(f"starting the worker of GPU {number}")
        self.number = number
        self.worker = cluster.start_worker(node, "cuda", seat)
        self.device: Device = Hello.model_validate_json(cluster.result(self.worker.call("hello"), 300.0)).device
        self.tasks = 0

    def start(self, spec: EnvironmentSpec) -> Task:
        self.tasks += 1
        task = Task(id=f"{self.device.index}-{self.tasks}-{time.time_ns()}", purpose="measure", spec=spec,
                    kind=self.device.kind, device="cuda", cases=CASES, options=SweepOptions(profile="smoke"))
        cluster.result(self.worker.call("start", task.model_dump_json(by_alias=True)), 60.0)
        return task

    def records(self, task: Task) -> list[Record]:
        """Wait for a task, and return its records. Exit where it did not end well."""
        asked, found, offset, shown, next_at = Asked.by(task), [], 0, "", 0.0
        while True:
            reply = cluster.result(self.worker.call("poll", task.id, offset, 1.0), 60.0)
            delivery = Delivery.model_validate_json(reply)
            found += [asked.read(line) for line in delivery.lines]
            offset = delivery.offset
            state = f"{self.device.label}: {delivery.state}, {len(found)} of {len(CASES)} records"
            if state != shown or time.monotonic() >= next_at:
                say(state + last_line(task))
                shown, next_at = state, time.monotonic() + PROGRESS_EVERY_S
            if delivery.end is not None:
                break
        cluster.result(self.worker.call("finish", task.id), 60.0)
        if delivery.end != TaskEnd(status="done"):
            sys.exit(f"{self.device.label}: {delivery.end.message}")
        return found


def say(line: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


def last_line(task: Task) -> str:
    """Return the last line that a task's sweep wrote, where its node is this machine."""
    try:
        lines = (node_folder() / "spool" / FLEET / task.id / "log").read_text(errors="replace").split("\n")
    except FileNotFoundError:       # another machine's, or nothing was started yet
        return ""
    return "".join(f": {line.strip()[:200]}" for line in list(filter(str.strip, lines))[-1:])


class Process:
    """A process on one GPU, on its share of the cores."""

    def __init__(self, gpu: Gpu, command: list[str]) -> None:
        cores = share(sorted(os.sched_getaffinity(0)), gpu.number, 2)
        launched = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), ",".join(map(str, cores)), *command]
        visible = {"CUDA_VISIBLE_DEVICES": gpu.device.uuid or str(gpu.device.index)}
        self.label = gpu.device.label
        self.process = subprocess.Popen(launched, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | visible)

    def line(self) -> str:
        """Return the next line that it prints. Exit if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.label}: what ran there ended with exit status {self.process.wait()}")
        return line

    def ask(self) -> str:
        """Have it print a line, and return it."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Neighbour(Process):
    """What keeps a GPU busy, or stands still."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu, [sys.executable, "-c", LOAD])
        self.reached: list[float] = []
        self.line()
        self.process.send_signal(signal.SIGSTOP)

    def busy(self) -> None:
        at, began = time.monotonic(), 0.0
        self.process.send_signal(signal.SIGCONT)
        while began < at:       # older lines, and the products during which it stood still
            reached, began = map(float, self.line().split())
        self.reached.append(reached)

    def idle(self) -> None:
        self.process.send_signal(signal.SIGSTOP)


def time_cases() -> None:
    """Print a line once ready, and for each line that comes in the microseconds of each case, as JSON."""
    import torch

    from fpxbench.checking.timing import TimedCase
    from fpxbench.implementation import discover
    from fpxbench.sweep.trial import TrialRequest, prepare

    found, timed = discover()[0], {}
    for case in CASES:
        implementation = found[case.implementation]()
        operands = prepare(implementation, TrialRequest(case=case, device="cuda", seed=0))
        timed[case.id] = TimedCase(implementation, operands, torch.cuda.get_device_properties(0).L2_cache_size)
    print("ready", flush=True)
    for _ in sys.stdin:
        # The case is kept: its captured calls read tensors that are its own.
        print(json.dumps({name: statistics.median(sample(one.launched) for _ in range(SAMPLES))
                          for name, one in timed.items()}), flush=True)


def sample(launched) -> float:
    """Return the microseconds of a call."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    launched.launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / launched.calls


def by_turns(gpu: Gpu, neighbour: Neighbour, rounds: int, ratios: Ratios) -> None:
    """Add the ratios of so many pairs of rounds, the idle and the busy one first by turns."""
    timer = Process(gpu, TIME_CASES)
    try:
        timer.line()
        timer.ask()     # clocks are low at first
        for number in range(rounds):
            found = {}
            for state in ("idle", "busy") if number % 2 else ("busy", "idle"):
                getattr(neighbour, state)()
                time.sleep(SETTLED_S)
                found[state] = json.loads(timer.ask())
            neighbour.idle()
            for case, us in found["idle"].items():
                ratios.setdefault((gpu.device.index, case), []).append(found["busy"][case] / us)
    finally:
        timer.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of an idle and a busy round on each GPU")
    parser.add_argument("--address", help="a Ray cluster whose node this machine is; default: this machine alone")
    parser.add_argument("--time-cases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time_cases:
        time_cases()
        return 0
    cluster.connect(options.address)
    try:
        return check(options.rounds)
    finally:
        cluster.disconnect()


def check(rounds: int) -> int:
    node = next((node for node in cluster.nodes() if node.gpus >= 2), None)
    if node is None:
        print("there is no node with two GPUs here; this check has not been made")
        return 2
    with tempfile.TemporaryDirectory(prefix="fpxbench-two-gpus-") as folder:
        timeline, build = Timeline(Path(folder) / "timeline"), installed_build()
        timeline.add([build])
        gpus = [Gpu(node, number) for number in range(2)]
        if gpus[0].device.kind != gpus[1].device.kind or gpus[0].device.index == gpus[1].device.index:
            print(f"these are not two equal GPUs: {gpus[0].device}, {gpus[1].device}")
            return 2
        spec = spec_for(timeline.find(build.key), gpus[0].device)
        say(f"{spec.tag} for {spec.variant}, key {spec.key}; this Python has {build.torch}, key {build.key}")
        say("both at once, as a fleet")
        for gpu, task in [(gpu, gpu.start(spec)) for gpu in gpus]:
            for record in gpu.records(task):
                us = f"{record.timing.median_us:9.2f} us" if record.timing else record.verdict.summary
                print(f"{gpu.device.label}  {record.case.id:50} both at once {us}")
    ratios = Ratios()
    for gpu, other in (gpus, gpus[::-1]):
        neighbour = Neighbour(other)
        try:
            say(f"{gpu.device.label}, the other one idle and busy by turns")
            by_turns(gpu, neighbour, rounds, ratios)
        finally:
            neighbour.end()
        print(f"{other.device.label} reached {statistics.median(neighbour.reached):.0f} TFLOP/s while it was busy")
    return report(gpus, ratios)


def report(gpus: list[Gpu], ratios: Ratios) -> int:
    """Print the ratios, and return the exit status."""
    worst = 0.0
    for (index, case), found in sorted(ratios.items()):
        middle, low, high = median_interval(found)
        worst = max(worst, abs(middle - 1))
        print(f"GPU {index}  {case:50} beside a busy neighbour {middle - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})")
    if ratios.keys() != {(gpu.device.index, case.id) for gpu in gpus for case in CASES}:
        print("not every case was timed on both GPUs")
        return 1
    print(f"{len(next(iter(ratios.values())))} pairs each; the largest difference is {worst:.2%}; allowed "
          f"{MOST_DIFFERENCE:.0%}")
    return int(worst > MOST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
