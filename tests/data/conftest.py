"""The embedded digits, written once for all the tests of this folder."""

import numpy as np
import pytest

from diffjax.data import open_source


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp('tfds')
    open_source('digits', 'train', data_dir=directory)
    return directory


@pytest.fixture(scope='session')
def digits(digits_dir):
    return open_source('digits', 'train', data_dir=digits_dir)


@pytest.fixture
def write_shard():
    """Writes a shard of random latents and returns its arrays."""

    def write(path, num_examples, seed=0, **changes):
        rng = np.random.default_rng(seed)
        arrays = {
            'mean': rng.normal(size=(num_examples, 32, 32, 4)).astype(np.float32),
            'std': rng.uniform(0.1, 1, size=(num_examples, 32, 32, 4)).astype(np.float32),
            'label': rng.integers(0, 1000, num_examples),
        } | changes
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return arrays

    return write
