"""The experiments are scripts: they are loaded from their files, as Python would run them."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / 'experiments'


@pytest.fixture(scope='session')
def experiment():
    """name -> the module of experiments/NAME.py."""

    def load(name):
        if str(FOLDER) not in sys.path:
            sys.path.insert(0, str(FOLDER))
        return importlib.import_module(name)

    return load
