"""Builds that install at once and measure nothing: environments whose Python is a script that writes records.

What a node runs for a build is that script and nothing else; everything around it is real.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

from sample_records import case, record

from fpxbench.builds.environments import EnvironmentSpec, EnvironmentState
from fpxbench.builds.environments.shared_packages import fingerprint
from fpxbench.builds.timeline import Entry, Timeline, commit_hash
from fpxbench.fleet.builds import spec_for
from fpxbench.fleet.fleet_messages import Device
from fpxbench.records.case import Case
from fpxbench.records.record import Build
from fpxbench.sweep.plan import Plan, Planned

CPU = Device(kind="cpu", type="cpu", name="a CPU", node="n")

SCRIPT = '''#!{python} -IS
import json, os, signal, sys, time
from pathlib import Path

here = Path(__file__).resolve().parent
how = json.loads((here / "how.json").read_text())
arguments = sys.argv[1:]
if "--plan" in arguments:
    sys.stdin.read()
    if how.get("refuses_to_plan"):
        sys.exit(how["refuses_to_plan"])
    print((here / "plan.json").read_text())
    sys.exit(0)
option = lambda name: arguments[arguments.index(name) + 1]
folder = Path(option("--results")) / option("--machine") / "records"
folder.mkdir(parents=True)
template = (here / "record.json").read_text()
log = os.open(here.parent.parent.parent / "measured.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
if how.get("full_on", "nowhere") in str(folder):
    print("OSError: [Errno 28] No space left on device", file=sys.stderr)
    sys.exit(1)
if how.get("message"):
    print(how["message"], file=sys.stderr)
with open(folder / how["file"], "ab", buffering=0) as out:
    for number, line in enumerate(Path(option("--cases")).read_text().splitlines()):
        case = json.loads(line)
        if case["id"] == how.get("kills"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == how.get("ends_after", -1):
            sys.exit(how.get("status", 1))
        time.sleep(how.get("seconds", 0.0))
        started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        text = template.replace('"CASE"', line).replace("MACHINE", option("--machine")).replace("STARTED", started)
        out.write(text.replace('"SEED"', str(os.getpid() * 100000 + number)).encode() + b"\\n")
        os.write(log, (case["id"] + " " + option("--machine") + " " + str(here.parent.parent.name) + "\\n").encode())
'''


class FakeBuilds:
    """Releases ``1.0.0``, ``1.1.0``, … on a timeline, each with an environment under `environments`."""

    numbers = itertools.count(1)
    """Of the first release: two timelines that share environments have no build in common."""

    def __init__(self, root: Path, count: int, cases: int, environments: Path | None = None, **how: object) -> None:
        self.root, self.environments = root, environments or root / "environments"
        major = next(self.numbers)
        self.timeline = Timeline(root / "timeline")
        self.timeline.add([
            Build(torch=f"{major}.{number}.0", channel="release", variant="cpu", date=f"2026-01-{number + 1:02d}")
            for number in range(count)
        ])
        self.entries: list[Entry] = self.timeline.entries()
        self.cases = [case(workload=f"layer{number}.o", m=1) for number in range(cases)]
        for entry in self.entries:
            self.make(entry, how)

    def spec(self, entry: Entry) -> EnvironmentSpec:
        return spec_for(entry, CPU)

    def build(self, entry: Entry) -> Build:
        """Return the build as its environment has it."""
        return Build(torch=f"{entry.torch}+cpu", channel="release", variant="cpu", date=entry.date,
                     key=commit_hash(entry))

    def folder(self, entry: Entry) -> Path:
        return self.environments / self.spec(entry).name

    def make(self, entry: Entry, how: dict[str, object]) -> None:
        folder, build = self.folder(entry), self.build(entry)
        (folder / "venv/bin").mkdir(parents=True, exist_ok=True)
        state = EnvironmentState(spec=self.spec(entry), status="ready", build=build, installer="pip",
                                 shared=fingerprint())
        (folder / "environment.json").write_text(state.model_dump_json(by_alias=True))
        python = folder / "venv/bin/python"
        python.write_text(SCRIPT.format(python=os.path.realpath(sys.executable)))
        python.chmod(0o755)
        self.behave(entry, **how)
        plan = Plan(device="cpu", cases=[Planned(case=each) for each in self.cases],
                    sources={"triton_fused": "0123456789ab"})
        (folder / "venv/bin/plan.json").write_text(plan.model_dump_json())
        one = record(self.cases[0], build=build, speedup=2.0 if how.get("timed") else None)
        one = one.model_copy(update={"started_at": "STARTED"})
        line = json.loads(one.to_json()) | {"case": "CASE", "seed": "SEED"}
        line["machine"] = line["machine"] | {"name": "MACHINE"}
        (folder / "venv/bin/record.json").write_text(json.dumps(line))

    def behave(self, entry: Entry, **how: object) -> None:
        """Change what an environment's Python does."""
        how = {"file": f"{self.build(entry).stem}.jsonl"} | how
        (self.folder(entry) / "venv/bin/how.json").write_text(json.dumps(how))

    def measured(self) -> Counter[str]:
        """How often each (case, machine, environment) was measured, stored or not."""
        log = self.environments / "measured.log"
        own = {self.folder(entry).name for entry in self.entries}
        lines = log.read_text().splitlines() if log.exists() else []
        return Counter(line for line in lines if line.split()[2] in own)


def ids(cases: list[Case]) -> list[str]:
    return [each.id for each in cases]
