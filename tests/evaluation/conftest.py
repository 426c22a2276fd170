"""The real digits, for all the tests of this folder."""

import pytest

from diffjax.data import open_source, read_all


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """The splits `train` and `test`, each a dict of `image` uint8 `[N, 8, 8, 1]` and `label` `[N]`."""
    directory = tmp_path_factory.mktemp('tfds')
    return {split: read_all(open_source('digits', split, data_dir=directory)) for split in ('train', 'test')}
