"""Folders of the checkout that tests read."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
FAULTY_IMPLS = CHECKOUT / "tests" / "faulty_impls"
HELPERS = CHECKOUT / "tests" / "helpers"
