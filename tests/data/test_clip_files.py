"""Clips and masks from files that NumPy and Pillow have written; and every file that is none, told in one line."""

import numpy as np
import pytest
from PIL import Image

from diffjax.data.clip_files import is_mask_file, read_clips, read_mask

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (3, 4, 6, 5, 1), np.uint8)
COLOUR = RNG.integers(0, 256, (3, 4, 6, 5, 3), np.uint8)


def test_an_archive_gives_its_clips_and_labels(tmp_path):
    np.savez_compressed(tmp_path / 'a.npz', arr_0=GREY, labels=np.array([3, 1, 2]), given=GREY)
    found = read_clips(tmp_path / 'a.npz', (6, 5, 1))
    np.testing.assert_array_equal(found['video'], GREY)
    np.testing.assert_array_equal(found['label'], [3, 1, 2])
    np.savez(tmp_path / 'pictures.NPZ', COLOUR[:, 0])
    (tmp_path / 'pictures.NPZ.npz').rename(tmp_path / 'pictures.NPZ')
    found = read_clips(tmp_path / 'pictures.NPZ', (6, 5, 3))
    assert list(found) == ['video']
    np.testing.assert_array_equal(found['video'], COLOUR[:, :1])


def test_pictures_are_clips_of_one_frame(tmp_path):
    grey, colour = Image.fromarray(GREY[0, 0, :, :, 0]), Image.fromarray(COLOUR[0, 0])
    grey.save(tmp_path / 'grey.png')
    colour.save(tmp_path / 'colour.png')
    grey.convert('RGB').save(tmp_path / 'stored.png')
    for name in ('grey', 'stored'):
        np.testing.assert_array_equal(read_clips(tmp_path / f'{name}.png', (6, 5, 1))['video'], GREY[:1, :1])
    np.testing.assert_array_equal(read_clips(tmp_path / 'colour.png', (6, 5, 3))['video'], COLOUR[:1, :1])
    repeated = read_clips(tmp_path / 'grey.png', (6, 5, 3))['video']
    np.testing.assert_array_equal(repeated, GREY[:1, :1].repeat(3, -1))
    flat = Image.new('RGB', (5, 6), (10, 20, 30))
    flat.save(tmp_path / 'flat.jpg')
    assert np.abs(read_clips(tmp_path / 'flat.jpg', (6, 5, 3))['video'][0, 0].astype(int) - [10, 20, 30]).max() <= 2


def test_a_gif_is_a_clip(tmp_path):
    first, *rest = [Image.fromarray(frame[:, :, 0]) for frame in GREY[0]]
    first.save(tmp_path / 'a.gif', save_all=True, append_images=rest)
    np.testing.assert_array_equal(read_clips(tmp_path / 'a.gif', (6, 5, 1))['video'], GREY[:1])


def test_masks(tmp_path):
    frames = RNG.random((4, 6, 5)) < 0.5
    np.savez(tmp_path / 'a.npz', frames)
    np.testing.assert_array_equal(read_mask(tmp_path / 'a.npz'), frames)
    np.savez(tmp_path / 'b.npz', mask=frames[0])
    np.testing.assert_array_equal(read_mask(tmp_path / 'b.npz'), frames[:1])
    Image.fromarray(np.where(frames[0], 255, 0).astype(np.uint8)).save(tmp_path / 'c.png')
    Image.fromarray(frames[0]).save(tmp_path / 'd.png')  # of one bit
    for name in ('c', 'd'):
        np.testing.assert_array_equal(read_mask(tmp_path / f'{name}.png'), frames[:1])
    assert [is_mask_file(x) for x in ('a/b.png', 'B.NPZ', 'first_frames', {'name': 'region'}, frames)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def write_mistakes(folder):
    np.savez(folder / 'none.npz', samples=GREY)
    np.savez(folder / 'floats.npz', GREY / 255)
    np.savez(folder / 'labels.npz', arr_0=GREY, labels=np.zeros(2, int))
    np.savez(folder / 'objects.npz', arr_0=np.array([{'a': 1}], dtype=object))
    (folder / 'text.npz').write_text('no archive')
    np.savez(folder / 'cut.npz', GREY)
    (folder / 'cut.npz').write_bytes((folder / 'cut.npz').read_bytes()[:-200])
    (folder / 'text.png').write_text('no picture')
    Image.fromarray(COLOUR[0, 0]).save(folder / 'colour.png')
    Image.fromarray(GREY[0, 0, :, :, 0].astype(np.uint16) * 200).save(folder / 'deep.png')
    np.savez(folder / 'right.npz', GREY)


CLIP_MISTAKES = {
    'absent.npz': 'absent.npz is no NPZ archive that can be read: .*No such file',
    'absent.png': 'absent.png is no picture that can be read: .*No such file',
    'clip.mp4': 'clip.mp4 is no file of clips; it ends in .npz or .gif, .png, .jpg, .jpeg',
    'none.npz': r'none.npz: clips are uint8 \[N, T, H, W, C\] in arr_0, got nothing',
    'floats.npz': r'in arr_0, got float64 \[3, 4, 6, 5, 1\]',
    'labels.npz': r'labels.npz: labels are 3 whole numbers, got int64 \[2\]',
    'objects.npz': 'objects.npz is no NPZ archive that can be read: Object arrays cannot be loaded',
    'text.npz': 'text.npz is no NPZ archive that can be read',
    'cut.npz': 'cut.npz is no NPZ archive that can be read',
    'text.png': 'text.png is no picture that can be read: cannot identify',
    'colour.png': 'colour.png is in colour, and grey pictures are wanted',
    'deep.png': 'deep.png is no picture that can be read: it has I;16 pixels, and channels of 8 bits are wanted',
}


@pytest.mark.parametrize('name', CLIP_MISTAKES)
def test_files_that_hold_no_clips(tmp_path, name):
    write_mistakes(tmp_path)
    with pytest.raises(ValueError, match=CLIP_MISTAKES[name]) as caught:
        read_clips(tmp_path / name, (6, 5, 1))
    assert '\n' not in str(caught.value)


def test_another_size(tmp_path):
    write_mistakes(tmp_path)
    with pytest.raises(ValueError, match='right.npz has 6 x 5 pixels of 1 channels; 8 x 5 pixels of 3 channels are w'):
        read_clips(tmp_path / 'right.npz', (8, 5, 3))
    with pytest.raises(ValueError, match='colour.png: pictures have 1 or 3 channels, and 4 are wanted; give an .npz'):
        read_clips(tmp_path / 'colour.png', (6, 5, 4))


def test_files_that_hold_no_mask(tmp_path):
    write_mistakes(tmp_path)
    with pytest.raises(ValueError, match=r'of booleans, \[H, W\] or \[T, H, W\]; found arr_0 uint8 \[3, 4, 6, 5, 1\]'):
        read_mask(tmp_path / 'right.npz')
    with pytest.raises(ValueError, match='one array of booleans, .* found arr_0 uint8 .*, labels int64'):
        read_mask(tmp_path / 'labels.npz')
