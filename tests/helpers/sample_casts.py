"""Conversions and records of them, as tests make them."""

from sample_records import BUILD, CPU

from fpxbench.casts.cast_record import Behaviour, CastRecord, DifferingInputs, Example, InputKind
from fpxbench.casts.conversion import Conversion
from fpxbench.records.verdict import Status, Verdict

EXAMPLE = Example(
    input="0x43e90000", input_value="466", got="0x7f", got_value="nan", expected="0x7e", expected_value="448"
)


def conversion(what="cast/fp32/e4m3fn", engine="eager", device="cpu"):
    operation, source, target = what.split("/")
    return Conversion(operation=operation, source=source, target=target, engine=engine, device=device)


def record(of=None, status=Status.OK, *, build=BUILD, **more):
    """Return a record of a conversion; of a wrong one, with seven ties that it rounds wrongly."""
    wrong = [DifferingInputs(kind=InputKind.TIE, count=7, permitted=False, examples=[EXAMPLE])]
    compared = {"differing": 0, "inputs": 65536, "inputs_digest": "abc"}
    found = {Status.OK: compared, Status.WRONG: compared | {"differing": 7, "differences": wrong}}.get(status, {})
    fields = {"conversion": of or conversion(), "build": build, "machine": CPU, "verdict": Verdict(status=status)}
    return CastRecord(**fields | found | more)


EARLIER = BUILD.model_copy(update={"torch": "2.11.0+cpu", "date": "2026-03-01", "key": "b" * 40})


def before_and_after():
    cast = [conversion("cast/fp32/e4m3fn"), conversion("cast/bf16/e4m3fn")]
    old = [
        record(one, build=EARLIER, behaviour=Behaviour(overflow="nan", rounding="nearest_even"), differing=500)
        for one in cast
    ]
    new = [record(one, behaviour=Behaviour(overflow="saturate", rounding="nearest_even"), differing=0) for one in cast]
    return old, new


def overflowing(overflow, engine="eager", what="cast/fp32/e4m3fn", infinity=None):
    return record(conversion(what, engine), behaviour=Behaviour(overflow=overflow, infinity=infinity or overflow))
