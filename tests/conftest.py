"""Shared by all tests."""

import importlib
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def reference():
    """Imports a reference implementation; where CI is set, a missing one is a failure."""

    def load(name: str):
        if os.environ.get("CI"):
            return importlib.import_module(name)
        return pytest.importorskip(name, reason=f"{name} comes with 'peerjax[compare]'")

    return load
