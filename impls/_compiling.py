"""torch.compile for code that many cases share."""

from types import FunctionType

import torch


def compiled(function, **options):
    """A module-level `function` compiled as one graph for static shapes, apart from every other compiled copy of it.

    Dynamo counts recompilations per code object and refuses the ninth (`torch._dynamo.config.recompile_limit`), so a
    process that measures case after case would run out, and one case's shapes would turn the next one's dynamic. A copy
    with a code object of its own starts afresh.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, fullgraph=True, dynamic=False, **options)
