"""Implementation files that use the import paths of earlier versions still load."""

import importlib
import sys

import pytest

from fpxbench._moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_import_path_warns_and_gives_the_module_itself(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__spec__.name == new and importlib.import_module(old) is module
