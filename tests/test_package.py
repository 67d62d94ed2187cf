"""What an installation holds."""

import setuptools
from conftest import LONGEST
from places import CHECKOUT


def test_every_folder_with_code_is_a_package_that_is_installed() -> None:
    folders = {
        path.parent for top in ("fpxbench", "impls", "reports", "benchmarks") for path in (CHECKOUT / top).rglob("*.py")
    }
    expected = {
        ".".join(("fpxbench", *folder.relative_to(CHECKOUT).parts)).replace("fpxbench.fpxbench", "fpxbench")
        for folder in folders
    }
    # targets/child is run as files by other interpreters, and is no package.
    assert set(setuptools.find_packages(str(CHECKOUT), include=["fpxbench*"])) == expected - {"fpxbench.targets.child"}


def test_files_that_are_begun_first_are_there() -> None:
    assert [name for name in LONGEST if not (CHECKOUT / "tests" / f"{name}.py").is_file()] == []
