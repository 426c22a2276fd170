"""The experiments are scripts: they are loaded from their files, as Python would run them."""

import functools
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


@pytest.fixture(scope='module')
def one_device():
    """Experiments that are built have a mesh of one device: eight on a small machine take turns."""
    import jax
    import numpy as np

    from diffjax.training.sharding import make_mesh

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('diffjax.build.make_mesh', functools.wraps(make_mesh)(lambda **sizes: mesh))
        yield
