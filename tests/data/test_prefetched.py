"""Batches that travel to the device ahead of their step: the same ones, and the same place to resume from."""

import jax
import numpy as np
import pytest

from diffjax.data import Prefetched, make_iterator, open_source, to_global


class Counting:
    """0, 1, 2, ... as batches, with a state that changes in place, as iterators may have it."""

    def __init__(self):
        self._state = {'next': 0}

    def __next__(self):
        self._state['next'] += 1
        return {'image': np.full((8, 1), self._state['next'] - 1, np.uint8)}

    def get_state(self):
        return self._state

    def set_state(self, state):
        self._state = dict(state)


@pytest.fixture(scope='module')
def sharding():
    return jax.sharding.NamedSharding(jax.make_mesh((8,), ('data',)), jax.sharding.PartitionSpec('data'))


@pytest.mark.parametrize('num_ahead', [0, 1, 3])
def test_the_next_batch_is_there_and_the_state_knows_nothing_of_it(sharding, num_ahead):
    inner = Counting()
    batches = Prefetched(inner, sharding, num_ahead)
    assert batches.get_state() == {'next': 0}
    for step in range(4):
        image = next(batches)['image']
        assert image.sharding == sharding and np.asarray(image).tolist() == [[step]] * 8
        assert batches.get_state() == {'next': step + 1}
        assert inner.get_state() == {'next': step + 1 + num_ahead}  # read, and on its way
    batches.set_state({'next': 2})  # what lay ahead belongs to another place
    assert batches.get_state() == {'next': 2}
    assert np.asarray(next(batches)['image']).max() == 2 and batches.get_state() == {'next': 3}


def test_a_run_resumes_with_the_batch_that_it_would_have_seen(digits_dir, sharding):
    source = open_source('digits', 'train[:30]', data_dir=digits_dir)

    def numpy():
        return make_iterator(source, batch_size=8, seed=3)

    plain = numpy()
    expected = [next(plain) for _ in range(9)]
    first = Prefetched(numpy(), sharding)
    for batch in expected[:4]:
        np.testing.assert_array_equal(next(first)['image'], batch['image'])
    second = Prefetched(numpy(), sharding)
    next(second), second.set_state(first.get_state())
    for batch in expected[4:]:
        got = to_global(next(second), sharding)  # as the loop asks for them: they are there already
        np.testing.assert_array_equal(got['image'], batch['image'])
        np.testing.assert_array_equal(got['label'], batch['label'])
