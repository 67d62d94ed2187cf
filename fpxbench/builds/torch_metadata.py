"""Print where this interpreter would import PyTorch from, and its package's metadata, as JSON.

Interpreters without fpxbench run it too: it uses the standard library alone, and no syntax later than Python 3.8.
"""

import importlib.metadata
import importlib.util
import json

# The module is always `triton`; PyTorch's own builds of it carry these names, nightlies and ROCm ones among them.
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu",
                        "pytorch-triton-xpu")


def torch_metadata():
    """Return PyTorch's ``origin``, its requirements and the version of the installed Triton.

    ``origin`` is the path of ``torch/__init__.py``, ``triton`` a version, each None if missing; ``requires`` is a list.
    """
    spec = importlib.util.find_spec("torch")
    try:
        requires = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path, never installed
        requires = []
    return {"origin": spec.origin if spec else None, "triton": _installed_triton(), "requires": requires}


def _installed_triton():
    for name in TRITON_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


if __name__ == "__main__":
    print(json.dumps(torch_metadata()))
