"""Check that two equal GPUs of one machine do not disturb each other: a case timed alone, and beside a busy neighbour.

Run it on a machine with two GPUs, from a checkout: ``python tools/two_gpus.py``. It starts a local fleet, so that what
is checked is what a fleet does: one task on each GPU, each with its share of the cores.

1. Both GPUs run the same task at once, as a fleet's do. What has to be compiled is compiled here.
2. Each times the cases alone, and then while a process multiplies matrices on the other one without a pause; what that
   one reached is printed, so that a neighbour which was idle shows.
3. For each case and GPU the median beside the busy neighbour must lie within 2% of the one alone.

What runs is printed on stderr, with the last line that the sweep wrote. A sweep imports PyTorch and every
implementation before it times anything; a round has four of them, one after the other. With ``--within S`` no round
begins that would not end within S seconds of the start; the first always runs.

Exit status: 0; 1 if a case differs by more; 2 if there are not two equal GPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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

MOST_DIFFERENCE = 0.02
FLEET = "two-gpus"
PROGRESS_EVERY_S = 5.0
_BEGAN = time.monotonic()
SHAPES = {"llama2-7b.o": (4096, 4096), "llama3-8b.down": (4096, 14336)}
CASES = [Case(implementation=name, scheme=scheme, workload=workload, m=1, n=n, k=k)
         for name, scheme in (("dense", "bf16"), ("triton_fused", "e4m3fn-row")) for workload, (n, k) in SHAPES.items()]

Times = dict[tuple[int, str], list[float]]
"""Microseconds, by the GPU's index and the case."""

LOAD = """
import time, torch
size, calls = 8192, 20
a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
c = a @ b
torch.cuda.synchronize()
while True:
    began = time.perf_counter()
    for _ in range(calls):
        torch.mm(a, b, out=c)
    torch.cuda.synchronize()
    print(f"{calls * 2e-12 * size ** 3 / (time.perf_counter() - began):.0f}", flush=True)
"""
"""What keeps the neighbour busy. It prints the TFLOP/s of the last 20 products."""


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


@contextmanager
def busy(gpu: Gpu) -> Iterator[None]:
    """Keep a GPU and a core of its share busy. Exit if it was not."""
    cores = share(sorted(os.sched_getaffinity(0)), gpu.number, 2)
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), ",".join(map(str, cores)),
               sys.executable, "-c", LOAD]
    with tempfile.TemporaryFile("w+") as output:
        visible = {"CUDA_VISIBLE_DEVICES": gpu.device.uuid or str(gpu.device.index)}
        process = subprocess.Popen(command, stdout=output, env=os.environ | visible)
        try:
            while process.poll() is None and not reached(output):
                time.sleep(0.1)
            if process.poll() is None:
                yield
            ended = process.poll()
        finally:
            process.kill()
            process.wait()
        found = reached(output)
    if ended is not None:
        sys.exit(f"{gpu.device.label} was not kept busy: the load ended with exit status {ended}")
    say(f"{gpu.device.label} reached {statistics.median(found):.0f} TFLOP/s meanwhile, {min(found):.0f} at the least")


def reached(output: IO[str]) -> list[float]:
    output.seek(0)
    return [float(line) for line in output.read().split("\n")[:-1]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="at most; medians are compared")
    parser.add_argument("--within", type=float, default=float("inf"), metavar="S", help="seconds for all rounds")
    parser.add_argument("--address", help="a Ray cluster whose node this machine is; default: this machine alone")
    options = parser.parse_args()
    cluster.connect(options.address)
    try:
        return check(options.rounds, options.within)
    finally:
        cluster.disconnect()


def check(rounds: int, within_s: float) -> int:
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
        together, alone, beside = Times(), Times(), Times()
        for gpu, task in [(gpu, gpu.start(spec)) for gpu in gpus]:
            collect(together, gpu, gpu.records(task))
        for number in range(1, rounds + 1):
            began = time.monotonic()
            for gpu, neighbour in (gpus, gpus[::-1]):
                say(f"round {number}: {gpu.device.label}, the other one idle")
                collect(alone, gpu, gpu.records(gpu.start(spec)))
                say(f"round {number}: {gpu.device.label}, the other one busy")
                with busy(neighbour):
                    collect(beside, gpu, gpu.records(gpu.start(spec)))
            if 2 * time.monotonic() - began - _BEGAN > within_s:
                break
    return report(gpus, alone, beside, together)


def collect(times: Times, gpu: Gpu, records: list[Record]) -> None:
    for record in records:
        if record.timing is not None:
            times.setdefault((gpu.device.index, record.case.id), []).append(record.timing.median_us)


def report(gpus: list[Gpu], alone: Times, beside: Times, together: Times) -> int:
    worst = 0.0
    for key in sorted(alone.keys() & beside.keys()):
        quiet, loaded = statistics.median(alone[key]), statistics.median(beside[key])
        worst = max(worst, abs(loaded / quiet - 1))
        at_once = "".join(f"  both at once {us:9.2f} us  {us / quiet - 1:+.2%}" for us in together.get(key, ()))
        print(f"GPU {key[0]}  {key[1]:50} alone {quiet:9.2f} us  beside {loaded:9.2f} us  {loaded / quiet - 1:+.2%}"
              f"{at_once}")
    if not alone or alone.keys() != beside.keys():
        print("not every case was timed in both arrangements")
        return 1
    for case in sorted({case for _, case in alone}):
        one, two = (statistics.median(alone[gpu.device.index, case]) for gpu in gpus)
        print(f"spread  {case:50} {max(one, two) / min(one, two) - 1:.2%} between the two GPUs")
    print(f"{len(next(iter(alone.values())))} of each; the largest difference is {worst:.2%}; allowed "
          f"{MOST_DIFFERENCE:.0%}")
    return int(worst > MOST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
