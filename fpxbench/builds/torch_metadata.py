"""What files this interpreter would import PyTorch from, and what their package says. Prints it as JSON.

Also run by interpreters that have no fpxbench, so that it uses the standard library alone, and of no Python later than
3.8.
"""

import importlib.metadata
import importlib.util
import json

# The module is always `triton`; PyTorch's own builds of it carry these names, nightlies and ROCm ones among them.
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu",
                        "pytorch-triton-xpu")


def torch_metadata():
    """``origin``: the path of ``torch/__init__.py``, or None; ``triton``: the version that is installed, or None;
    ``requires``: the requirements that PyTorch declares, as lines."""
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
