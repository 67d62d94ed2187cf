"""Make the virtual environment of `make bench` and `make test`. Run by the Python it is for; needs only that Python.

With --own-torch, where that Python has a PyTorch, the environment sees the Python's packages, and PyTorch and Triton
stay as they are. Otherwise PyTorch comes from constraints.txt.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import sys
from pathlib import Path

OLDEST = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--extra", action="append", default=[], help="of pyproject.toml")
    parser.add_argument("--constraints", type=Path, required=True)
    parser.add_argument("--own-torch", action="store_true")
    options = parser.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(f"fpxbench needs Python {'.'.join(map(str, OLDEST))} or later, and {sys.executable} is "
                 f"{platform.python_version()}. Name another one: make bench PYTHON=python3.12")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fpxbench.builds import installer

    own = own_torch_pins() if options.own_torch else []
    extras = options.extra if own else [*options.extra, "triton"]
    pins = options.venv / "constraints.txt"
    try:
        installer.make_venv(options.venv, with_pip=True)
    except (installer.NoInstaller, OSError) as error:
        sys.exit(str(error))
    python, log = options.venv / "bin" / "python", options.venv / "install.log"
    if own:
        see_packages_of_this_python(options.venv)
        attempts = [("\n".join(own), [])]
        say(f"keeping {', '.join(own)} of {sys.executable}")
    else:
        text = options.constraints.read_text()
        attempts = [(text, [])]
        if platform.machine() == "x86_64" and not any(Path(node).exists() for node in GPU_NODES):
            text = re.sub(r"^(torch==[\d.]+)$", r"\1+cpu", text, flags=re.MULTILINE)
            attempts = [(text, []), (text, ["--extra-index-url", CPU_INDEX])]

    say(f"installing into {options.venv} (some minutes the first time)")
    target = f".[{','.join(extras)}]" if extras else "."
    for text, arguments in attempts:
        pins.write_text(text + "\n")
        log.write_text("")
        if installer.install("pip", ["--editable", target], log, python=python, pip_of=python,
                             arguments=[*arguments, "--constraint", str(pins)]) == 0:
            return
    sys.exit(f"{installer.tail(log)}\nThe installation failed; {log} has the whole log")


def own_torch_pins() -> list[str]:
    """Return pins of the PyTorch and the Triton that this Python has; none if it has no PyTorch."""
    from fpxbench.builds.torch_metadata import TRITON_DISTRIBUTIONS

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    pins = []
    for name in ("torch", *TRITON_DISTRIBUTIONS):
        try:
            pins.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name == "torch":
                sys.exit(f"{sys.executable} has a PyTorch that pip does not know of ({spec.origin}), and pip would "
                         "install another one. Install it first: pip install --no-build-isolation --editable PYTORCH")
    return pins


def see_packages_of_this_python(folder: Path) -> None:
    """Put this Python's packages behind the environment's own.

    venv's own switch reaches the base Python only, and this one may be an environment itself. `addsitedir`, since a
    PyTorch that was installed in place is found by a .pth file.
    """
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages,) = folder.glob("lib/python*/site-packages")
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in here)
    (site_packages / "zz_packages_of_the_outer_python.pth").write_text(lines)


def say(text: str) -> None:
    print(f"fpxbench: {text}", flush=True)


if __name__ == "__main__":
    main()
