"""What an installation holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_of_the_repository_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fpxbench").rglob("*.py")}
    own = {name for name in project["packages"] if name not in project["package-dir"]}
    assert own == {".".join(folder.parts) for folder in folders}
    assert all((ROOT / folder).is_dir() for folder in project["package-dir"].values())
