"""A package index in a folder: wheels of a few kB that stand for PyTorch builds.

Such a "PyTorch" has a version, an upstream commit and a Triton of its own, as pip and fpxbench read them, and when it
is imported it becomes the real one that runs the tests. So what is installed, found and filed is the small build, and
what multiplies is real.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import sys
import zipfile
from pathlib import Path

TORCH = Path(importlib.util.find_spec("torch").origin).parent


_BECOME = """
import importlib.util, sys
_spec = importlib.util.spec_from_file_location({name!r}, {origin!r}, submodule_search_locations=[{folder!r}])
_module = importlib.util.module_from_spec(_spec)
sys.modules[{name!r}] = _module
_spec.loader.exec_module(_module)
_module.planted = {planted!r}
"""


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> Path:
    """Return a wheel that any Python installs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {one}\n" for one in requires
    )
    files = files | {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        file: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for file, text in files.items()
    }
    record = (
        "".join(f"{file},sha256={digest},{len(files[file])}\n" for file, digest in digests.items())
        + f"{info}/RECORD,,\n"
    )
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            wheel.writestr(file, text)
    return path


def write_torch(
    folder: Path, version: str, git: str, planted: str = "", triton: str | None = None, requires: tuple[str, ...] = ()
) -> Path:
    """Return a PyTorch build; implementations find `planted` as ``torch.planted``."""
    about = f'__version__ = "{version}"\ngit_version = "{git}"\ncuda = None\n'
    become = _BECOME.format(name="torch", origin=str(TORCH / "__init__.py"), folder=str(TORCH), planted=planted)
    return write_wheel(
        folder,
        "torch",
        version,
        {"torch/version.py": about, "torch/__init__.py": become, "what_the_real_one_needs.pth": f"{TORCH.parent}\n"},
        requires=((f"triton=={triton}",) if triton else ()) + requires,
    )


_QUICK_UV = """#!{python} -IS
import os, pathlib, re, sys, zipfile
python = pathlib.Path(sys.argv[sys.argv.index("--python") + 1])
wanted, wheels = [argument for argument in sys.argv if "==" in argument], []
while wanted:
    name, _, version = wanted.pop().partition("==")
    path = pathlib.Path(os.environ["UV_FIND_LINKS"], f"{{name}}-{{version}}-py3-none-any.whl")
    if not path.exists():
        sys.exit(f"  × No solution found when resolving dependencies:\\n  ╰─▶ Because there is no version of {{name}}=="
                 f"{{version}} and you require {{name}}=={{version}}, your requirements are unsatisfiable.")
    wheels.append(zipfile.ZipFile(path))
    wanted += re.findall("^Requires-Dist: (.*)$",
                         wheels[-1].read(f"{{name}}-{{version}}.dist-info/METADATA").decode(), re.M)
site, = python.parents[1].glob("lib/python*/site-packages")
for wheel in wheels:
    wheel.extractall(site)
"""


def offline(folder: Path) -> dict[str, str]:
    """Return the variables under which `fpxbench` installs from ``folder/index`` and nowhere else: by a uv that unpacks
    its wheels, a twentieth of pip's time."""
    tool = folder / "bin/uv"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(_QUICK_UV.format(python=sys.executable), encoding="utf-8")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}", "UV_FIND_LINKS": str(folder / "index"),
            "FPX_INSTALLER": "uv"}
