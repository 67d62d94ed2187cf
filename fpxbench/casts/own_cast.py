"""Check a user's own cast against the definition of its target format."""

from __future__ import annotations

from fpxbench.builds.installed import installed_build
from fpxbench.casts.cast_record import CastRecord, CastResult
from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion, Engine
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.run import machine_here
from fpxbench.sweep.settings import Settings
from fpxbench.user_error import UserError


def check_own_cast(settings: Settings, function: str, source: str, target: str) -> CastRecord:
    """Return the result of ``package.module:function`` on the inputs of a cast from `source` to `target`, made in a
    child process on the settings' device (cpu).

    The function takes a tensor [n] of the source's dtype. It returns the target's codes: a tensor of PyTorch's dtype
    for it, uint8 of one code each, or, of formats of 4 bits, two codes per byte, the first one in the low bits, as
    uint8 or as ``torch.float4_e2m1fn_x2``. Raises UserError for a function that does not exist, and for unknown dtypes.
    """
    for name, there in ((source, SOURCES), (target, TARGETS)):
        if name not in there:
            raise UserError(f"no dtype {name!r} here: one of {', '.join(there)}")
    conversion = Conversion(operation=CastOperation.CAST, source=source, target=target, engine=Engine.EAGER,
                            device=settings.device or "cpu")
    with Isolation(settings.memory_limit) as isolation:
        machine = machine_here(isolation, settings.device, settings.machine, timed=False)
        outcome = isolation.call("fpxbench.casts.cast_trial:run_own", conversion, function,
                                 timeout_s=settings.timeout_s)
    if outcome.mistake:
        raise UserError(outcome.mistake)
    result = (CastResult(conversion=conversion, verdict=outcome.failure) if outcome.value is None
              else outcome.read(CastResult))
    fields = {name: getattr(result, name) for name in CastResult.model_fields}
    return CastRecord(build=installed_build(), machine=machine, **fields)


SOURCES = ("fp32", "bf16", "fp16")
TARGETS = tuple(dtype.name for dtype in DTYPES.values() if dtype.is_float8)
