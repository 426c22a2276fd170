"""Grids of samples, pixel by pixel, and plots."""

import numpy as np
import pytest
from PIL import Image

from diffjax.evaluation import line_plot, sample_grid
from diffjax.evaluation.pictures import BACKGROUND, GAP, MARGIN, captioned_grid

RNG = np.random.default_rng(0)


def tile(grid, row, column, *, columns, height, width, scale):
    """The pixels where the documentation says that a tile lies."""
    left = grid.width - MARGIN - (columns - column) * (width * scale + GAP) + GAP
    top = MARGIN + row * (height * scale + GAP)
    return np.asarray(grid)[top : top + height * scale, left : left + width * scale]


@pytest.mark.parametrize('channels', [1, 3])
def test_every_tile_holds_its_image_enlarged(channels, tmp_path):
    images = RNG.integers(0, 256, (9, 5, 4, channels), dtype=np.uint8)
    labels = np.array([3, 1, 3, 1, 3, 7, 3, 1, 3])
    sample_grid(images, labels, columns=3, scale=6, path=tmp_path / 'grid.png')
    grid = Image.open(tmp_path / 'grid.png')
    assert grid.mode == 'RGB' and grid.format == 'PNG'
    for row, indices in enumerate([[1, 3, 7], [0, 2, 4], [5]]):  # classes 1, 3, 7 in order of the samples
        for column, index in enumerate(indices):
            expected = np.kron(images[index], np.ones((6, 6, 1), np.uint8))
            found = tile(grid, row, column, columns=3, height=5, width=4, scale=6)
            np.testing.assert_array_equal(found, np.broadcast_to(expected, (30, 24, 3)))
    np.testing.assert_array_equal(tile(grid, 2, 1, columns=3, height=5, width=4, scale=6), 255)  # nothing there
    gap = np.asarray(grid)[MARGIN + 30 : MARGIN + 30 + GAP]
    np.testing.assert_array_equal(gap, np.broadcast_to(BACKGROUND, gap.shape))


def test_captions_stand_below_their_images(tmp_path):
    images = RNG.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    captions = ['a', 'a line that is longer than its image', 'two\nlines']
    captioned_grid(images, captions, columns=2, path=tmp_path / 'grid.png')
    grid = np.asarray(Image.open(tmp_path / 'grid.png'))
    places = []
    for image in images:
        tile = enlarged(image)
        corners = np.argwhere((grid[:-127, :-127] == tile[0, 0]).all(-1))
        places += [(y, x) for y, x in corners.tolist() if (grid[y : y + 128, x : x + 128] == tile).all()]
    (y0, x0), (y1, x1), (y2, x2) = places
    assert (y0, x0) == (MARGIN, MARGIN)
    assert y0 == y1 < y2 and x0 == x2 < x1
    assert x1 - x0 > 128 + GAP  # as wide as the longest line
    text = grid[y0 + 128 : y2, x1 : x1 + 128]
    assert (text < 128).any() and (grid[:, x1 - GAP : x1] == 255).all()  # ink, which keeps to its column
    assert (grid[y2 + 128 :, x2 : x2 + 128] < 128).any()  # the second row's too
    for wrong in (images.astype(np.float32), images[..., :2]):
        with pytest.raises(ValueError, match='Captioned images are uint8'):
            captioned_grid(wrong, captions)
    with pytest.raises(ValueError, match='with 2'):
        captioned_grid(images, captions[:2])


def enlarged(image):
    return np.kron(image, np.ones((2, 2, 1), np.uint8))


def test_labels_are_written_left_of_their_rows_and_differ():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    pixels = np.asarray(sample_grid(images, np.array([0, 0, 1, 1]), columns=2))
    left = pixels.shape[1] - MARGIN - 2 * (48 + GAP) + GAP
    rows = [pixels[MARGIN + r * (48 + GAP) :][:48, :left] for r in range(2)]
    assert all((row < 128).any() for row in rows)
    assert (rows[0] != rows[1]).any()
    assert not (np.asarray(sample_grid(images, columns=2))[:, :MARGIN] < 255).any()  # no labels, no text


def test_names_are_used_and_many_classes_are_thinned():
    images, labels = np.zeros((1000, 2, 2, 3), np.uint8), np.arange(1000)
    thinned = sample_grid(images, labels, columns=1, scale=10)
    assert thinned.height == 2 * MARGIN + 20 * (20 + GAP) - GAP
    chosen = sample_grid(images, labels, columns=1, scale=10, classes=[5, 7])
    assert chosen.height == 2 * MARGIN + 2 * (20 + GAP) - GAP
    named = sample_grid(images, labels, columns=1, scale=10, classes=[5, 7], names=['a long name'] * 8)
    assert named.width > chosen.width


def test_small_images_are_enlarged_and_large_ones_are_not():
    assert sample_grid(np.zeros((1, 8, 8, 1), np.uint8), columns=1).size == (48 + 2 * MARGIN, 48 + 2 * MARGIN)
    assert sample_grid(np.zeros((1, 256, 256, 3), np.uint8), columns=1).size == (256 + 2 * MARGIN, 256 + 2 * MARGIN)


@pytest.mark.parametrize(
    'bad', [np.zeros((1, 8, 8, 1)), np.zeros((8, 8, 1), np.uint8), np.zeros((1, 8, 8, 4), np.uint8)]
)
def test_other_arrays_are_refused(bad):
    with pytest.raises(ValueError, match='A grid shows uint8'):
        sample_grid(bad)


def test_a_plot_of_curves_is_written(tmp_path):
    x = np.arange(1, 60)
    curves = {'train': (x, 1 / x), 'test': (x[::9], 1.1 / x[::9], 0.01 / x[::9])}
    line_plot(tmp_path / 'a.png', curves, xlabel='step', ylabel='loss', yscale='log')
    line_plot(tmp_path / 'b.png', {'': (x, x)}, xlabel='step', ylabel='loss')
    first, second = (np.asarray(Image.open(tmp_path / name).convert('RGB')) for name in ('a.png', 'b.png'))
    assert first.shape == second.shape == (432, 768, 3)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 20  # two colours and a band, and not an empty sheet
    assert (first != second).any()
