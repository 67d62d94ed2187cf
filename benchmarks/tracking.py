"""Decorators that make a look-up an asv benchmark."""

from collections.abc import Callable


def silent_for(seconds: float) -> Callable:
    """Allow a `setup_cache` this many seconds without output before asv ends it."""

    def mark(function):
        function.timeout = seconds
        return function

    return mark


def tracked(unit: str, name: str, values: list[str], version: str = "1") -> Callable:
    """Make a look-up a benchmark over `values` of the parameter `name`. `version` is that of the metric's definition:
    raise it only when old results are no longer comparable."""

    def mark(function):
        function.params = [values]
        function.param_names = [name]
        function.unit = unit
        function.version = version
        function.pretty_name = function.__doc__.splitlines()[0].rstrip(".")
        return function

    return mark
