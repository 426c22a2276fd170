"""Latents from the user's shards: written, read back, drawn and scaled."""

import jax
import numpy as np
import pytest

from diffjax.data import DatasetNotPrepared, list_splits, make_iterator, open_source, prepare, prepare_dataset, read_all
from diffjax.data.imagenet256_latents.imagenet256_latents_dataset_builder import read_shard


@pytest.fixture
def latents(tmp_path, write_shard):
    """A prepared dataset of two train shards and one of validation, and what was in the train shards."""
    manual = tmp_path / 'manual'
    shards = [write_shard(manual / 'train' / f'{i}.npz', num, seed=i) for i, num in enumerate((3, 2))]
    write_shard(manual / 'validation' / '0.npz', 2, seed=9)
    prepare_dataset('imagenet256_latents', data_dir=tmp_path / 'tfds', manual_dir=manual)
    return tmp_path / 'tfds', {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def test_shards_round_trip_in_order(latents):
    directory, written = latents
    assert list_splits('imagenet256_latents', data_dir=directory) == {'train': 5, 'validation': 2}
    source = open_source('imagenet256_latents', 'train', data_dir=directory)
    assert (source.kind, source.image_shape, source.num_classes) == ('latent', (32, 32, 4), 1000)
    arrays = read_all(source)
    assert arrays['mean'].nbytes + arrays['std'].nbytes == source.num_bytes
    np.testing.assert_array_equal(arrays['mean'], written['mean'].astype(np.float16))
    np.testing.assert_array_equal(arrays['std'], written['std'].astype(np.float16))
    np.testing.assert_array_equal(arrays['label'], written['label'])


def test_batches_become_scaled_draws(latents):
    directory, _ = latents
    source = open_source('imagenet256_latents', 'train', data_dir=directory)
    batch = next(make_iterator(source, batch_size=4, seed=0))
    assert {name: array.shape for name, array in batch.items()} == {
        'mean': (4, 32, 32, 4),
        'std': (4, 32, 32, 4),
        'label': (4,),
    }
    prepared = prepare(batch, jax.random.key(0), flip=False, scale=0.5)
    noise = (np.asarray(prepared['x0'], np.float64) / 0.5 - batch['mean']) / batch['std']
    count = noise.size
    assert abs(noise.mean()) < 4 / np.sqrt(count)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / count)
    assert len(np.unique(noise[:, 0, 0, 0])) == 4  # every example has its own noise
    np.testing.assert_array_equal(prepared['label'], batch['label'])


def test_a_draw_depends_on_its_place_and_not_on_the_batch_size():
    rng = np.random.default_rng(0)
    batch = {'mean': rng.normal(size=(8, 4, 4, 2)), 'std': rng.uniform(size=(8, 4, 4, 2))}
    eight = prepare(batch, jax.random.key(1), flip=True)['x0']
    three = prepare({name: array[:3] for name, array in batch.items()}, jax.random.key(1), flip=True)['x0']
    np.testing.assert_array_equal(eight[:3], three)


def test_the_default_scale_is_stable_diffusions():
    batch = {'mean': np.ones((1, 2, 2, 4), np.float16), 'std': np.zeros((1, 2, 2, 4), np.float16)}
    np.testing.assert_allclose(prepare(batch, jax.random.key(0), flip=False)['x0'], 0.18215, rtol=1e-6)


def test_missing_shards_are_explained(tmp_path):
    with pytest.raises(DatasetNotPrepared, match='--manual_dir=DIR'):
        prepare_dataset('imagenet256_latents', data_dir=tmp_path)
    with pytest.raises(DatasetNotPrepared, match=r'no shard .*nowhere/train/\*\.npz'):
        prepare_dataset('imagenet256_latents', data_dir=tmp_path, manual_dir=tmp_path / 'nowhere')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'std': None}, 'array std is missing'),
        ({'mean': np.zeros((2, 4, 32, 32), np.float32)}, r'mean has shape \(2, 4, 32, 32\), expected \(2, 32, 32, 4\)'),
        ({'label': np.array([0, 1000])}, r'labels span 0\.\.1000, expected 0\.\.999'),
    ],
)
def test_a_wrong_shard_is_named_and_nothing_is_left(changes, message, tmp_path, write_shard):
    path = tmp_path / 'manual' / 'train' / 'bad.npz'
    write_shard(path, 2, **changes)
    with pytest.raises(ValueError, match=f'bad.npz: {message}'):
        read_shard(path)
    with pytest.raises(ValueError, match=message):
        prepare_dataset('imagenet256_latents', data_dir=tmp_path / 'tfds', manual_dir=tmp_path / 'manual')
    assert not list((tmp_path / 'tfds').rglob('*.json'))


def test_latents_of_512_pixels_are_a_dataset_of_their_own(tmp_path, write_shard):
    """Twice as large; shards of the other size are refused, and the way to prepare it names its own."""
    name, rng = 'imagenet512_latents', np.random.default_rng(0)
    with pytest.raises(DatasetNotPrepared, match=r'\[N, 64, 64, 4\].* prepare imagenet512_latents --manual_dir=DIR'):
        open_source(name, 'train', data_dir=tmp_path / 'tfds')
    write_shard(tmp_path / 'small' / 'train' / '0.npz', 1)
    with pytest.raises(ValueError, match=r'mean has shape \(1, 32, 32, 4\), expected \(1, 64, 64, 4\)'):
        prepare_dataset(name, data_dir=tmp_path / 'tfds', manual_dir=tmp_path / 'small')
    mean, std = rng.uniform(size=(2, 1, 64, 64, 4)).astype(np.float32)
    write_shard(tmp_path / 'manual' / 'train' / '0.npz', 1, mean=mean, std=std)
    prepare_dataset(name, data_dir=tmp_path / 'tfds', manual_dir=tmp_path / 'manual')
    source = open_source(name, 'train', data_dir=tmp_path / 'tfds')
    assert (source.kind, source.image_shape, source.num_classes) == ('latent', (64, 64, 4), 1000)
    np.testing.assert_array_equal(read_all(source)['mean'], mean.astype(np.float16))
