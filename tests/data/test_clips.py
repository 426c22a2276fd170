"""Sources of clips: any TFDS dataset with a tensor `video`, its frames picked, its clips made ready."""

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffjax.data import FrameChoice, make_iterator, open_source, prepare, to_uint8

CLIPS = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 8, 3), dtype=np.uint8)
FEATURES = {
    'plain': tfds.features.Tensor(shape=CLIPS.shape[1:], dtype=np.uint8),
    'packed': tfds.features.Tensor(shape=CLIPS.shape[1:], dtype=np.uint8, encoding='zlib'),
    'varying': tfds.features.Tensor(shape=(None, 4, 8, 3), dtype=np.uint8),
    'floats': tfds.features.Tensor(shape=CLIPS.shape[1:], dtype=np.float32),
}


class FilmedClips(tfds.core.GeneratorBasedBuilder):
    """Clips without labels, in one configuration for each way to store them."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in FEATURES]

    def _info(self):
        features = tfds.features.FeaturesDict({'video': FEATURES[self.builder_config.name]})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        dtype = FEATURES[self.builder_config.name].np_dtype
        yield from ((i, {'video': clip.astype(dtype)}) for i, clip in enumerate(CLIPS))


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp('clips')
    for name in FEATURES:
        FilmedClips(config=name, data_dir=directory, file_format='array_record').download_and_prepare()
    return directory


@pytest.mark.parametrize('name', ['plain', 'packed'])
def test_any_dataset_with_a_tensor_of_clips_opens(directory, name):
    source = open_source(f'filmed_clips/{name}', 'train', data_dir=directory)
    assert (source.kind, source.image_shape, source.num_classes) == ('video', (6, 4, 8, 3), 0)
    assert source.frame_rate == 0 and source.num_bytes == CLIPS.nbytes
    np.testing.assert_array_equal(source.read([3, 1])['video'], CLIPS[[3, 1]])
    assert next(make_iterator(source, batch_size=2, seed=0))['video'].shape == (2, 6, 4, 8, 3)


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('varying', {}, r'videos of shape \(None, 4, 8, 3\); clips are tensors of one fixed \[T, H, W, C\]'),
        ('floats', {}, 'videos of type float32, expected uint8'),
        ('plain', {'resolution': 4}, 'dataset.resolution crops images, and .* has clips'),
    ],
)
def test_other_clips_are_refused(directory, name, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(f'filmed_clips/{name}', 'train', data_dir=directory, **options)


def test_frames_are_picked(directory):
    source = open_source('filmed_clips/packed', 'train', data_dir=directory)
    few = source.clipped(3, 2)
    assert few.image_shape == (3, 4, 8, 3) and few.num_bytes * 2 == source.num_bytes
    np.testing.assert_array_equal(few.arrays['video'], CLIPS[:, [0, 2, 4]])
    np.testing.assert_array_equal(source.clipped(2).arrays['video'], CLIPS[:, :2])
    np.testing.assert_array_equal(source.arrays['video'], CLIPS)
    for wrong in ((0, 1), (7, 1), (4, 2)):
        with pytest.raises(ValueError, match=f'clips of 6 frames, of which with stride {wrong[1]} from 1 to'):
            source.clipped(*wrong)


def test_a_flip_mirrors_all_frames_alike():
    clips = np.repeat(CLIPS, 40, 0)
    prepared = prepare({'video': clips}, jax.random.key(0), flip=True)
    assert prepared['x0'].shape == clips.shape and set(prepared) == {'x0', 'label'}
    back = np.asarray(to_uint8(prepared['x0']))
    same, mirrored = (back == clips).all((1, 2, 3, 4)), (back == clips[:, :, :, ::-1]).all((1, 2, 3, 4))
    assert (same ^ mirrored).all() and 60 < mirrored.sum() < 140
    plain = prepare({'video': clips}, jax.random.key(0), flip=False)['x0']
    np.testing.assert_allclose(plain, clips.astype(np.float64) / 127.5 - 1, atol=1e-6)


def test_frames_to_learn_are_cut_out_of_longer_clips():
    """Clips that show the number of each frame: a, a + s, a + 2 s, ... with every stride, from every place."""
    numbers = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None], (600, 16, 2, 2, 1))
    frames = FrameChoice(num_frames=5, strides=(1, 3), frame_rate=12.0)
    prepared = prepare({'video': numbers}, jax.random.key(0), flip=True, frames=frames)
    assert prepared['x0'].shape == (600, 5, 2, 2, 1)
    seen = np.asarray(to_uint8(prepared['x0']))[..., 0, 0, 0].astype(int)
    starts, strides = seen[:, 0], seen[:, 1] - seen[:, 0]
    np.testing.assert_array_equal(seen, starts[:, None] + strides[:, None] * np.arange(5))
    assert set(strides) == {1, 3} and abs((strides == 1).sum() - 300) < 4 * np.sqrt(150)
    assert set(starts[strides == 1]) == set(range(12)) and set(starts[strides == 3]) == set(range(4))
    np.testing.assert_allclose(prepared['frame_rate'], 12 / strides)
    some = prepare({'video': numbers[:7]}, jax.random.key(0), flip=True, frames=frames)
    np.testing.assert_array_equal(some['x0'], prepared['x0'][:7])
