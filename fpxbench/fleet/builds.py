"""Choose the builds that a fleet measures, and the variant of each for a device."""

from __future__ import annotations

import re

from fpxbench.builds.environments.specification import EnvironmentSpec, environment_spec
from fpxbench.builds.timeline import Entry, Timeline
from fpxbench.builds.timeline.entry import DEFAULT_VARIANT
from fpxbench.fleet.fleet_messages import Device

MOST_BUILDS = 1000


def builds_named(text: str, timeline: Timeline) -> list[Entry]:
    """Return the builds of ``2.13.0..2.15.0,nightly``, in the timeline's order.

    ``A..B`` is all builds from A to B of A's channel; ``A..`` ends with the newest. Raise ValueError for a range
    without a build, TimelineError for an unknown name.
    """
    entries = timeline.entries()
    place = {entry.key: number for number, entry in enumerate(entries)}
    chosen: dict[str, Entry] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dots, last = part.partition("..")
        if not dots:
            found = [timeline.find(part)]
        else:
            start = timeline.find(first)
            end = timeline.find(last) if last else None
            found = [entry for entry in entries if entry.channel == start.channel
                     and place[start.key] <= place[entry.key] and (end is None or place[entry.key] <= place[end.key])]
            if not found:
                raise ValueError(f"--builds {part}: {first} comes after {last} on the timeline")
        chosen |= {entry.key: entry for entry in found}
    if not chosen:
        raise ValueError(f"--builds {text!r}: names of builds or ranges A..B, as `fpxbench timeline list` shows them")
    if len(chosen) > MOST_BUILDS:
        raise ValueError(f"--builds {text}: {len(chosen)} builds; at most {MOST_BUILDS} in one run")
    return sorted(chosen.values(), key=lambda entry: place[entry.key])


def spec_for(entry: Entry, device: Device, variants: tuple[str, ...] = ()) -> EnvironmentSpec:
    """Return the environment of `entry` for `device`. Raise NotOffered where no index has it.

    variants : the requested ones; the first that fits the device is used. If none fits: ``cpu`` for a CPU; for a GPU
    pip's default, or the newest for its vendor.
    """
    family = "cpu" if device.type == "cpu" else "rocm" if re.match("amd|radeon", device.name, re.I) else "cu"
    fitting = [name for name in variants if _family(name) == family or name == DEFAULT_VARIANT]
    if fitting:
        return environment_spec(entry, fitting[0])
    offered = [name for name in entry.variants if _family(name) == family]
    pip_has_it = DEFAULT_VARIANT in entry.variants and family == "cu"
    return environment_spec(entry, None if pip_has_it or not offered else max(offered, key=_version))


def _family(variant: str) -> str:
    return re.sub(r"[\d.]+$", "", variant)


def _version(variant: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", variant))
