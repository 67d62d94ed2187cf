"""Counts in sentences. Imports no torch."""


def counted(number: int, noun: str) -> str:
    """Return ``1 case`` or ``2 cases``, of a noun whose plural ends in s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
