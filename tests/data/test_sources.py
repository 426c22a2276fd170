"""Opening datasets: any TFDS image dataset from disk, and clear words when there is none."""

import io
import shutil
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffjax.data import DatasetNotPrepared, UnknownDataset, blank_source, list_splits, make_iterator, open_source

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


class UnlabelledPictures(tfds.core.GeneratorBasedBuilder):
    """RGB images without labels, of one size or, in the second configuration, of no fixed one."""

    VERSION = tfds.core.Version('2.0.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ('fixed', 'varying')]

    def _info(self):
        shape = (6, 5, 3) if self.builder_config.name == 'fixed' else (None, None, 3)
        image = tfds.features.Image(shape=shape, dtype=np.uint8)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'image': image}))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i, picture in enumerate(PICTURES):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format='PNG')
            buffer.seek(0)
            yield i, {'image': buffer}


@pytest.fixture(scope='module')
def pictures_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp('pictures')
    for config in ('fixed', 'varying'):
        UnlabelledPictures(config=config, data_dir=directory, file_format='array_record').download_and_prepare()
    return directory


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('the network was touched')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def test_a_blank_example_tells_the_shapes_of_what_is_not_there(no_network, tmp_path):
    source = blank_source('cifar10', 'test', data_dir=tmp_path)
    assert (source.kind, source.image_shape, source.num_classes, len(source)) == ('image', (32, 32, 3), 10, 1)
    assert source[0]['label'].dtype == np.int32 and not source[0]['image'].any()
    assert blank_source('mnist', 'train', data_dir=tmp_path)[0]['image'].shape == (28, 28, 1)
    # Of no one size; without images; whose builder needs TensorFlow; of one version only.
    for name in ('imagenet2012', 'imdb_reviews', 'libritts', 'cifar10:3.0.2'):
        with pytest.raises(DatasetNotPrepared, match=f'{name!r} is not prepared'):
            blank_source(name, 'train', data_dir=tmp_path)
    with pytest.raises(UnknownDataset, match='cifar11'):
        blank_source('cifar11', 'train', data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_any_tfds_image_dataset_opens_by_name(pictures_dir, no_network):
    source = open_source('unlabelled_pictures/fixed', 'train', data_dir=pictures_dir)
    assert (source.kind, source.image_shape, source.num_classes, len(source)) == ('image', (6, 5, 3), 0, 7)
    found = sorted(source[i]['image'].tobytes() for i in range(7))
    assert found == sorted(picture.tobytes() for picture in PICTURES)
    assert set(source[0]) == set(next(make_iterator(source, batch_size=2, seed=0))) == {'image'}
    assert list_splits('unlabelled_pictures/fixed:2.0.0', data_dir=pictures_dir) == {'train': 7}


def test_a_slice_of_a_split(digits_dir):
    assert len(open_source('digits', 'train[:100]', data_dir=digits_dir)) == 100


def test_images_of_varying_size_are_refused(pictures_dir):
    with pytest.raises(ValueError, match='one fixed'):
        open_source('unlabelled_pictures/varying', 'train', data_dir=pictures_dir)


def test_without_a_configuration_the_default_is_opened_or_those_on_disk_are_listed(pictures_dir, tmp_path):
    assert open_source('unlabelled_pictures', 'train', data_dir=pictures_dir).image_shape == (6, 5, 3)
    shutil.copytree(pictures_dir / 'unlabelled_pictures' / 'varying', tmp_path / 'unlabelled_pictures' / 'varying')
    with pytest.raises(ValueError, match=r"ask for unlabelled_pictures/ and one of \['varying'\]"):
        open_source('unlabelled_pictures', 'train', data_dir=tmp_path)


def test_an_unknown_split_lists_the_splits(digits_dir):
    with pytest.raises(ValueError, match=r"no split 'validation'.*'test', 'train'"):
        open_source('digits', 'validation', data_dir=digits_dir)


@pytest.mark.parametrize(
    ('name', 'needed'),
    [
        ('cifar10', ['pip install tensorflow-cpu', 'python -m diffjax.data prepare cifar10']),
        ('imagenet_resized/64x64', ['python -m diffjax.data prepare imagenet_resized/64x64']),
        (
            'imagenet256_latents',
            [
                'train/*.npz',
                'std [N, 32, 32, 4]',
                'python -m diffjax.data prepare imagenet256_latents --manual_dir=DIR',
            ],
        ),
    ],
)
def test_a_known_dataset_that_is_not_prepared(name, needed, tmp_path, no_network):
    with pytest.raises(DatasetNotPrepared) as caught:
        open_source(name, 'train', data_dir=tmp_path)
    message = str(caught.value)
    assert '\n' not in message
    for words in [repr(name), str(tmp_path), f'--data_dir={tmp_path}', *needed]:
        assert words in message


def test_the_default_directory_is_tfds_own(tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    with pytest.raises(DatasetNotPrepared, match=str(tmp_path / 'cifar10')):
        open_source('cifar10', 'train')
    assert len(open_source('digits', 'test')) == 360
    assert (tmp_path / 'digits').exists()


def test_an_unknown_name_lists_the_embedded_ones_and_close_matches(tmp_path, no_network):
    with pytest.raises(UnknownDataset, match=r"'cifar1O'.*Did you mean cifar10.*Embedded: digits"):
        open_source('cifar1O', 'train', data_dir=tmp_path)
    with pytest.raises(UnknownDataset, match='Did you mean digits'):
        open_source('digitz', 'train', data_dir=tmp_path)


def test_a_malformed_name_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r'called name\[/config\]\[:version\].*mnist:9') as caught:
        open_source('mnist:9', 'train', data_dir=tmp_path)
    assert '\n' not in str(caught.value)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='Cannot write.*TFDS_DATA_DIR'):
        open_source('digits', 'train', data_dir=tmp_path / 'file')
