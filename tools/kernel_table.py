"""Write the table of speedups in docs/kernels.md from records, or the cases that it needs.

    python tools/kernel_table.py --cases triton_fused > cases.jsonl
    fpxbench run --cases cases.jsonl --results RESULTS
    python tools/kernel_table.py [--results RESULTS]

Cases come in the order in which they matter: a run may be ended early. By default the records are those of
reports/samples. With ``--check``, fail if the page is stale.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import docs_page

from fpxbench.records.record import Record
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status
from fpxbench.workloads import workloads

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
LAYERS = ("llama3-70b.gate_up.tp2", "llama3-8b.gate_up", "llama3-70b.qkv", "llama3-8b.down", "llama3-8b.qkv",
          "llama3-8b.o")
SCHEMES = ("e4m3fn-row", "e3m2-row", "mxfp4", "nvfp4")
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
IMPORTANT = (1, 16, 4, 64, 8, 512, 2, 4096)
OURS, PEER = "triton_fused", "humming"

Found = dict[tuple[str, str, str, int], Record]
"""Records by implementation, scheme, layer and M."""


def cases(implementation: str) -> list[str]:
    """Return the table's cases of an implementation, as lines of JSON for ``fpxbench run --cases``."""
    layers = workloads((2,))
    return [layers[layer].case(implementation, scheme, m).model_dump_json(by_alias=True)
            for m in IMPORTANT for layer in LAYERS for scheme in SCHEMES]


def records_of(results: Path) -> Found:
    """Return the newest right and timed records of the table's cases. Raise SystemExit if there is none, or if they are
    of GPUs that differ."""
    found = {}
    for record in latest(Store(results).read_all()[0]):
        case, timing = record.case, record.timing
        if record.machine.kind == "cuda" and record.verdict.status is Status.OK and timing and timing.baseline_us and (
                case.workload in LAYERS and case.scheme in SCHEMES and case.activation == "bf16"):
            found[case.implementation, case.scheme, case.workload, case.m] = record
    if not any(key[0] == OURS for key in found):
        sys.exit(f"{results} holds no right and timed records of {OURS} on a GPU: run the cases of --cases {OURS}")
    devices = sorted({record.machine.device for record in found.values()})
    if len(devices) > 1:
        sys.exit(f"{results} holds records of {' and '.join(devices)}: a table is of one GPU")
    return found


def markdown(found: Found) -> str:
    """Return the table: for each layer the time of the dense product, then speedups, the peer's in brackets."""
    lines = ["| N × K | " + " | ".join(f"M = {m}" if m == 1 else str(m) for m in TOKENS) + " |",
             "|---|" + "---|" * len(TOKENS)]
    for layer in LAYERS:
        own = [(key, record) for key, record in found.items() if key[0] == OURS and key[2] == layer]
        if not own:
            continue
        case = own[0][1].case
        dense = [[record.timing.baseline_us for key, record in own if key[3] == m] for m in TOKENS]
        lines.append(f"| **{case.n} × {case.k}**, dense, µs | "
                     + " | ".join(f"{median(times):.4g}" if times else "" for times in dense) + " |")
        lines += [f"| `{scheme}` | " + " | ".join(cell(found, scheme, layer, m) for m in TOKENS) + " |"
                  for scheme in SCHEMES]
    return "\n".join(lines)


def cell(found: Found, scheme: str, layer: str, m: int) -> str:
    """Return our speedup over the dense product, and the peer's in brackets; "" where there is none."""
    ours, peer = (speedup(found.get((implementation, scheme, layer, m))) for implementation in (OURS, PEER))
    return f"{ours} ({peer})" if ours and peer else ours or (f"({peer})" if peer else "")


def speedup(record: Record | None) -> str:
    return f"{record.timing.speedup:.2f}" if record is not None else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="IMPLEMENTATION", help="print the table's cases instead")
    parser.add_argument("--results", type=Path, default=ROOT / "reports" / "samples")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    if asked.cases:
        print("\n".join(cases(asked.cases)))
        return 0
    return docs_page.write(PAGE, {"speedups": markdown(records_of(asked.results))}, __file__, check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
