"""Small sweeps of implementations that a test writes."""

import os
import subprocess
import sys

from fpxbench.records.store import Store
from fpxbench.sweep.settings import Settings

RIGHT = '''
import os, time
import torch.nn.functional as F
from fpxbench.implementation import Implementation, Support, implementation

@implementation("NAME")
class Swept(Implementation):
    """Decodes the weight, then multiplies."""

    def supports(self, scheme, device):
        return Support.no("takes no FP4") if scheme.name == "mxfp4" else Support.yes()

    def matmul(self, x, weight):
        PROLOGUE
        return F.linear(x, weight.dequantize().to(x.dtype))
'''
SCHEMES = ("e4m3fn-row", "e3m2-row", "mxfp4")


def write(folder, name, prologue="pass"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(RIGHT.replace("NAME", name).replace("PROLOGUE", prologue))
    return folder


def settings(results, impls, **more):
    return Settings(
        **{
            "results": results,
            "impls": (impls,),
            "implementation": ("swept_*",),
            "scheme": SCHEMES,
            "workload": ("canary.seed",),
            "device": "cpu",
            "machine": "here",
            "seed": 1,
            "profile": "smoke",      # the least checks: what is swept is right, or ends its process
            "timing_budget_s": 0.0,
            **more,
        }
    )


def verdicts(records):
    return {record.case.id.removesuffix("/canary.seed/m1/bf16"): record.verdict.status for record in records}


def lines(results):
    return [record.case.id for record in Store(results).read_all()[0]]


SCRIPT = """
import sys
from fpxbench.sweep.settings import Settings
from fpxbench.sweep.run import main_sweep
done = main_sweep(Settings.model_validate_json(sys.argv[1]))
print(len(done.records), done.resumed, done.interrupted)
"""


def start(chosen, **environment):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, chosen.model_dump_json()], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | environment)
