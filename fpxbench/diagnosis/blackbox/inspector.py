"""Inspect one implementation on one scheme.

The implementation runs in the calling process; `fpxbench.sweep.isolation` provides a watched child.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path

from torch.nn.modules import module

import fpxbench.implementation as implementations
from fpxbench.checking import inputs, machine, tampering
from fpxbench.checking.contract import ContractViolation
from fpxbench.diagnosis.blackbox.inspection import Inspection, InspectRequest
from fpxbench.diagnosis.blackbox.investigation import Given, Investigation
from fpxbench.diagnosis.blackbox.module_adapter import Wrapped, factory_named
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.verdict import Status, Verdict, classify_exception
from fpxbench.workloads import workload_named

WITHIN_LIMIT = 64, 64, 128
"""M, N and K for an implementation with a size limit (an interpreter), unless the user gave a shape."""


class CannotInspect(ValueError):
    """A mistake in the request, as one sentence."""


def inspect(request: InspectRequest, given: Given | None = None) -> Inspection:
    """Inspect the request's subject. Exceptions of the implementation become the verdict. Raise CannotInspect."""
    implementation, not_loaded = _subject(request)
    inspection = inspect_implementation(implementation, request, given)
    inspection.not_loaded = not_loaded
    return inspection


def inspect_implementation(
    implementation: Implementation, request: InspectRequest, given: Given | None = None
) -> Inspection:
    """Inspect an instance; `request.subject` is its name."""
    started = time.perf_counter()
    try:
        scheme = scheme_named(request.scheme)
        layer = workload_named(request.workload) if request.workload else None
    except ValueError as error:
        raise CannotInspect(str(error)) from None
    if not scheme.quantized:
        raise CannotInspect(f"{scheme.name} stores weights as they are: there is no code, scale or order to inspect")
    device = request.device or machine.default_device()
    try:
        machine.describe(device)
    except machine.NoDevice as error:
        raise CannotInspect(str(error)) from None
    m, (n, k) = request.m, (layer.n, layer.k) if layer else (request.n, request.k)
    limit = implementation.max_elements(device)
    if not request.given and limit is not None and m * n * k > limit:
        m, n, k = WITHIN_LIMIT
    case = Case(implementation=implementation.name, scheme=request.scheme,
                workload=request.workload or f"inspect.{n}x{k}", m=m, n=n, k=k, activation=request.activation)
    inspection = Inspection(subject=request.subject, scheme=request.scheme, n=n, k=k, m=m,
                            activation=request.activation, device=device, seed=request.seed,
                            verdict=Verdict(status=Status.OK))
    try:
        support = implementation.support(scheme, device)
        if support.supported:
            try:
                Investigation(implementation, case, device, inspection, given or Given()).run()
            finally:
                tampering.check_untampered()
        else:
            status = Status.MISSING if support.missing else Status.UNSUPPORTED
            inspection.verdict = Verdict(status=status, summary=support.reason)
    except ContractViolation as violation:
        inspection.verdict = violation.verdict
    except BaseException as error:  # anything that an implementation raises is its result, SystemExit included
        _print_from_its_own_file(error)
        inspection.verdict = classify_exception(type(error).__name__, str(error), "")
    inspection.seconds = time.perf_counter() - started
    return inspection


def _print_from_its_own_file(error: BaseException) -> None:
    """Print the traceback of an implementation's exception, starting at the implementation's own file.

    A ValueError without such a frame was raised by a check of this package, and its message is enough.
    """
    frame = error.__traceback__
    while frame is not None and _calls_it(Path(frame.tb_frame.f_code.co_filename)):
        frame = frame.tb_next
    if frame is not None or not isinstance(error, ValueError):
        traceback.print_exception(type(error), error, frame or error.__traceback__)


def _calls_it(file: Path) -> bool:
    """Return whether a file belongs to the call path of an implementation: this package, but not its
    implementations, or `torch.nn.Module`."""
    package = Path(implementations.__file__).parent
    ours = file.is_relative_to(package) and not file.is_relative_to(implementations.shipped_folder())
    return ours or file == Path(module.__file__)


def _subject(request: InspectRequest) -> tuple[Implementation, list[str]]:
    """Return the implementation, and a message for each file that could not be loaded."""
    if ":" in request.subject:
        try:
            return Wrapped(factory_named(request.subject), inputs.ACTIVATION_DTYPES[request.activation]), []
        except ValueError as error:
            raise CannotInspect(str(error)) from None
    try:
        known, failures = implementations.discover(request.impls)
        return implementations.find(request.subject, known, failures)(), [str(failure) for failure in failures]
    except (FileNotFoundError, ValueError) as error:
        raise CannotInspect(str(error)) from None
