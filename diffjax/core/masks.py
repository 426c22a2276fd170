"""What of a clip is known beforehand, by name: image to video, continuation, interpolation, cinemagraphs, inpainting.

Each takes clips [N, t, H, W, C], bytes or numbers, and how many frames T are to be made, and gives what
`core/editing.py` keeps: Known(x0 [N, T, H, W, C], mask [T, H, W, 1]), NumPy arrays. t may be less than T where what is
known lies within t frames: one picture, t = 1, is enough for image to video. Places in a clip are fractions of its
length, height and width, so that they hold for clips of any size; they are rounded to whole frames and pixels.
"""

import numpy as np

from diffjax.core import editing
from diffjax.core.checks import check_number
from diffjax.core.editing import Known
from diffjax.core.types import Array

__all__ = ['cinemagraph', 'first_and_last', 'first_frames', 'region']


def first_frames(clips: Array, num_frames: int, *, num_known: int = 1) -> Known:
    """The first frames: image to video where it is one, continuation where there are more."""
    return masked(clips, num_frames, editing.first_frames(num_frames, num_known))


def first_and_last(clips: Array, num_frames: int) -> Known:
    """Interpolation: the first and the last frame of the clips as given begin and end those that are made."""
    if clips.shape[1] < 2:
        raise ValueError('a first and a last frame are wanted, and the clips have 1')
    known = _lengthened(clips, num_frames)
    known[:, -1] = clips[:, -1]
    return _known(known, editing.first_and_last(num_frames))


def cinemagraph(
    clips: Array, num_frames: int, *, top: float = 0.25, bottom: float = 0.75, left: float = 0.25, right: float = 0.75
) -> Known:
    """The first frame as a picture of which a box moves, and all else stands still."""
    height, width = clips.shape[2:4]
    moving = np.zeros((height, width), bool)
    moving[_span('top', 'bottom', top, bottom, height), _span('left', 'right', left, right, width)] = True
    picture = np.asarray(editing.still(clips[:, 0], num_frames), clips.dtype)
    return _known(picture, editing.cinemagraph(num_frames, moving))


def region(
    clips: Array,
    num_frames: int,
    *,
    start: float = 0.0,
    end: float = 1.0,
    top: float = 0.25,
    bottom: float = 0.75,
    left: float = 0.25,
    right: float = 0.75,
) -> Known:
    """Inpainting: a box in space and time is made anew, and all outside of it is known."""
    mask = np.ones((num_frames, *clips.shape[2:4]), bool)
    mask[
        _span('start', 'end', start, end, num_frames),
        _span('top', 'bottom', top, bottom, clips.shape[2]),
        _span('left', 'right', left, right, clips.shape[3]),
    ] = False
    if not mask.any():
        raise ValueError('the region is the whole clip, and nothing of it would be known')
    return masked(clips, num_frames, mask[..., None])


def masked(clips: Array, num_frames: int, mask: np.ndarray) -> Known:
    """What any mask says: booleans [T, H, W, 1], or what broadcasts to that; True where known."""
    length, shape = clips.shape[1], (num_frames, *clips.shape[2:4], 1)
    try:
        mask = np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f'the mask is of shape {list(mask.shape[:-1])}, and the clips want {list(shape[:3])}'
        ) from None
    frames = np.flatnonzero(mask.any((1, 2, 3)))
    if not len(frames) or mask.all():
        raise ValueError(f'the mask holds {"everything" if len(frames) else "nothing"} as known')
    if frames[-1] >= length:
        has = 'one frame' if length == 1 else f'{length} frames'
        raise ValueError(f'frame {frames[-1] + 1} of {num_frames} is to be known, and the clips have {has}')
    return _known(_lengthened(clips, num_frames), mask)


def _known(x0: np.ndarray, mask: np.ndarray) -> Known:
    """One shape of mask for all: different ones go through one compiled program."""
    return Known(x0, np.ascontiguousarray(np.broadcast_to(mask, (*x0.shape[1:4], 1))))


def _lengthened(clips: Array, num_frames: int) -> np.ndarray:
    """Cut to num_frames, or filled up with the last one; a copy."""
    return np.asarray(clips)[:, np.minimum(np.arange(num_frames), clips.shape[1] - 1)]


def _span(low_name: str, high_name: str, low: float, high: float, size: int) -> slice:
    check_number(low_name, low, 0.0, 1.0)
    check_number(high_name, high, 0.0, 1.0)
    first, last = round(low * size), round(high * size)
    if first >= last:
        raise ValueError(f'{low_name}={low:g} to {high_name}={high:g} holds none of {size} frames or pixels')
    return slice(first, last)
