"""A planted slowdown and a planted crash, each found in the records, confirmed, and bisected to the right build, end to
end.

The builds are of a few kB and become the PyTorch that runs the tests (`small_index`); everything else is real: the
index, pip, the environments, the processes that measure.
"""

import json
import math
import os
import random
import sys

import commands
import pytest
from small_index import offline, write_torch

from fpxbench.builds.environments import Builds, Environments
from fpxbench.builds.timeline import Timeline
from fpxbench.records.case import Case
from fpxbench.records.store import Store
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome

# Six minutes on two idle cores: some hundred processes that each import PyTorch.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DAYS = [
    f"2026{month:02}{day:02}"
    for month, day in [*((10, day) for day in range(1, 32)), *((11, day) for day in range(1, 7))]
]
SLOW_SINCE, CRASHING_SINCE, UNINSTALLABLE = "20261103", "20261105", "20261102"
IMPLEMENTATIONS = '''
import ctypes
import time

import torch

from fpxbench.implementation import Implementation, Support, implementation


class AsTheBuildSays(Implementation):
    layout = "bytes"

    def supports(self, scheme, device):
        return Support.yes() if scheme.quantized else Support.no("quantized weights only")

    def matmul(self, x, weight):
        if self.name in torch.planted:
            self.suffer()
        return x @ weight.dequantize().to(x.dtype).T


@implementation("slowed")
class Slowed(AsTheBuildSays):
    """Sleeps where the build says so."""

    def suffer(self):
        time.sleep(0.01)


@implementation("crashing")
class Crashing(AsTheBuildSays):
    """Reads address 0 where the build says so."""

    def suffer(self):
        ctypes.string_at(0)
'''
SHAPE = {"scheme": "e4m3fn-row", "workload": "small", "m": 1, "n": 256, "k": 256}
SLOWED, CRASHING = (Case(implementation=name, **SHAPE) for name in ("slowed", "crashing"))


COMMON = ("--impls", "impls.py", "--machine", "here")
VARIANT = ("--variant", "cpu")


def tag(day):
    return f"nightly-{day}"


def git(day):
    return day * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a timeline of 37 nightlies, of which one does not install."""
    folder = tmp_path_factory.mktemp("planted")
    for day in DAYS:
        planted = " ".join(
            name for name, since in (("slowed", SLOW_SINCE), ("crashing", CRASHING_SINCE)) if day >= since
        )
        write_torch(folder / "index", f"2.15.0.dev{day}+cpu", git(day), planted,
                    requires=("nothing-is-called-this==99",) if day == UNINSTALLABLE else ())
    (folder / "impls.py").write_text(IMPLEMENTATIONS)
    (folder / "cases").write_text("".join(case.model_dump_json() + "\n" for case in (SLOWED, CRASHING)))
    done = fpxbench(folder, "timeline", "sync", "--index", str(folder / "index"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def recorded(folder):
    """Return records of all those nights: a real one for each of the two states that each implementation is in,
    repeated with the noise of 1% that a night brings. Two measurements of one state may differ by more, on a busy
    machine: each is made once."""
    real = {
        day: {record.case: record for record in measured(folder, day)}
        for day in ("20261101", SLOW_SINCE, CRASHING_SINCE)
    }
    rng, store = random.Random(0), Store(folder / "results")
    entries = {
        entry.date.replace("-", ""): entry
        for entry in Timeline(folder / ".timeline").entries()
        if entry.channel == "nightly"
    }
    for day in DAYS:
        if day == UNINSTALLABLE:
            continue
        for case, since in ((SLOWED, SLOW_SINCE), (CRASHING, CRASHING_SINCE)):
            record = real[since if day >= since else "20261101"][case]
            build = record.build.model_copy(
                update={
                    "torch": f"2.15.0.dev{day}+cpu",
                    "git": git(day),
                    "date": entries[day].date,
                    "key": entries[day].key,
                }
            )
            store.append(
                record.model_copy(update={"build": build, "timing": record.timing and noisy(record.timing, rng)})
            )
    return folder


def measured(folder, day):
    """Return the records of a build, by its own environment's Python."""
    builds = Builds(Timeline(folder / ".timeline"), Environments(folder / ".asv/env"), folder / "results",
                    variant="cpu", machine="here")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline(folder).items():
            patch.setenv(name, value)
        with builds.interpreter(builds.timeline.find(tag(day))) as interpreter:
            done = fpxbench(
                folder, "run", "--cases", "cases", *COMMON, "--results", f"of-{day}", python=interpreter.python
            )
    assert done.returncode == 0, done.stderr
    return Store(folder / f"of-{day}").read_all()[0]


def noisy(timing, rng):
    factor, dense = math.exp(rng.gauss(0, 0.01)), math.exp(rng.gauss(0, 0.01))
    return timing.model_copy(
        update={
            "samples_us": [us * factor for us in timing.samples_us],
            "median_us": timing.median_us * factor,
            "ci95_us": tuple(us * factor for us in timing.ci95_us),
            "baseline_us": timing.baseline_us * dense,
            "speedup": timing.speedup * dense / factor,
        }
    )


ONE_THREAD = {"OMP_NUM_THREADS": "1"}       # on a busy machine, threads that wait for each other hide the slowdown


def fpxbench(folder, *arguments, python=sys.executable):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FPX_", "PIP_", "UV_"))}
    return commands.fpxbench(*arguments, python=python, cwd=folder, env=own | offline(folder) | ONE_THREAD)


@pytest.mark.slow_core
def test_a_record_is_of_the_build_whose_interpreter_ran_it(folder):
    """The build recorded is not that of the process that asked."""
    records = measured(folder, CRASHING_SINCE)
    assert {record.build.torch for record in records} == {f"2.15.0.dev{CRASHING_SINCE}+cpu"}
    assert {record.case.implementation: record.verdict.status for record in records} == {
        "slowed": "ok",
        "crashing": "crash",
    }


def test_the_crash_is_found_confirmed_and_bisected(recorded):
    found = json.loads(fpxbench(recorded, "regressions", "--all", "--json").stdout)
    (event,) = [event for event in found["events"] if event["series"]["metric"] == "verdict"]
    assert (event["series"]["case"], event["first_bad_tag"]) == (CRASHING.id, tag(CRASHING_SINCE))

    done = fpxbench(recorded, "confirm", event["id"], *COMMON, *VARIANT)
    assert done.returncode == 1, done.stdout + done.stderr    # a regression was confirmed
    (kept,) = Store(recorded / "results", Confirmation).read_all()[0]
    assert kept.outcome is ConfirmationOutcome.CONFIRMED and (kept.good_counts, kept.bad_counts) == (
        {"ok": 5},
        {"crash": 5},
    )

    done = fpxbench(recorded, "bisect", CRASHING.id, tag("20261030"), tag("20261106"), *COMMON, *VARIANT, "--json")
    assert done.returncode == 0, done.stderr
    bisection = json.loads(done.stdout)
    assert (bisection["by"], bisection["last_good_tag"], bisection["first_bad_tag"], bisection["maybe"]) == (
        "verdict", tag("20261104"), tag(CRASHING_SINCE), [])
    assert bisection["first_bad"]["git"] == git(CRASHING_SINCE)

    text = fpxbench(recorded, "issues").stdout
    assert (
        f"crash since 2.15.0.dev{CRASHING_SINCE}" in text
        and f"compare/{git('20261104')}...{git(CRASHING_SINCE)}" in text
    )


def test_the_slowdown_is_found_confirmed_and_bisected_up_to_the_build_that_does_not_install(recorded):
    found = json.loads(fpxbench(recorded, "regressions", "--json").stdout)
    (suspect,) = found["suspects"]
    assert (suspect["series"]["case"], suspect["first_bad_tag"], suspect["direction"]) == (
        SLOWED.id, tag(SLOW_SINCE), "worse"
    )

    done = fpxbench(recorded, "confirm", suspect["id"], *COMMON, *VARIANT, "--level", "0.95")
    assert done.returncode == 1, done.stdout + done.stderr
    (kept,) = [
        each for each in Store(recorded / "results", Confirmation).read_all()[0] if each.suspect == suspect["id"]
    ]
    assert kept.outcome is ConfirmationOutcome.CONFIRMED and kept.time.low > 1

    done = fpxbench(recorded, "bisect", SLOWED.id, tag("20261031"), tag("20261104"), *COMMON, *VARIANT, "--json")
    assert done.returncode == 0, done.stderr
    bisection = json.loads(done.stdout)
    assert (bisection["by"], bisection["last_good_tag"], bisection["first_bad_tag"], bisection["maybe"]) == (
        "time", tag("20261101"), tag(SLOW_SINCE), [tag(UNINSTALLABLE)])
