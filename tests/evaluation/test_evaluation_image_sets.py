"""Images read in parts: from arrays, archives and folders, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from diffjax.evaluation.image_sets import image_array, open_images


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (11, 5, 4, 3), dtype=np.uint8)


def read(found, start, stop, size):
    parts = list(found.parts(start, stop, size))
    assert max(map(len, parts)) <= size
    return np.concatenate(parts)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('where', ['array', 'archive', 'folder'])
def test_every_stretch_is_what_was_stored(images, where, save, tmp_path):
    if where == 'array':
        found = image_array('x', images)
    elif where == 'archive':
        save(tmp_path / 'x.npz', images, np.arange(11))  # as ADM's scripts do: arr_0 and labels
        found = open_images(tmp_path / 'x.npz')
    else:
        (tmp_path / 'x' / 'b').mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / 'x' / ('b' if i > 6 else '') / f'{i:02d}.png')
        (tmp_path / 'x' / 'notes.txt').write_text('no picture')
        found = open_images(tmp_path / 'x')
    assert found.shape == (11, 5, 4, 3)
    for start, stop, size in ((0, 11, 4), (0, 11, 100), (3, 10, 3), (5, 6, 1), (10, 11, 4)):
        np.testing.assert_array_equal(read(found, start, stop, size), images[start:stop])
    assert found.first(3).shape[0] == 3 and found.first(100).shape[0] == 11


def test_what_holds_no_images_is_refused_in_one_line(images, tmp_path):
    np.savez(tmp_path / 'float.npz', images.astype(np.float32))
    np.savez(tmp_path / 'flat.npz', images[0])
    np.savez(tmp_path / 'latents.npz', images[..., [0, 1, 2, 0]])
    np.savez(tmp_path / 'columns.npz', np.asfortranarray(images))
    np.savez(tmp_path / 'named.npz', images=images)
    np.savez(tmp_path / 'object.npz', np.array([{}], dtype=object))
    np.savez(tmp_path / 'whole.npz', images)
    (tmp_path / 'cut.npz').write_bytes((tmp_path / 'whole.npz').read_bytes()[:300])
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'sizes').mkdir()
    Image.fromarray(images[0]).save(tmp_path / 'sizes' / 'a.png')
    Image.fromarray(images[0, :4]).save(tmp_path / 'sizes' / 'b.png')
    for name, message in {
        'float.npz': r'uint8 \[N, H, W, 1 or 3\], got float32 \[11, 5, 4, 3\]',
        'flat.npz': r'got uint8 \[5, 4, 3\]',
        'latents.npz': r'got uint8 \[11, 5, 4, 4\]',
        'columns.npz': 'stored by columns',
        'named.npz': 'its arrays are images, none called arr_0',
        'object.npz': 'got object',
        'cut.npz': 'no NPZ archive .*, or it is cut off',
        'nothing.npz': 'there is nothing',
        'empty': 'holds no pictures',
        'sizes': 'a.png is 4x5 and .*b.png 4x4',
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            open_images(tmp_path / name)
        assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value), name
    with pytest.raises(ValueError, match='x: images are uint8'):
        image_array('x', images / 255)
