"""torch.compile for code that many cases share."""

from types import FunctionType

import torch


def compiled(function, **options):
    """Return a module-level `function` compiled as one graph for static shapes, independent of its other compiled
    copies.

    Dynamo counts recompilations per code object and refuses the ninth (`torch._dynamo.config.recompile_limit`): a
    process that measures one case after another would reach that limit, and one case's shapes would make the next one's
    dynamic. The copy has a code object of its own.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, fullgraph=True, dynamic=False, **options)
