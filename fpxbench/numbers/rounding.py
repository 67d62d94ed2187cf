"""How a number between two codes is rounded, and what becomes of one past the largest. Imports no torch.

Sources: IEEE 754-2019 §4.3 (rounding directions) and §7.4 (overflow); IEEE P3109 (stochastic rounding).
"""

from __future__ import annotations

from enum import StrEnum


class Rounding(StrEnum):
    """Which of its two neighbours a number between two codes becomes."""

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    TOWARD_ZERO = "toward_zero"
    UP = "up"
    """Toward +infinity."""
    DOWN = "down"
    """Toward -infinity."""
    TO_ODD = "to_odd"
    """The neighbour whose code is odd: the result can be rounded again, to at least two bits fewer, without double
    rounding."""
    STOCHASTIC = "stochastic"
    """The upper neighbour with a probability equal to the number's relative distance from the lower one, in steps of
    2**-random_bits."""


class Overflow(StrEnum):
    """What happens to a number that rounds past the largest finite one."""

    SATURATE = "saturate"
    INFINITY = "infinity"
    NAN = "nan"
