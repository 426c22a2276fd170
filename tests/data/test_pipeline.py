"""The stream of batches: order, epochs, shards, resuming, and the two ways of reading."""

import json

import jax
import numpy as np
import pytest

from diffjax.data import make_iterator, open_source, read_all, to_global

MODES = {'memory': {}, 'streaming': {'memory_limit_bytes': 0, 'num_threads': 3}}


@pytest.fixture(scope='module')
def small(digits_dir):
    """30 examples, whose images are all different."""
    source = open_source('digits', 'train[:30]', data_dir=digits_dir)
    assert len({image.tobytes() for image in read_all(source)['image']}) == 30
    return source


def take(iterator, num_batches):
    return [next(iterator) for _ in range(num_batches)]


def positions(source, batches):
    """Where in the source the examples of the batches stand, in their order."""
    place = {image.tobytes(): i for i, image in enumerate(read_all(source)['image'])}
    return [place[image.tobytes()] for batch in batches for image in batch['image']]


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_have_the_promised_types(digits):
    batch = next(make_iterator(digits, batch_size=16, seed=0))
    assert batch['image'].shape == (16, 8, 8, 1) and batch['image'].dtype == np.uint8
    assert batch['label'].shape == (16,) and batch['label'].dtype == np.int32


@pytest.mark.parametrize('mode', MODES)
def test_same_seed_same_batches_other_seed_others(small, mode):
    first, again, other = (take(make_iterator(small, batch_size=8, seed=seed, **MODES[mode]), 9) for seed in (3, 3, 4))
    assert_equal(first, again)
    assert positions(small, first) != positions(small, other)


def test_memory_and_streaming_deliver_the_same(small):
    memory, streaming = (take(make_iterator(small, batch_size=8, seed=3, **mode), 12) for mode in MODES.values())
    assert_equal(memory, streaming)


@pytest.mark.parametrize('mode', MODES)
def test_labels_stay_with_their_images(small, mode):
    batches = take(make_iterator(small, batch_size=8, seed=0, **MODES[mode]), 5)
    labels = np.concatenate([batch['label'] for batch in batches])
    np.testing.assert_array_equal(labels, read_all(small)['label'][positions(small, batches)])


def test_every_example_comes_once_an_epoch_in_a_new_order(small):
    order = np.array(positions(small, take(make_iterator(small, batch_size=10, seed=0), 12))).reshape(4, 30)
    for epoch in order:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in order}) == 4
    assert tuple(range(30)) not in {tuple(epoch) for epoch in order}


@pytest.mark.parametrize('batch_size', [7, 64])
def test_batches_run_across_epochs_and_may_exceed_the_dataset(small, batch_size):
    batches = take(make_iterator(small, batch_size=batch_size, seed=0), 10)
    assert all(len(batch['label']) == batch_size for batch in batches)
    whole = positions(small, batches)[: 30 * (10 * batch_size // 30)]
    for epoch in np.array(whole).reshape(-1, 30):
        assert sorted(epoch) == list(range(30))


def test_the_first_place_is_uniform_over_the_examples(small):
    firsts = [positions(small, [next(make_iterator(small, batch_size=1, seed=seed))])[0] for seed in range(300)]
    counts = np.bincount(firsts, minlength=30)
    assert ((counts - 10) ** 2 / 10).sum() < 66  # chi-square with 29 degrees of freedom: beyond with probability 1e-4


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('process_count', [2, 4])
def test_the_processes_pieces_are_the_batch_of_one(small, mode, process_count):
    whole = take(make_iterator(small, batch_size=8, seed=5), 9)
    pieces = [
        take(
            make_iterator(small, batch_size=8, seed=5, process_index=p, process_count=process_count, **MODES[mode]),
            9,
        )
        for p in range(process_count)
    ]
    joined = [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in zip(*pieces)]
    assert_equal(joined, whole)


@pytest.mark.parametrize('mode', MODES)
def test_a_saved_state_resumes_mid_epoch(small, mode):
    iterator = make_iterator(small, batch_size=8, seed=1, **MODES[mode])
    take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 6)
    fresh = make_iterator(small, batch_size=8, seed=1, **MODES[mode])
    fresh.set_state(state)
    assert_equal(take(fresh, 6), expected)


def test_the_state_carries_over_to_other_threads_modes_and_process_counts(small):
    iterator = make_iterator(small, batch_size=8, seed=1)
    take(iterator, 5)
    state, expected = iterator.get_state(), next(iterator)
    for kwargs in ({'num_threads': 0}, MODES['streaming'], {'process_index': 0, 'process_count': 2}):
        other = make_iterator(small, batch_size=8, seed=1, **kwargs)
        other.set_state(state)
        np.testing.assert_array_equal(next(other)['image'], expected['image'][: 8 // kwargs.get('process_count', 1)])


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'batch_size': 10, 'process_count': 4}, 'batch_size=10.*processes, 4'),
        ({'batch_size': 0}, 'batch_size=0'),
        ({'batch_size': 8, 'process_index': 2, 'process_count': 2}, r'process_index=2 must be in 0\.\.1'),
    ],
)
def test_impossible_settings_are_refused(small, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_iterator(small, seed=0, **kwargs)


def test_whole_arrays_cannot_be_changed_by_accident(small):
    with pytest.raises(ValueError, match='read-only'):
        read_all(small)['image'][0] = 0


def test_to_global_shards_the_leading_axis(small):
    mesh = jax.make_mesh((jax.device_count(),), ('data',))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    batch = next(make_iterator(small, batch_size=8 * jax.device_count(), seed=0))
    arrays = to_global(batch, sharding)
    for name, array in arrays.items():
        assert isinstance(array, jax.Array) and array.sharding == sharding
        np.testing.assert_array_equal(array, batch[name])
