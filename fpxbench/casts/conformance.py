"""Compare the results of a conversion with the reference: which inputs differ, how, and which behaviour explains it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fpxbench.casts.cast_record import EXACT_PRODUCT, EXAMPLES, Behaviour, DifferingInputs, Example, InputKind
from fpxbench.casts.conversion import DType
from fpxbench.casts.expected import FLUSHED, Codes, Predict, expected_codes, hypotheses, overflow_begins
from fpxbench.casts.number_grid import ABOVE, EXACT, TIE, grid
from fpxbench.numbers.rounding import Rounding

NAN_CODES = 8
_ASPECTS = ("overflow", "infinity", "nan", "negative_zero", "subnormals")
_ANOTHER_NUMBER = "another number"
_OF_ROUNDING = frozenset(
    {InputKind.TIE, InputKind.ROUNDING, InputKind.DOUBLE_ROUNDING, InputKind.SUBNORMAL, InputKind.OTHER}
)
Describe = Callable[[int], tuple[str, str]]
"""Bits and value of the input at an index, as text."""


@dataclass
class Conformance:
    """How a conversion compares with the reference.

    inputs, differing : how many there were, and how many differ, permitted ones included
    """

    inputs: int
    differing: int
    behaviour: Behaviour
    differences: list[DifferingInputs]


@dataclass
class _Tally:
    count: int = 0
    examples: list[Example] = field(default_factory=list)


class ConformanceCheck:
    """Accumulates inputs and their results, in one piece or, for all 2**32, in many.

    The first piece must hold the discriminating inputs: the rounding is recovered from it.
    """

    def __init__(self, source: DType, target: DType, rounding: Rounding = Rounding.NEAREST_EVEN) -> None:
        self.source, self.target, self.rounding = source, target, rounding
        self._grid, self._format = grid(target), target.format
        self._tallies: dict[InputKind, _Tally] = {}
        self._outcomes: dict[str, Counter[str]] = {name: Counter() for name in _ASPECTS}
        self._nan_codes: set[int] = set()
        self._inputs = self._differing = 0
        self._recovered = False
        self._rounding_found: str | None = None
        self._taken_as: str | None = None

    def add(
        self, x: np.ndarray, got: Codes, describe: Describe, alternatives: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Add results `got` of inputs whose exact values are `x` (float64).

        alternatives : other readings of the same inputs, by name; one that explains every result is recorded as
        `taken_as`
        """
        got = got.astype(np.int64)
        expected = expected_codes(x, self.target, self.rounding).astype(np.int64)
        nan, got_nan = np.isnan(x), np.isnan(self._grid.value(got))
        differs = (got != expected) & ~(nan & got_nan)
        if not self._format.has_nan:
            differs &= ~nan                 # no standard says what NaN becomes
        self._inputs += x.size
        self._differing += int(differs.sum())
        for name, values in (alternatives or {}).items():
            if differs.any() and self._explains(values, got):
                self._taken_as = name
                other = differs & (expected_codes(values, self.target, self.rounding) != expected)
                kind = InputKind.UNROUNDED_PRODUCT if name == EXACT_PRODUCT else InputKind.OTHER
                self._tally(kind, np.flatnonzero(other), got, expected, describe)
                differs = differs & ~other
                x, nan = values, np.isnan(values)       # the rest follows from this reading
                break
        else:
            if not self._recovered:
                self._rounding_found = self._recover_rounding(x, got)
        self._recovered = True
        self._tally_behaviour(x, got, nan, got_nan)
        self._tally_differing(np.flatnonzero(differs), x, got, expected, describe)
        self._tally(InputKind.NAN_PAYLOAD, np.flatnonzero(nan & got_nan & (got != expected)), got, expected, describe)

    def add_conforming(self, count: int) -> None:
        """Add `count` inputs whose results are the reference's."""
        self._inputs += count

    def restarted(self) -> ConformanceCheck:
        """Return a check without inputs that keeps the behaviour recovered so far."""
        other = ConformanceCheck(self.source, self.target, self.rounding)
        other._recovered, other._rounding_found, other._nan_codes = True, self._rounding_found, set(self._nan_codes)
        other._outcomes = {name: Counter(counts) for name, counts in self._outcomes.items()}
        return other

    def result(self) -> Conformance:
        """Return the conformance of all inputs added."""
        unforeseen = sum(tally.count for kind, tally in self._tallies.items() if kind in _OF_ROUNDING)
        if unforeseen and self._rounding_found == self.rounding.value:     # not shown by the discriminating inputs
            self._rounding_found = f"mixture: {self._rounding_found} on {100 * (1 - unforeseen / self._inputs):.9g}%"
        outcomes = {name: _summary(counts) for name, counts in self._outcomes.items()}
        behaviour = Behaviour(rounding=self._rounding_found, taken_as=self._taken_as,
                              nan_codes=[self._hex(code) for code in sorted(self._nan_codes)[:NAN_CODES]], **outcomes)
        differences = [
            DifferingInputs(
                kind=kind, count=tally.count, examples=tally.examples, permitted=self._permitted(kind, outcomes)
            )
            for kind, tally in sorted(self._tallies.items(), key=lambda item: -item[1].count)
        ]
        return Conformance(self._inputs, self._differing, behaviour, differences)

    def _tally_behaviour(self, x: np.ndarray, got: Codes, nan: np.ndarray, got_nan: np.ndarray) -> None:
        fmt = self._format
        infinite = np.isinf(x)
        self._outcomes["infinity"].update(self._past_max(x[infinite], got[infinite]))
        past = self._overflows(x) & ~infinite
        # what a first rounding brings back into range does not overflow
        if (twice := self._rounds_twice()) is not None:
            past[past] = twice(np.abs(x[past]), np.signbit(x[past])) > fmt.max_code
        self._outcomes["overflow"].update(self._past_max(x[past], got[past]))
        if nan.any():
            self._outcomes["nan"].update(np.where(got_nan[nan], "nan", "number").tolist())
            self._nan_codes |= set(np.unique(got[nan & got_nan]).tolist())
        if not fmt.signed:
            return
        minus_zero = (x == 0) & np.signbit(x)
        zeros = np.select([got_nan, got == fmt.sign_bit, got == 0], ["nan", "kept", "positive"], _ANOTHER_NUMBER)
        self._outcomes["negative_zero"].update(zeros[minus_zero].tolist())
        magnitude = np.abs(x)
        small = (magnitude < fmt.min_normal) & (magnitude >= fmt.value(1))
        if small.any():
            flushed = int((self._magnitude(got[small]) == 0).sum())
            self._outcomes["subnormals"].update({"flushed": flushed, "kept": int(small.sum()) - flushed})

    def _past_max(self, x: np.ndarray, got: Codes) -> list[str]:
        """Return what values past the maximum became."""
        value = self._grid.value(got)
        right_sign = (np.signbit(value) == np.signbit(x)) | (not self._format.signed)
        return np.select(
            [np.isnan(value), np.isinf(value) & right_sign, (np.abs(value) == self._format.max) & right_sign],
            ["nan", "infinity", "saturate"], _ANOTHER_NUMBER).tolist()

    def _overflows(self, x: np.ndarray) -> np.ndarray:
        beginning, itself = overflow_begins(self._grid, self.rounding)
        magnitude = np.abs(x)
        return (magnitude >= beginning) if itself else (magnitude > beginning)

    def _recover_rounding(self, x: np.ndarray, got: Codes) -> str | None:
        """Return the rounding that explains every result, or the closest one with its share. None if nothing had to be
        rounded."""
        inside = np.abs(x) <= self._format.max
        if not self._format.signed:
            inside &= x >= self._format.value(0)
        x, got = x[inside], got[inside]
        magnitude, negative = np.abs(x), np.signbit(x)
        codes = self._magnitude(got)
        if not x.size or (self._grid.place(magnitude)[1] == EXACT).all():
            return None
        closest, most = "", -1
        for name, predict in hypotheses(self.source, self.target):
            explained = int((predict(magnitude, negative) == codes).sum())
            if explained == x.size:
                return name
            if explained > most:
                closest, most = name, explained
        return f"mixture: {closest} on {100 * most / x.size:.4g}%"

    def _rounds_twice(self) -> Predict | None:
        """Return the hypothesis of two roundings, if that is what was found."""
        found = self._rounding_found or ""
        return (
            dict(hypotheses(self.source, self.target))[found]
            if " via " in found and not found.startswith("mixture")
            else None
        )

    def _tally_differing(
        self, indices: np.ndarray, x: np.ndarray, got: Codes, expected: Codes, describe: Describe
    ) -> None:
        """Count each differing input under the first kind that fits."""
        if not indices.size:
            return
        kinds = self._kinds(x[indices], got[indices], expected[indices])
        x_ = np.where(np.isnan(x[indices]), np.inf, x[indices])
        impossible = np.array(self._past_max(x_, got[indices])) == _ANOTHER_NUMBER
        for kind in map(InputKind, np.unique(kinds)):
            of_kind = kinds == kind
            if kind in (InputKind.OVERFLOW, InputKind.INFINITY):    # examples that no rule permits come first
                self._tally(kind, indices[of_kind & impossible], got, expected, describe)
                of_kind &= ~impossible
            self._tally(kind, indices[of_kind], got, expected, describe)

    def _kinds(self, x: np.ndarray, got: Codes, expected: Codes) -> np.ndarray:
        """Return the `InputKind` of each differing input, as text."""
        fmt, found = self._format, self._rounding_found or ""
        magnitude = np.where(np.isfinite(x), np.abs(x), 0.0)
        lower, where = self._grid.place(magnitude)
        code, right_code = self._magnitude(got), self._magnitude(expected)
        same_sign = ((got ^ expected) & fmt.sign_bit) == 0
        if not fmt.has_negative_zero:       # FNUZ: neither zero nor NaN has a sign
            same_sign |= code == 0
        neighbour = ((code == lower) | (code == lower + 1)) & same_sign
        overflows = self._overflows(x)
        early = (magnitude > fmt.max) & ~overflows
        explained = np.zeros(x.shape, dtype=bool)
        if (twice := self._rounds_twice()) is not None:
            due = twice(magnitude, np.signbit(x))
            explained = ((due == code) | (early & (due > fmt.max_code))) & (where != TIE)
        conditions = {
            InputKind.NAN: np.isnan(x),
            InputKind.INFINITY: np.isinf(x),
            InputKind.NO_SUCH_NUMBER: (x <= 0) & (not fmt.signed),
            InputKind.OVERFLOW: overflows,
            InputKind.NEGATIVE_ZERO: (right_code == 0) & (code == 0),
            InputKind.DOUBLE_ROUNDING: explained & same_sign,
            InputKind.TIE: (where == TIE) & (neighbour | early),
            InputKind.SUBNORMAL: (magnitude < fmt.min_normal) & (~neighbour | (found.endswith(FLUSHED) & (code == 0))),
            InputKind.ROUNDING: ((where < TIE) | (where == ABOVE)) & (neighbour | early),
        }
        return np.select(list(conditions.values()), [str(kind) for kind in conditions], str(InputKind.OTHER))

    def _tally(self, kind: InputKind, indices: np.ndarray, got: Codes, expected: Codes, describe: Describe) -> None:
        if not indices.size:
            return
        tally = self._tallies.setdefault(kind, _Tally())
        tally.count += int(indices.size)
        # Spread over the inputs: neighbours would be the same example three times.
        spread = indices[np.linspace(0, indices.size - 1, EXAMPLES).astype(int)] if indices.size > EXAMPLES else indices
        for index in spread[:EXAMPLES - len(tally.examples)]:
            bits, value = describe(int(index))
            tally.examples.append(Example(
                input=bits, input_value=value, got=self._hex(got[index]), got_value=self._text(got[index]),
                expected=self._hex(expected[index]), expected_value=self._text(expected[index])))

    def _permitted(self, kind: InputKind, outcomes: Mapping[str, str | None]) -> bool:
        if kind in (InputKind.NAN_PAYLOAD, InputKind.UNROUNDED_PRODUCT):
            return True
        if kind in (InputKind.OVERFLOW, InputKind.INFINITY):
            return overflow_permitted(self.target, self.rounding, outcomes["overflow"], outcomes["infinity"])
        if self.target.name != "e8m0":
            return False
        # OCP MX defines what an E8M0 code means, not how a number becomes one: any consistent rounding conforms.
        one_way = not (self._rounding_found or "").startswith("mixture")
        return kind in (InputKind.TIE, InputKind.NO_SUCH_NUMBER) or (kind is InputKind.ROUNDING and one_way)

    def _explains(self, values: np.ndarray, got: Codes) -> bool:
        other = ConformanceCheck(self.source, self.target, self.rounding)
        other.add(values, got, lambda index: ("", ""))
        return all(difference.permitted for difference in other.result().differences)

    def _magnitude(self, codes: Codes) -> Codes:
        return codes & self._format.magnitude_mask

    def _hex(self, code: int) -> str:
        return f"0x{int(code):0{self.target.bits // 4}x}"

    def _text(self, code: int) -> str:
        return number_text(self._format.value(int(code)))


def overflow_permitted(target: DType, rounding: Rounding, overflow: str | None, infinity: str | None) -> bool:
    """Return whether the target's standard permits these outcomes of finite overflow and of infinity; None: no input
    showed it.

    docs/numerics.md names the standards.
    """
    special = "infinity" if target.format.has_infinity else "nan"
    if not target.is_float8:
        pairs = {("saturate" if rounding is Rounding.TOWARD_ZERO else "infinity", "infinity")}
    elif target.name in ("e4m3fn", "e5m2"):
        pairs = {("saturate", "saturate"), (special, special)}
        if rounding is Rounding.TOWARD_ZERO:
            pairs.add(("saturate", special))
    else:       # no standard covers FNUZ, E8M0 and Triton's own format
        pairs = {(first, second) for first in ("saturate", "nan") for second in ("saturate", "nan")}
    return any(overflow in (None, first) and infinity in (None, second) for first, second in pairs)


def number_text(value: float) -> str:
    """Return the shortest text that fp32, or else fp64, reads back as `value`: ``464``, ``5.87747316e-39``, ``-0``,
    ``nan``."""
    value, short = float(value), f"{value:.9g}"
    with np.errstate(over="ignore"):
        return short if math.isnan(value) or np.float32(short) == value else repr(value)


def _summary(counts: Counter[str]) -> str | None:
    """Return the one outcome, or ``mixture: nan 3, saturate 1``; None where there is none."""
    present = {outcome: count for outcome, count in counts.items() if count}
    if len(present) <= 1:
        return next(iter(present), None)
    return "mixture: " + ", ".join(
        f"{outcome} {count}" for outcome, count in sorted(present.items(), key=lambda item: -item[1])
    )
