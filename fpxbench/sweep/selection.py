"""Select a sweep's cases: profiles, and globs over implementations, schemes and workloads."""

from __future__ import annotations

import json
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
from fpxbench.workloads import CANARIES, is_from_file, ranks_in, workloads


class _Block(NamedTuple):
    """Schemes × layers; a profile consists of several blocks."""

    schemes: tuple[str, ...]
    layers: tuple[str, ...]
    """Globs over ``workload/mM``."""
    activations: tuple[Activation, ...] = ("bf16",)
    spared: tuple[str, ...] = ()
    """Globs over implementations that the block excludes."""


_ALL = ("*",)
_EACH_KIND = ("int8-row", "e4m3fn-row", "e3m2-g128", "nvfp4")
_VARIANTS = ("e4m3fn-b128x128", "mxfp4.rceil", "nf4-g64", "e4m3fn-row+e4m3fn-row")
"""Two-dimensional blocks, another rounding of scales, a codebook, quantized activations."""
_FEW = ("bf16", "int8-row", "e4m3fn-row", "e4m3fnuz-row", "e3m2-row", "mxfp4")
_CANARIES = tuple(f"{canary.name}/*" for canary in CANARIES
                  if canary.experts is None and canary.name != "canary.blocks")
_BLOCKS = ("e4m3fn-b128x128", "e4m3fn-b128x128+e4m3fn-g128")

_COMPILED = ("cpu_fused", "compiled_*")
"""Each case of these takes five seconds on a CPU: the compiler runs for each shape and scheme."""
_SLOWEST = ("eager_upcast",)
"""Many times slower than the others: timed on fewer layers."""

PROFILES: dict[tuple[str, str], tuple[_Block, ...]] = {
    ("smoke", "cpu"): (_Block(("e4m3fn-row", "e4m3fnuz-row", "mxfp4"), ("canary.codes/m1",)),
                       _Block(("mxfp4", "nvfp4"), ("canary.scales/m1",)),
                       _Block(("mxfp4", "nvfp4"), ("canary.values/m6",)),
                       _Block(("bf16", "int8-row", "e4m3fn-row"), ("llama3-8b.k/m1",))),
    ("smoke", "cuda"): (_Block(("e4m3fn-row", "mxfp4"), ("canary.experts.empty/m9",)),
                        _Block(_FEW, ("canary.codes/m1", "canary.ragged/*", "llama3-8b.k/m1")),
                        _Block((*_FEW[1:], "nvfp4"), ("canary.values/m6", "canary.scales/m1"))),
    # On a CPU: what two cores can do in minutes. Every scheme is checked on all its codes; implementations that compile
    # are excluded from most of the rest.
    ("quick", "cpu"): (_Block(("e5m2-row", "e4m3fnuz-row"), ("canary.seed/m1",)), _Block(_ALL, ("canary.codes/m1",)),
                       _Block(("mxfp4", "nvfp4"), ("canary.values/m6", "canary.scales/m1")),
                       _Block(_EACH_KIND, ("canary.values/m6", "canary.scales/m1"), spared=_COMPILED),
                       _Block(("e4m3fn-row",), ("canary.ragged/m33",)),
                       _Block(_EACH_KIND, ("canary.ragged/m33",), spared=_COMPILED),
                       _Block(("e4m3fn-row", "nvfp4"), ("canary.ragged/m3",)), _Block(_VARIANTS, ("canary.codes/m1",)),
                       _Block(("e4m3fn-b128x128", "e4m3fn-row+e4m3fn-row"), ("canary.ragged/m3",)),
                       _Block(_BLOCKS, ("canary.blocks/m4",)), _Block(("mxfp4",), ("canary.experts.skewed/*",)),
                       _Block(("e4m3fn-row", "mxfp4"), ("canary.experts.*",), spared=_COMPILED),
                       _Block(_FEW, ("llama3-8b.k/m1",)),
                       _Block(("e5m2-row", "e5m2fnuz-row", "nvfp4"), ("llama3-8b.k/m1",), spared=_SLOWEST),
                       _Block(("bf16", "int8-row", "e4m3fn-row"), ("llama2-7b.o/m1",), spared=_SLOWEST),
                       _Block(("bf16", "int8-row", "e4m3fn-row", "mxfp4"), ("llama3-8b.k/m16",))),
    ("quick", "cuda"): (_Block(_ALL, (*_CANARIES, "llama2-7b.o/m1")),
                        _Block(_ALL, ("llama3-8b.down/m1", "llama3-8b.down/m16"), spared=_SLOWEST),
                        _Block(_VARIANTS, (*_CANARIES, "llama2-7b.o/m16")), _Block(_BLOCKS, ("canary.blocks/m4",)),
                        _Block(("e4m3fn-row", "mxfp4", "nvfp4"), ("canary.experts.*",)),
                        _Block(("mxfp4",), ("gpt-oss-20b.experts_gate_up.*/m1", "gpt-oss-20b.experts_gate_up.*/m64")),
                        _Block((*_FEW, "nvfp4"), ("llama2-7b.gate_up/m1", "llama2-7b.o/m512")),
                        _Block(_FEW[1:], ("canary.codes/m1", "llama2-7b.o/m1"), ("fp16",))),
    ("full", "cpu"): (_Block((*_ALL, *_VARIANTS), _ALL, ("bf16", "fp16")),),
    ("full", "cuda"): (_Block((*_ALL, *_VARIANTS), _ALL, ("bf16", "fp16")),),
}


def make_plan(settings: Settings) -> Plan:
    """Return the plan of the cases that `settings` select. Imports torch and every implementation.

    Raise ValueError for a glob or name that selects nothing, with similar names.
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
    """Return the cases in a file, one JSON object per line.

    Raise ValueError, with the line's number, for a line that is not a case, and for an unreadable or empty file.
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
            raise ValueError(f"--cases {path}:{number}: not a case as `fpxbench records | jq -c .case` prints it: "
                             f"{first_mistake(error)}") from None
    if not cases:
        raise ValueError(f"--cases {path}: the file holds no case")
    return cases


def _listed(case: Case, known: dict[str, type[Implementation]], device: str) -> Planned:
    """Return the plan of a case listed in a file; one too large for its implementation is refused, not left out."""
    if case.implementation not in known:    # the trial reports what could not be loaded
        return Planned(case=case)
    if is_from_file(case.workload):
        return Planned(case=case, refused=f"the weight of {case.workload} comes from a file, which a list of cases does"
                                          " not hold: give it with --checkpoint or --weights")
    support, limit = _answer(known[case.implementation], scheme_named(case.scheme), device)
    if limit is not None and case.rows * case.n * case.k > limit:
        return Planned(case=case, refused=f"{case.implementation} takes no case of this size on {device}")
    return Planned(case=case, refused=support.reason, missing=support.missing)


def _selected(
    settings: Settings, device: str, known: dict[str, type[Implementation]], names: list[str]
) -> dict[str, Planned]:
    """Return the cases of the profile and the globs, by id."""
    ranks = tuple(sorted({*settings.tp, *ranks_in(settings.workload)}))
    layers = {f"{w.name}/m{m}": (w, m) for w in workloads(ranks).values() for m in w.m}

    planned: dict[str, Planned] = {}
    answers = cache(lambda name, scheme: _answer(known[name], scheme, device))      # the same for all layers
    for block in _blocks(settings, device, list(layers)):
        asked = [name for name in names if not any(fnmatchcase(name, glob) for glob in block.spared)]
        # Grouped by layer and scheme, so that cases with the same inputs, and a baseline and its rivals, run together.
        for layer in _select(block.layers, layers, "workload"):
            workload, m = layers[layer]
            case = workload.case(names[0], "bf16", m)       # all cases of the layer have its rows and experts
            elements = case.rows * workload.n * workload.k
            for scheme_name in _select_schemes(block.schemes):
                scheme = scheme_named(scheme_name)
                for name in asked:
                    support, limit = answers(name, scheme)
                    if limit is not None and elements > limit:
                        continue
                    # Trivial refusals: single weights for grouped products, quantized weights for dense products and
                    # dense weights for quantized ones, quantized activations for weight-only products.
                    if known[name].experts_only and case.experts is None:
                        continue
                    if not support.supported and (known[name].baseline or not scheme.quantized):
                        continue
                    if scheme.activation is not None and not known[name].quantizes_activations:
                        continue
                    # A dense scheme is the activation's own dtype.
                    for activation in block.activations:
                        if not scheme.quantized and activation != scheme_name:
                            continue
                        case = workload.case(name, scheme_name, m, activation)
                        planned.setdefault(case.id, Planned(case=case, refused=support.reason, missing=support.missing))
    planned = dict(sorted(planned.items(), key=_by_evidence(planned.values())))
    if not planned:
        raise ValueError(f"nothing to run on {device}: {', '.join(names)} takes none of these schemes and shapes"
                         + (" (Triton's interpreter takes small shapes only)" if device == "cpu" else ""))
    return planned


def _by_evidence(planned: Iterable[Planned]) -> Callable[[tuple[str, Planned]], tuple]:
    """Return the sort key of cases: canaries, layers at M = 1, and the rest; within each, layer by layer as given.

    An unfinished sweep then already covers every implementation and scheme.
    """
    places = {layer: number for number, layer in enumerate(dict.fromkeys(
        (each.case.workload, each.case.m) for each in planned))}

    def key(item: tuple[str, Planned]) -> tuple:
        case = item[1].case
        return stage(case), places[case.workload, case.m]

    return key


REFUSED_ON = "canary.codes"
"""The workload whose case represents all with the same refusal; every profile has it, so the case is always the same.
"""


def without_repeated_refusals(planned: dict[str, Planned]) -> dict[str, Planned]:
    """Return the cases that run, and one refused case per implementation, scheme and reason, which is the same for all
    layers."""
    refusals: dict[tuple[str, str, str], Planned] = {}
    for each in planned.values():
        key = each.case.implementation, each.case.scheme, each.refused
        if each.refused and (key not in refusals or each.case.workload == REFUSED_ON != refusals[key].case.workload):
            refusals[key] = each
    kept = {each.case.id for each in refusals.values()}
    return {name: each for name, each in planned.items() if not each.refused or name in kept}


def _nothing_to_do(classes: dict[str, type[Implementation]], planned: Iterable[Planned],
                   device: str) -> dict[str, str]:
    """Return implementation -> reason, for those without a case on this device: it refuses all, or it runs in an
    interpreter on this CPU although the machine has a GPU."""
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
    """Return whether an implementation runs in an interpreter on CPUs: slow and untimed there, but not on a GPU."""
    try:
        instance = cls()
        return instance.slow("cpu") and bool(instance.no_timing("cpu")) and not instance.slow("cuda")
    except Exception:   # the trial asks again, and records the exception
        return False


def _answer(cls: type[Implementation], scheme: Scheme, device: str) -> tuple[Support, int | None]:
    """Return an implementation's support for a scheme, and its largest number of elements per case.

    One that raises is taken to support the scheme: the trial asks again, and records the exception.
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
            hint = did_you_mean(glob, known, f"there are {', '.join(known[:20])}")
            raise ValueError(f"no {what} {glob!r}; {hint}")
        picked |= dict.fromkeys(matching)
    return list(picked)


def _blocks(settings: Settings, device: str, layers: list[str]) -> list[_Block]:
    """Return the profile's blocks; if schemes or workloads were given, one block of these, with the profile's for the
    other."""
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
        # llama2-7b.o stands for its token counts in the profile, or for all of them if the profile has none.
        names = set(_select((glob,), dict.fromkeys(layer.split("/")[0] for layer in layers), "workload"))
        matching = [layer for layer in layers if layer.split("/")[0] in names]
        asked += [layer for layer in matching if layer in profile_layers] or matching
    return [
        _Block(tuple(dict.fromkeys(schemes)), tuple(dict.fromkeys(asked or profile_layers)),
               tuple(dict.fromkeys(activations)))
    ]


def _select_schemes(globs: Iterable[str]) -> list[str]:
    """Return the schemes that match wildcards; a name without one may be any valid scheme."""
    picked: dict[str, None] = {}
    for glob in globs:
        if any(wildcard in glob for wildcard in "*?["):
            picked |= dict.fromkeys(_select((glob,), SCHEMES, "scheme"))
        else:
            picked[scheme_named(glob).name] = None
    return list(picked)



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
