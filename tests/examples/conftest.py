"""Modules of the experiments, which import each other from their own folder."""

import importlib
from pathlib import Path
import sys

import pytest


FOLDER = Path(__file__).parents[2] / "examples" / "experiments"
OWN = {"lab", "train_digits", *(path.stem for path in FOLDER.glob("*.py"))}


@pytest.fixture(autouse=True)
def as_users_have_it(promotion):
    """Run scripts with JAX's own settings."""


@pytest.fixture
def load(monkeypatch):
    """Import modules of the experiments, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
