"""Compares what came out of a conversion with what should have: which inputs differ, how, and what behaviour that shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fpxbench.casts.cast_record import EXACT_PRODUCT, EXAMPLES, Behaviour, DifferingInputs, Example, InputKind
from fpxbench.casts.conversion import DType
from fpxbench.casts.expected import FLUSHED, expected_codes, hypotheses, overflow_begins
from fpxbench.casts.grid import ABOVE, TIE, grid
from fpxbench.numbers.rounding import Rounding

NAN_CODES = 8
_OF_ROUNDING = frozenset({InputKind.TIE, InputKind.ROUNDING, InputKind.DOUBLE_ROUNDING, InputKind.SUBNORMAL, InputKind.OTHER})
Describe = Callable[[int], tuple[str, str]]
"""Bits and value of the input at an index, as text."""


@dataclass
class Conformance:
    """What the inputs showed."""

    inputs: int
    differing: int
    behaviour: Behaviour
    differences: list[DifferingInputs]


@dataclass
class _Tally:
    count: int = 0
    examples: list[Example] = field(default_factory=list)


class ConformanceCheck:
    """Inputs and their results are added in one piece or, for all 2**32, in many: the first must be the telling one, since the
    way of rounding is recovered from it and held against the others."""

    def __init__(self, source: DType, target: DType, rounding: Rounding = Rounding.NEAREST_EVEN) -> None:
        self.source, self.target, self.rounding = source, target, rounding
        self._numbers = grid(target)
        self._seen: dict[InputKind, _Tally] = {}
        self._words: dict[str, Counter[str]] = {name: Counter() for name in ("overflow", "infinity", "nan", "negative_zero", "subnormals")}
        self._nan_codes: set[int] = set()
        self._inputs = self._differing = 0
        self._told = False
        self._rounding_found: str | None = None
        self._taken_as: str | None = None

    def add(self, x: np.ndarray, got: np.ndarray, describe: Describe, alternatives: Mapping[str, np.ndarray] | None = None) -> None:
        """Results `got` (codes) of inputs whose exact values are `x` (float64).

        alternatives : other readings of the same inputs by name; one that explains every result is what happened.
        """
        numbers = self._numbers
        got = got.astype(np.int64)
        expected = expected_codes(x, self.target, self.rounding).astype(np.int64)
        nan, got_nan = np.isnan(x), np.isnan(numbers.value(got))
        differs = (got != expected) & ~(nan & got_nan)
        if not numbers.has_nan:
            differs &= ~nan                 # nothing says what NaN should become
        self._inputs += x.size
        self._differing += int(differs.sum())
        for name, values in (alternatives or {}).items():
            if differs.any() and self._explains(values, got):
                self._taken_as = name
                other = differs & (expected_codes(values, self.target, self.rounding) != expected)
                self._note(InputKind.UNROUNDED_PRODUCT if name == EXACT_PRODUCT else InputKind.OTHER, np.flatnonzero(other), got, expected, describe)
                differs = differs & ~other
                x, nan = values, np.isnan(values)       # the rest follows from what they were taken for
                break
        else:
            if not self._told:
                self._rounding_found = self._recover_rounding(x, got)
        self._told = True
        self._tally_behaviour(x, got, nan, got_nan)
        self._sort(np.flatnonzero(differs), x, got, expected, describe)
        self._note(InputKind.NAN_PAYLOAD, np.flatnonzero(nan & got_nan & (got != expected)), got, expected, describe)

    def conforming(self, count: int) -> None:
        """As many more inputs gave just what they should."""
        self._inputs += count

    def restarted(self) -> ConformanceCheck:
        """A judge who has counted nothing yet, and knows what this one found the conversion to do."""
        other = ConformanceCheck(self.source, self.target, self.rounding)
        other._told, other._rounding_found, other._nan_codes = True, self._rounding_found, set(self._nan_codes)
        other._words = {name: Counter(counts) for name, counts in self._words.items()}
        return other

    def result(self) -> Conformance:
        """What all of them showed."""
        unforeseen = sum(seen.count for kind, seen in self._seen.items() if kind in _OF_ROUNDING)
        if unforeseen and self._rounding_found == self.rounding.value:     # the telling inputs did not tell
            self._rounding_found = f"mixture: {self._rounding_found} on {100 * (1 - unforeseen / self._inputs):.9g}%"
        words = {name: _one_word(counts) for name, counts in self._words.items()}
        behaviour = Behaviour(rounding=self._rounding_found, taken_as=self._taken_as,
                              nan_codes=[self._hex(code) for code in sorted(self._nan_codes)[:NAN_CODES]], **words)
        differences = [
            DifferingInputs(kind=kind, count=seen.count, examples=seen.examples, permitted=self._permitted(kind, words))
            for kind, seen in sorted(self._seen.items(), key=lambda item: -item[1].count)
        ]
        return Conformance(self._inputs, self._differing, behaviour, differences)

    def _tally_behaviour(self, x: np.ndarray, got: np.ndarray, nan: np.ndarray, got_nan: np.ndarray) -> None:
        numbers = self._numbers
        infinite = np.isinf(x)
        self._words["infinity"].update(self._outcomes(x[infinite], got[infinite]))
        past = self._overflows(x) & ~infinite
        if (twice := self._rounds_twice()) is not None:     # what a first rounding brings back into range does not overflow
            past[past] = twice(np.abs(x[past]), np.signbit(x[past])) > numbers.max_code
        self._words["overflow"].update(self._outcomes(x[past], got[past]))
        if nan.any():
            self._words["nan"].update(np.where(got_nan[nan], "nan", "number").tolist())
            self._nan_codes |= set(np.unique(got[nan & got_nan]).tolist())
        minus_zero = (x == 0) & np.signbit(x)
        if minus_zero.any() and numbers.sign:
            zero_words = np.select([got_nan, got == numbers.sign, got == 0], ["nan", "kept", "positive"], "another number")
            self._words["negative_zero"].update(zero_words[minus_zero].tolist())
        magnitude, smallest = np.abs(x), numbers.value(np.array([1]))[0]
        small = (magnitude < numbers.min_normal) & (magnitude >= smallest)
        if numbers.sign and small.any():
            flushed = int((self._magnitude(got[small]) == 0).sum())
            self._words["subnormals"].update({"flushed": flushed, "kept": int(small.sum()) - flushed})

    def _outcomes(self, x: np.ndarray, got: np.ndarray) -> list[str]:
        """What became of values past the maximum, in a word each."""
        numbers = self._numbers
        value = numbers.value(got)
        right_sign = (np.signbit(value) == np.signbit(x)) | (not numbers.sign)
        return np.select(
            [np.isnan(value), np.isinf(value) & right_sign, (np.abs(value) == numbers.maximum) & right_sign],
            ["nan", "infinity", "saturate"], "another number").tolist()

    def _overflows(self, x: np.ndarray) -> np.ndarray:
        beginning, itself = overflow_begins(self._numbers, self.rounding)
        magnitude = np.abs(x)
        return (magnitude >= beginning) if itself else (magnitude > beginning)

    def _in_range(self, x: np.ndarray) -> np.ndarray:
        """Numbers that both neighbours of lie in the target."""
        numbers, magnitude = self._numbers, np.abs(x)
        inside = magnitude <= numbers.maximum
        return inside if numbers.sign else inside & (x >= numbers.value(np.zeros(1, dtype=np.int64)))

    def _recover_rounding(self, x: np.ndarray, got: np.ndarray) -> str | None:
        """The way of rounding that explains every result, or how far the best one goes. None if nothing had to be rounded."""
        inside = self._in_range(x)
        x, got = x[inside], got[inside]
        magnitude, negative = np.abs(x), np.signbit(x)
        codes = self._magnitude(got)
        if not x.size or (self._numbers.place(magnitude)[1] < -1).all():
            return None
        best, most = "", -1
        for name, predict in hypotheses(self.source, self.target):
            explained = int((predict(magnitude, negative) == codes).sum())
            if explained == x.size:
                return name
            if explained > most:
                best, most = name, explained
        return f"mixture: {best} on {100 * most / x.size:.4g}%"

    def _rounds_twice(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """The codes of magnitudes that two roundings give, if that is what was found."""
        found = self._rounding_found or ""
        return dict(hypotheses(self.source, self.target))[found] if " via " in found and not found.startswith("mixture") else None

    def _sort(self, indices: np.ndarray, x: np.ndarray, got: np.ndarray, expected: np.ndarray, describe: Describe) -> None:
        """Put each differing input under the first kind that fits."""
        if not indices.size:
            return
        numbers = self._numbers
        x_, got_, expected_ = x[indices], got[indices], expected[indices]
        magnitude = np.where(np.isfinite(x_), np.abs(x_), 0.0)
        lower, where = numbers.place(magnitude)
        code, right_code = self._magnitude(got_), self._magnitude(expected_)
        same_sign = ((got_ ^ expected_) & numbers.sign) == 0
        if not numbers.has_negative_zero:       # FNUZ: neither zero nor NaN has a sign
            same_sign |= code == 0
        neighbour = ((code == lower) | (code == lower + 1)) & same_sign
        early = (magnitude > numbers.maximum) & ~self._overflows(x_)
        found = self._rounding_found or ""
        explained = np.zeros(indices.shape, dtype=bool)
        if (twice := self._rounds_twice()) is not None:
            due = twice(magnitude, np.signbit(x_))
            explained = ((due == code) | (early & (due > numbers.max_code))) & (where != TIE)
        conditions = {
            InputKind.NAN: np.isnan(x_),
            InputKind.INFINITY: np.isinf(x_),
            InputKind.NO_SUCH_NUMBER: (x_ <= 0) & (not numbers.sign),
            InputKind.OVERFLOW: self._overflows(x_),
            InputKind.NEGATIVE_ZERO: (right_code == 0) & (code == 0),
            InputKind.DOUBLE_ROUNDING: explained & same_sign,
            InputKind.TIE: (where == TIE) & (neighbour | early),
            InputKind.SUBNORMAL: (magnitude < numbers.min_normal) & (~neighbour | (found.endswith(FLUSHED) & (code == 0))),
            InputKind.ROUNDING: ((where < TIE) | (where == ABOVE)) & (neighbour | early),
        }
        kinds = np.select(list(conditions.values()), [str(kind) for kind in conditions], str(InputKind.OTHER))
        impossible = np.array(self._outcomes(np.where(np.isnan(x_), np.inf, x_), got_)) == "another number"
        for kind in map(InputKind, np.unique(kinds)):
            of_kind = kinds == kind
            if kind in (InputKind.OVERFLOW, InputKind.INFINITY):    # examples are first of what no rule permits
                self._note(kind, indices[of_kind & impossible], got, expected, describe)
                of_kind &= ~impossible
            self._note(kind, indices[of_kind], got, expected, describe)

    def _note(self, kind: InputKind, indices: np.ndarray, got: np.ndarray, expected: np.ndarray, describe: Describe) -> None:
        if not indices.size:
            return
        seen = self._seen.setdefault(kind, _Tally())
        seen.count += int(indices.size)
        # Spread over the inputs: neighbours would be the same example three times.
        spread = indices[np.linspace(0, indices.size - 1, EXAMPLES).astype(int)] if indices.size > EXAMPLES else indices
        for index in spread[:EXAMPLES - len(seen.examples)]:
            bits, value = describe(int(index))
            seen.examples.append(Example(
                input=bits, input_value=value, got=self._hex(got[index]), got_value=self._text(got[index]),
                expected=self._hex(expected[index]), expected_value=self._text(expected[index])))

    def _permitted(self, kind: InputKind, words: Mapping[str, str | None]) -> bool:
        if kind in (InputKind.NAN_PAYLOAD, InputKind.UNROUNDED_PRODUCT):
            return True
        if kind in (InputKind.OVERFLOW, InputKind.INFINITY):
            return overflow_permitted(self.target, self.rounding, words["overflow"], words["infinity"])
        if self.target.name != "e8m0":
            return False
        # OCP MX defines what an E8M0 code means, not how a number becomes one: any one way to round will do.
        one_way = not (self._rounding_found or "").startswith("mixture")
        return kind in (InputKind.TIE, InputKind.NO_SUCH_NUMBER) or (kind is InputKind.ROUNDING and one_way)

    def _explains(self, values: np.ndarray, got: np.ndarray) -> bool:
        other = ConformanceCheck(self.source, self.target, self.rounding)
        other.add(values, got, lambda index: ("", ""))
        return all(difference.permitted for difference in other.result().differences)

    def _magnitude(self, codes: np.ndarray) -> np.ndarray:
        return codes & (self._numbers.sign - 1) if self._numbers.sign else codes

    def _hex(self, code: int) -> str:
        return f"0x{int(code):0{self.target.bits // 4}x}"

    def _text(self, code: int) -> str:
        return number_text(float(self._numbers.value(np.array([code], dtype=np.int64))[0]))


def overflow_permitted(target: DType, rounding: Rounding, overflow: str | None, infinity: str | None) -> bool:
    """Whether the target's standard lets finite overflow and infinity become these (docs/numerics.md has the sources).

    None stands for what no input could tell.
    """
    special = "infinity" if grid(target).has_infinity else "nan"
    if not target.is_float8:
        pairs = {("saturate" if rounding is Rounding.TOWARD_ZERO else "infinity", "infinity")}
    elif target.name in ("e4m3fn", "e5m2"):
        pairs = {("saturate", "saturate"), (special, special)}
        if rounding is Rounding.TOWARD_ZERO:
            pairs.add(("saturate", special))
    else:       # FNUZ, E8M0 and Triton's own have no standard that says
        pairs = {(first, second) for first in ("saturate", "nan") for second in ("saturate", "nan")}
    return any(overflow in (None, first) and infinity in (None, second) for first, second in pairs)


def number_text(value: float) -> str:
    """As short as tells it from its neighbours in fp32, or else in fp64: ``464``, ``5.87747316e-39``, ``-0``, ``nan``."""
    value, short = float(value), f"{value:.9g}"
    with np.errstate(over="ignore"):
        return short if math.isnan(value) or np.float32(short) == value else repr(value)


def _one_word(counts: Counter[str]) -> str | None:
    present = {word: count for word, count in counts.items() if count}
    if len(present) <= 1:
        return next(iter(present), None)
    return "mixture: " + ", ".join(f"{word} {count}" for word, count in sorted(present.items(), key=lambda item: -item[1]))
