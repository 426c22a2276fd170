"""Annotations beside images: read when asked for, by name, as the dataset has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.data import make_iterator, open_source, prepare, read_all
from diffjax.data.shapes import shapes_dataset_builder
from diffjax.data.shapes.rendering import draw
from diffjax.data.shapes.scenes import scene

NUMBERS = ('shape', 'color', 'size', 'centre', 'box')
MAPS = ('segmentation', 'edges')


@pytest.fixture(scope='module')
def shapes_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_dataset_builder, 'NUM_EXAMPLES', {'train': 6, 'test': 3})
        directory = tmp_path_factory.mktemp('shapes')
        open_source('shapes', 'train', data_dir=directory)
    return directory


def test_examples_hold_what_was_asked_for_and_nothing_else(shapes_dir):
    plain = open_source('shapes', 'train', data_dir=shapes_dir)
    assert set(plain[0]) == set(read_all(plain)) == {'image', 'label'}
    source = open_source('shapes', 'train', data_dir=shapes_dir, annotations=('centre', 'segmentation'))
    assert set(source[0]) == {'image', 'label', 'centre', 'segmentation'}
    assert source.num_bytes == plain.num_bytes + 6 * (4 * 2 * 4 + 64 * 64)
    np.testing.assert_array_equal(source[2]['image'], plain[2]['image'])


def test_annotations_are_those_of_the_scene(shapes_dir):
    source = open_source('shapes', 'train', data_dir=shapes_dir, annotations=NUMBERS + MAPS)
    together = source.read([3, 0])
    for row, i in enumerate((3, 0)):
        what, example = scene('train', i), source[i]
        picture, number = draw(what), len(what.objects)
        for name in ('shape', 'color', 'size'):
            assert example[name].dtype == np.int8
            assert example[name].tolist() == [getattr(t, name) for t in what.objects] + [-1] * (4 - number)
        np.testing.assert_allclose(example['centre'][:number], [(t.y, t.x) for t in what.objects], rtol=1e-6)
        np.testing.assert_array_equal(example['box'][:number], picture.boxes)
        for name in MAPS:
            assert example[name].dtype == np.uint8 and example[name].shape == (64, 64, 1)
            np.testing.assert_array_equal(example[name][..., 0], getattr(picture, name))
        for name in example:
            np.testing.assert_array_equal(together[name][row], example[name])


def test_batches_carry_them_to_the_device(shapes_dir):
    source = open_source('shapes', 'train', data_dir=shapes_dir, annotations=('shape', 'edges'))
    batch = next(make_iterator(source, batch_size=4, seed=0))
    prepared = prepare(batch, jax.random.key(0), flip=False)
    assert set(prepared) == {'x0', 'label', 'shape', 'edges'}
    np.testing.assert_array_equal(prepared['shape'], batch['shape'])
    np.testing.assert_array_equal(prepared['edges'], batch['edges'])


@pytest.mark.parametrize('name', ['colour', 'caption', 'image'])
def test_other_names_are_refused_with_those_there_are(shapes_dir, name):
    """A caption is text, which no array of a fixed shape holds."""
    with pytest.raises(ValueError) as caught:
        open_source('shapes', 'train', data_dir=shapes_dir, annotations=('shape', name))
    wanted = f"'shapes' has no annotation {name!r} that is an array; it has: box, centre, color, edges, "
    assert str(caught.value) == wanted + 'segmentation, shape, size.'


def test_a_dataset_with_others_says_so(digits_dir):
    with pytest.raises(ValueError, match="'digits' has no annotation 'box' that is an array; it has: id"):
        open_source('digits', 'train', data_dir=digits_dir, annotations=('box',))


def test_a_flip_would_not_fit_what_is_known():
    batch = {'image': jnp.zeros((2, 4, 4, 3), jnp.uint8), 'box': jnp.zeros((2, 4, 4))}
    with pytest.raises(ValueError, match=r'flip mirrors images and not what is known of them \(box\)'):
        prepare(batch, jax.random.key(0), flip=True)
