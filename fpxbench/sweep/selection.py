"""Which cases a sweep has: profiles and globs over implementations, schemes and workloads."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_args

from fpxbench.checking.machine import default_device
from fpxbench.did_you_mean import did_you_mean
from fpxbench.implementation import (
    Implementation,
    LoadFailure,
    Support,
    discover,
    no_implementation,
    source_digest,
    summary,
)
from fpxbench.numbers.scheme import SCHEMES, Scheme, scheme_named
from fpxbench.records.case import Activation, Case
from fpxbench.records.store import first_mistake
from fpxbench.sweep.file_cases import cases_of_files, with_activations
from fpxbench.sweep.plan import Plan, Planned, stage
from fpxbench.sweep.settings import Settings
from fpxbench.workloads import CANARIES, is_from_file, workloads


class _Block(NamedTuple):
    """Schemes × layers; a profile is several of them."""

    schemes: tuple[str, ...]
    layers: tuple[str, ...]
    """Globs over ``workload/mM``."""
    activations: tuple[Activation, ...] = ("bf16",)
    spared: tuple[str, ...] = ()
    """Globs over implementations that the block leaves out."""


_ALL = ("*",)
_EACH_KIND = ("int8-row", "e4m3fn-row", "e3m2-g128", "nvfp4")
_VARIANTS = ("e4m3fn-b128x128", "mxfp4.rceil", "nf4-g64", "e4m3fn-row+e4m3fn-row")
"""Blocks in two dimensions, another rounding of scales, a list of values, quantized activations."""
_FEW = ("bf16", "int8-row", "e4m3fn-row", "e4m3fnuz-row", "e3m2-row", "mxfp4")
_CANARIES = tuple(f"{canary.name}/*" for canary in CANARIES
                  if canary.experts is None and canary.name != "canary.blocks")
_BLOCKS = ("e4m3fn-b128x128", "e4m3fn-b128x128+e4m3fn-g128")

_COMPILED = ("cpu_fused", "compiled_*")
"""A case of these takes a CPU five seconds: the compiler runs for each shape and scheme."""

PROFILES: dict[tuple[str, str], tuple[_Block, ...]] = {
    ("smoke", "cpu"): (_Block(("e4m3fn-row", "e4m3fnuz-row", "mxfp4"), ("canary.codes/m1",)),
                       _Block(("mxfp4", "nvfp4"), ("canary.scales/m1",)),
                       _Block(("mxfp4", "nvfp4"), ("canary.values/m6",)),
                       _Block(("bf16", "int8-row", "e4m3fn-row"), ("llama3-8b.k/m1",))),
    ("smoke", "cuda"): (_Block(("e4m3fn-row", "mxfp4"), ("canary.experts.empty/m9",)),
                        _Block(_FEW, ("canary.codes/m1", "canary.ragged/*", "llama3-8b.k/m1")),
                        _Block((*_FEW[1:], "nvfp4"), ("canary.values/m6", "canary.scales/m1"))),
    # On a CPU: what two cores take in minutes. Every scheme is checked on all its codes; what compiles is spared most
    # of the rest.
    ("quick", "cpu"): (_Block(("e5m2-row", "e4m3fnuz-row"), ("canary.seed/m1",)), _Block(_ALL, ("canary.codes/m1",)),
                       _Block(("mxfp4", "nvfp4"), ("canary.values/m6", "canary.scales/m1")),
                       _Block(_EACH_KIND, ("canary.values/m6", "canary.scales/m1"), spared=_COMPILED),
                       _Block(("e4m3fn-row",), ("canary.ragged/m33",)),
                       _Block(_EACH_KIND, ("canary.ragged/m33",), spared=_COMPILED),
                       _Block(("e4m3fn-row", "nvfp4"), ("canary.ragged/m3",)), _Block(_VARIANTS, ("canary.codes/m1",)),
                       _Block(("e4m3fn-b128x128", "e4m3fn-row+e4m3fn-row"), ("canary.ragged/m3",)),
                       _Block(_BLOCKS, ("canary.blocks/m4",)), _Block(("mxfp4",), ("canary.experts.skewed/*",)),
                       _Block(("e4m3fn-row", "mxfp4"), ("canary.experts.*",), spared=_COMPILED),
                       _Block((*_FEW, "e5m2-row", "e5m2fnuz-row", "nvfp4"), ("llama3-8b.k/m1",)),
                       _Block(("bf16", "int8-row", "e4m3fn-row"), ("llama2-7b.o/m1",)),
                       _Block(("bf16", "int8-row", "e4m3fn-row", "mxfp4"), ("llama3-8b.k/m16",))),
    ("quick", "cuda"): (_Block(_ALL, (*_CANARIES, "llama2-7b.o/m1", "llama3-8b.down/m1", "llama3-8b.down/m16")),
                        _Block(_VARIANTS, (*_CANARIES, "llama2-7b.o/m16")), _Block(_BLOCKS, ("canary.blocks/m4",)),
                        _Block(("e4m3fn-row", "mxfp4", "nvfp4"), ("canary.experts.*",)),
                        _Block(("mxfp4",), ("gpt-oss-20b.experts_gate_up.*/m1", "gpt-oss-20b.experts_gate_up.*/m64")),
                        _Block((*_FEW, "nvfp4"), ("llama2-7b.gate_up/m1", "llama2-7b.o/m512")),
                        _Block(_FEW[1:], ("canary.codes/m1", "llama2-7b.o/m1"), ("fp16",))),
    ("full", "cpu"): (_Block((*_ALL, *_VARIANTS), _ALL, ("bf16", "fp16")),),
    ("full", "cuda"): (_Block((*_ALL, *_VARIANTS), _ALL, ("bf16", "fp16")),),
}


def make_plan(settings: Settings) -> Plan:
    """Return the cases that `settings` select. Imports torch and every implementation.

    Raises ValueError for a glob or name that selects nothing, naming the nearest ones.
    """
    device = settings.device or default_device()
    known, failures = discover(settings.impls)
    if settings.cases is not None:
        planned = {case.id: _listed(case, known, device) for case in _cases_in(settings.cases)}
        names = [name for name in known if any(each.case.implementation == name for each in planned.values())]
    else:
        names = _select_implementations(settings.implementation or _ALL, known, failures)
        if settings.checkpoint is not None or settings.weights is not None:
            schemes = _select_schemes(settings.scheme)
            planned = cases_of_files(settings, device, [known[name] for name in names], schemes)
        elif settings.layer:
            raise ValueError("--layer chooses layers of a checkpoint: give --checkpoint PATH too")
        else:
            planned = _selected(settings, device, known, names)
    if settings.activations is not None:
        planned = with_activations(planned, settings.activations)
    left_out: dict[str, str] = {}
    if settings.cases is None:
        planned = without_repeated_refusals(planned)
        if not settings.implementation:
            left_out = _nothing_to_do({name: known[name] for name in names}, planned.values(), device)
            planned = {case: each for case, each in planned.items() if each.case.implementation not in left_out}
    return Plan(
        device=device, cases=list(planned.values()), left_out=[f"{name}: {why}" for name, why in left_out.items()],
        about={name: summary(known[name]) for name in names},
        sources={name: source_digest(name) for name in names}, not_loaded=[f"{f.path}: {f.error}" for f in failures],
    )


def _cases_in(path: Path) -> list[Case]:
    """Return the cases in a file, a JSON object a line.

    Raise ValueError for a line that is no case, with its number, and for a file that cannot be read or has no case.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"--cases {path}: {error.strerror}") from None
    cases = []
    for number, line in enumerate(lines, 1):
        try:
            cases.append(Case.model_validate_json(line))
        except ValueError as error:
            raise ValueError(
                f"--cases {path}:{number}: no case as `fpxbench records | jq -c .case` prints them: "
                f"{first_mistake(error)}"
            ) from None
    if not cases:
        raise ValueError(f"--cases {path}: there is no case in it")
    return cases


def _listed(case: Case, known: dict[str, type[Implementation]], device: str) -> Planned:
    """Return the plan of a case that was asked for by name: one too large for its implementation is refused, not left
    out."""
    if case.implementation not in known:    # the trial says what could not be loaded
        return Planned(case=case)
    if is_from_file(case.workload):
        return Planned(case=case, refused=f"the weight of {case.workload} is a file's, which a list of cases does not "
                                          "hold: --checkpoint or --weights gives it")
    support = _asked(known[case.implementation], scheme_named(case.scheme), device, case.rows * case.n * case.k)
    if support is None:
        return Planned(case=case, refused=f"{case.implementation} takes no case of this size on {device}")
    return Planned(case=case, refused=support.reason, missing=support.missing)


def _selected(
    settings: Settings, device: str, known: dict[str, type[Implementation]], names: list[str]
) -> dict[str, Planned]:
    """Return the cases of the profile and the globs, by id."""
    in_globs = (int(size) for glob in settings.workload for size in re.findall(r"\.tp([1-9]\d{0,3})", glob))
    ranks = tuple(sorted({*settings.tp, *in_globs}))
    layers = {f"{w.name}/m{m}": (w, m) for w in workloads(ranks).values() for m in w.m}

    planned: dict[str, Planned] = {}
    answers = cache(lambda name, scheme: _answer(known[name], scheme, device))      # one for all layers
    for block in _blocks(settings, device, list(layers)):
        asked = [name for name in names if not any(fnmatchcase(name, glob) for glob in block.spared)]
        # Grouped by layer and scheme, so that what shares inputs runs together and a baseline stands near its rivals.
        for layer in _select(block.layers, layers, "workload"):
            workload, m = layers[layer]
            case = workload.case(names[0], "bf16", m)       # each has these rows and experts
            elements = case.rows * workload.n * workload.k
            for scheme_name in _select_schemes(block.schemes):
                scheme = scheme_named(scheme_name)
                for name in asked:
                    support, limit = answers(name, scheme)
                    if limit is not None and elements > limit:
                        continue
                    if known[name].experts_only and case.experts is None:
                        continue    # nor that a grouped product takes no single weight
                    if not support.supported and (known[name].baseline or not scheme.quantized):
                        continue    # that a dense product takes no quantized weight, and the reverse, is no finding
                    if scheme.activation is not None and not known[name].quantizes_activations:
                        continue    # nor that a weight-only product quantizes no activation
                    # A dense scheme is the activation's own dtype.
                    for activation in block.activations:
                        if not scheme.quantized and activation != scheme_name:
                            continue
                        case = workload.case(name, scheme_name, m, activation)
                        planned.setdefault(case.id, Planned(case=case, refused=support.reason, missing=support.missing))
    planned = dict(sorted(planned.items(), key=_by_evidence(planned.values())))
    if not planned:
        raise ValueError(
            f"nothing to run on {device}: {', '.join(names)} takes none of these schemes and shapes"
            + (" (Triton's interpreter takes small shapes only)" if device == "cpu" else "")
        )
    return planned


def _by_evidence(planned: Iterable[Planned]) -> Callable[[tuple[str, Planned]], tuple]:
    """Return the sort key of cases by what they tell: canaries, a first layer at M = 1, other layers at M = 1, and the
    rest; otherwise in the order given.

    A sweep that is looked at before its end has then something of every implementation and scheme.
    """
    places = {layer: number for number, layer in enumerate(dict.fromkeys(
        (each.case.workload, each.case.m) for each in planned))}

    def key(item: tuple[str, Planned]) -> tuple:
        case = item[1].case
        return stage(case), places[case.workload, case.m]

    return key


REFUSED_ON = "canary.codes"
"""The workload that stands for all on which a scheme is refused: every profile has it, so that the case is the same in
each."""


def without_repeated_refusals(planned: dict[str, Planned]) -> dict[str, Planned]:
    """Return the cases that run, and of those that will be refused one for each implementation, scheme and reason: what
    is refused on one layer is refused on all."""
    refusals: dict[tuple[str, str, str], Planned] = {}
    for each in planned.values():
        key = each.case.implementation, each.case.scheme, each.refused
        if each.refused and (key not in refusals or each.case.workload == REFUSED_ON != refusals[key].case.workload):
            refusals[key] = each
    kept = {each.case.id for each in refusals.values()}
    return {name: each for name, each in planned.items() if not each.refused or name in kept}


def _nothing_to_do(classes: dict[str, type[Implementation]], planned: Iterable[Planned],
                   device: str) -> dict[str, str]:
    """Return the implementations that this device leaves nothing to do, with the reason: the device itself is refused,
    or the device is a CPU beside a GPU, which an interpreter stands in for."""
    cases: dict[str, list[Planned]] = {}
    for each in planned:
        cases.setdefault(each.case.implementation, []).append(each)
    found: dict[str, str] = {}
    for name, of_it in cases.items():
        reasons = {each.refused for each in of_it}
        if len(of_it) > 1 and len(reasons) == 1 and not of_it[0].missing and all(reasons):
            found[name] = of_it[0].refused
        elif device == "cpu" and default_device() != "cpu" and _is_interpreted(classes[name]):
            found[name] = "runs in an interpreter on CPUs, and this machine has a GPU: --device cuda, or name it by -i"
    return found


def _is_interpreted(cls: type[Implementation]) -> bool:
    """Return whether a CPU is a stand-in for it: untimed and slow there, neither on a GPU."""
    try:
        instance = cls()
        return instance.slow("cpu") and bool(instance.no_timing("cpu")) and not instance.slow("cuda")
    except Exception:   # it says nothing of itself: the trial asks again, and records what it raised
        return False


def _asked(cls: type[Implementation], scheme: Scheme, device: str, elements: int) -> Support | None:
    """Return what an implementation says of a scheme; None where the case is larger than it takes."""
    support, limit = _answer(cls, scheme, device)
    return None if limit is not None and elements > limit else support


def _answer(cls: type[Implementation], scheme: Scheme, device: str) -> tuple[Support, int | None]:
    """Return what an implementation says of a scheme, and the most elements of a case that it takes.

    One that raises instead of answering is taken to support it: the trial asks again, and records what it raised.
    """
    try:
        instance = cls()
        limit = instance.max_elements(device)
    except Exception:
        return Support.yes(), None
    try:
        return instance.support(scheme, device), limit
    except Exception:
        return Support.yes(), limit


def _select_implementations(globs: Iterable[str], known: Iterable[str], failures: list[LoadFailure]) -> list[str]:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise no_implementation(glob, known, failures)
    return _select(globs, known, "implementation")


def _select(globs: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    known = list(known)
    picked: dict[str, None] = {}
    for glob in globs:
        matching = [name for name in known if fnmatchcase(name, glob)]
        if not matching:
            raise ValueError(_unknown(what, glob, known))
        picked |= dict.fromkeys(matching)
    return list(picked)


def _blocks(settings: Settings, device: str, layers: list[str]) -> list[_Block]:
    """Return the profile's blocks; where schemes or workloads were asked for, one block of those and, for the other,
    all that the profile has."""
    profile = PROFILES[settings.profile, "cpu" if device == "cpu" else "cuda"]
    if not settings.scheme and not settings.workload:
        return list(profile)
    profile_layers = [name for block in profile for name in _select(block.layers, layers, "workload")]
    profile_schemes = [name for block in profile for name in _select_schemes(block.schemes)]
    schemes = _select_schemes(settings.scheme) or profile_schemes
    activations = [activation for block in profile for activation in block.activations]
    activations += [name for name in get_args(Activation) if name in settings.scheme]
    asked: list[str] = []
    for glob in settings.workload:
        if "/" in glob:
            asked += _select((glob,), layers, "workload")
            continue
        # llama2-7b.o means the token counts that the profile has of it; all of them if it has none.
        names = set(_select((glob,), dict.fromkeys(layer.split("/")[0] for layer in layers), "workload"))
        matching = [layer for layer in layers if layer.split("/")[0] in names]
        asked += [layer for layer in matching if layer in profile_layers] or matching
    return [
        _Block(tuple(dict.fromkeys(schemes)), tuple(dict.fromkeys(asked or profile_layers)),
               tuple(dict.fromkeys(activations)))
    ]


def _select_schemes(globs: Iterable[str]) -> list[str]:
    """Return the named schemes that match, as `_select` does; any other name is read as a scheme by its parts."""
    picked: dict[str, None] = {}
    for glob in globs:
        if any(wildcard in glob for wildcard in "*?["):
            picked |= dict.fromkeys(_select((glob,), SCHEMES, "scheme"))
        else:
            picked[scheme_named(glob).name] = None
    return list(picked)


def _unknown(what: str, glob: str, known: Iterable[str]) -> str:
    known = list(known)
    hint = did_you_mean(glob, known, f"there are {', '.join(known[:20])}")
    return f"no {what} {glob!r}; {hint}"


def _main() -> int:
    settings = Settings.model_validate_json(sys.stdin.read())
    try:
        plan = make_plan(settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if "--plan" in sys.argv[1:]:
        print(plan.model_dump_json())
        return 0
    print(json.dumps([planned.case.id for planned in plan.cases if not planned.refused]))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
