"""What is known of clips, by name: every mask and what it keeps, on clips whose every value is its own place."""

import inspect

import numpy as np
import pytest

from diffjax.core import masks

CLIPS = np.arange(2 * 4 * 8 * 6).reshape(2, 4, 8, 6, 1)  # [N, t, H, W, C]
PICTURE = CLIPS[:, :1]


def kept(known):
    """{(t, y, x): the values there in both clips}."""
    assert known.mask.dtype == bool and known.mask.shape == (*known.x0.shape[1:4], 1)
    return {tuple(map(int, at)): known.x0[(slice(None), *at, 0)].tolist() for at in np.argwhere(known.mask[..., 0])}


def values(t, y, x):
    return CLIPS[:, t, y, x, 0].tolist()


def everywhere(frames):
    return {(k, y, x): values(t, y, x) for k, t in frames.items() for y in range(8) for x in range(6)}


@pytest.mark.parametrize('num_frames', [3, 4, 9])
def test_first_frames(num_frames):
    for number in (1, 2):
        known = masks.first_frames(CLIPS, num_frames, num_known=number)
        assert known.x0.shape == (2, num_frames, 8, 6, 1) and known.x0.dtype == CLIPS.dtype
        assert kept(known) == everywhere({k: k for k in range(number)})
    assert kept(masks.first_frames(PICTURE, num_frames)) == everywhere({0: 0})


@pytest.mark.parametrize('num_frames', [3, 4, 9])
def test_the_last_frame_given_ends_what_is_made(num_frames):
    before = CLIPS.copy()
    assert kept(masks.first_and_last(CLIPS, num_frames)) == everywhere({0: 0, num_frames - 1: 3})
    np.testing.assert_array_equal(CLIPS, before)


@pytest.mark.parametrize('clips', [CLIPS, PICTURE])
def test_a_cinemagraph_is_its_first_frame_outside_a_box(clips):
    known = masks.cinemagraph(clips, 5, top=0.25, bottom=0.5, left=0.5, right=1.0)  # rows 2, 3; columns 3, 4, 5
    still = everywhere(dict.fromkeys(range(5), 0))
    assert kept(known) == {(k, y, x): v for (k, y, x), v in still.items() if k == 0 or not (y in (2, 3) and x >= 3)}


def test_a_region_is_made_and_all_else_is_known():
    known = masks.region(CLIPS, 4, start=0.5, end=1.0, top=0.0, bottom=0.5, left=1 / 3, right=2 / 3)
    everything = everywhere({k: k for k in range(4)})
    made = {(k, y, x) for k in (2, 3) for y in range(4) for x in (2, 3)}
    assert kept(known) == {place: v for place, v in everything.items() if place not in made}
    longer = masks.region(CLIPS, 8, start=0.5, top=0, bottom=1, left=0, right=1)  # outpainting in time
    assert kept(longer) == everywhere({k: k for k in range(4)})


def test_any_mask():
    picture = np.random.default_rng(0).random((8, 6)) < 0.5
    known = masks.masked(CLIPS, 4, picture[None, :, :, None])
    assert kept(known) == {(k, y, x): values(k, y, x) for k in range(4) for y, x in np.argwhere(picture).tolist()}


def test_all_that_a_config_can_name_has_one_signature():
    for name in masks.__all__:
        clips, num_frames, *options = inspect.signature(getattr(masks, name)).parameters.values()
        assert (clips.name, num_frames.name) == ('clips', 'num_frames')
        assert all(option.kind is option.KEYWORD_ONLY and option.default is not option.empty for option in options)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: masks.first_frames(CLIPS, 4, num_known=4), 'num_known=4 leaves none of 4 frames to make'),
        (lambda: masks.first_frames(CLIPS, 9, num_known=5), 'frame 5 of 9 is to be known, and the clips have 4 frames'),
        (lambda: masks.first_frames(PICTURE, 4, num_known=2), 'frame 2 of 4 is to be known, and the clips have one f'),
        (lambda: masks.first_and_last(PICTURE, 4), 'a first and a last frame are wanted, and the clips have 1'),
        (lambda: masks.first_and_last(CLIPS, 2), 'between the first and the last of 2 frames there is none'),
        (lambda: masks.cinemagraph(CLIPS, 4, top=0.5, bottom=0.5), 'top=0.5 to bottom=0.5 holds none of 8'),
        (lambda: masks.region(CLIPS, 4, left=0.5, right=0.55), 'left=0.5 to right=0.55 holds none of 6'),
        (lambda: masks.region(CLIPS, 4, end=2), 'end is a number from 0 on and at most 1, got 2'),
        (lambda: masks.region(CLIPS, 4, top='half'), "top is a number from 0 on and at most 1, got 'half'"),
        (lambda: masks.region(CLIPS, 4, top=0, bottom=1, left=0, right=1), 'the region is the whole clip'),
        (lambda: masks.region(CLIPS, 9), 'frame 9 of 9 is to be known, and the clips have 4 frames'),
        (lambda: masks.masked(CLIPS, 4, np.ones((3, 8, 6, 1), bool)), r'is of shape \[3, 8, 6\], .* want \[4, 8, 6\]'),
        (lambda: masks.masked(CLIPS, 4, np.ones((4, 8, 6, 1), bool)), 'the mask holds everything as known'),
        (lambda: masks.masked(CLIPS, 4, np.zeros((4, 8, 6, 1), bool)), 'the mask holds nothing as known'),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
