"""Identify a worker's device without PyTorch: by nvidia-smi, else by Ray's accelerator type."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter

from fpxbench.checking.device_names import cpu_model, cpu_name, slug
from fpxbench.fleet.fleet_messages import Device, Seat

_ANSWER_WITHIN_S = 30.0


def device_of(seat: Seat, accelerator_id: str = "") -> Device:
    """Return the device of `seat`. accelerator_id : index or UUID of the GPU that Ray reserved."""
    node = platform.node()
    if seat.device == "cpu":
        return Device(kind=seat.machine or cpu_name(), type="cpu", name=cpu_model(), node=node)
    index, uuid, name = _nvidia(accelerator_id)
    if not name:
        name = seat.accelerator_type or "GPU"
        index = int(accelerator_id) if accelerator_id.isdecimal() else 0
    return Device(kind=seat.machine or slug(name), type="cuda", name=name, node=node, index=index, uuid=uuid)


def kinds_here(gpus: int, machine: str | None, accelerator_type: str) -> str:
    """Return the kinds of a node's devices, as in the results: ``nvidia-h200 ×8``, or the CPU's if it has no GPU."""
    seat = Seat(fleet="none", device="cuda" if gpus else "cpu", machine=machine, accelerator_type=accelerator_type)
    counts = Counter(device_of(seat, str(number)).kind for number in range(gpus or 1))
    return ", ".join(f"{kind} ×{count}" if gpus else kind for kind, count in counts.items())


def _nvidia(accelerator_id: str) -> tuple[int, str, str]:
    """Return index, UUID and name of a GPU; an empty name if there is no driver, or no such GPU."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader", f"--id={accelerator_id or 0}"]
    # nvidia-smi lists every GPU, whatever CUDA_VISIBLE_DEVICES says.
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        return 0, "", ""
    fields = [field.strip() for field in done.stdout.partition("\n")[0].split(",", 2)]
    if done.returncode or len(fields) != 3 or not fields[0].isdecimal():
        return 0, "", ""
    return int(fields[0]), fields[1], fields[2]
