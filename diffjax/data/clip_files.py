"""Clips, pictures and masks out of files: NPZ archives as `--mode=sample` writes them, GIF, PNG and JPEG."""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

PICTURES = ('.gif', '.png', '.jpg', '.jpeg')
UNREADABLE = OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, SyntaxError  # NumPy's and Pillow's


def read_clips(path: str | os.PathLike, size: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The clips in a file as `video`, uint8 [N, t, H, W, C], and perhaps their `label`, int [N].

    NPZ: clips in `arr_0`, or pictures [N, H, W, C], which are clips of one frame; labels in `labels`. A GIF is a clip,
    a PNG or JPEG a picture. size: the [H, W, C] that is wanted; grey pictures stored in colour count as grey.

    Raises ValueError, in one line, for what is no such file or has another size.
    """
    path = Path(path)
    if path.suffix.lower() == '.npz':
        found = _archive(path)
    elif path.suffix.lower() in PICTURES:
        found = {'video': _in_channels(path, _frames(path), size[-1])[None]}
    else:
        raise ValueError(f'{path} is no file of clips; it ends in .npz or {", ".join(PICTURES)}')
    have = found['video'].shape[2:]
    if have != tuple(size):
        named = ('{} x {} pixels of {} channels'.format(*shape) for shape in (have, size))
        raise ValueError(f'{path} has {next(named)}; {next(named)} are wanted')
    return found


def is_mask_file(mask) -> bool:
    """Whether a mask is the path of one."""
    return isinstance(mask, str) and mask.lower().endswith(('.npz', *PICTURES))


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """Booleans [T, H, W]: of an NPZ its one array, [H, W] or [T, H, W]; of a picture or a GIF where it is white.

    T is 1 for one picture, which holds for all frames. Raises ValueError, in one line, for what is no mask.
    """
    path = Path(path)
    if path.suffix.lower() != '.npz':
        return _frames(path).mean(-1) >= 128
    arrays = _arrays(path)
    mask = next(iter(arrays.values())) if len(arrays) == 1 else None
    if mask is None or mask.dtype != bool or mask.ndim not in (2, 3):
        found = ', '.join(f'{name} {a.dtype} {list(a.shape)}' for name, a in arrays.items()) or 'none'
        raise ValueError(f'{path}: a mask is one array of booleans, [H, W] or [T, H, W]; found {found}')
    return mask.reshape(-1, *mask.shape[-2:])


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        raise ValueError(f'{path} is no NPZ archive that can be read: {error}') from error


def _archive(path: Path) -> dict[str, np.ndarray]:
    arrays = _arrays(path)
    video, labels = arrays.get('arr_0'), arrays.get('labels')
    if video is None or video.dtype != np.uint8 or video.ndim not in (4, 5) or not video.size:
        found = 'nothing' if video is None else f'{video.dtype} {list(video.shape)}'
        raise ValueError(f'{path}: clips are uint8 [N, T, H, W, C] in arr_0, got {found}')
    video = video[:, None] if video.ndim == 4 else video
    if labels is None:
        return {'video': video}
    if labels.dtype.kind not in 'iu' or labels.shape != video.shape[:1]:
        raise ValueError(f'{path}: labels are {len(video)} whole numbers, got {labels.dtype} {list(labels.shape)}')
    return {'video': video, 'label': labels}


def _frames(path: Path) -> np.ndarray:
    """uint8 [t, H, W, 3]."""
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as picture:
            if picture.mode[0] in 'IF':
                raise ValueError(f'it has {picture.mode} pixels, and channels of 8 bits are wanted')
            return np.stack([np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(picture)])
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} is no picture that can be read: {error}') from error


def _in_channels(path: Path, frames: np.ndarray, channels: int) -> np.ndarray:
    if channels == 3:
        return frames
    if channels != 1:
        raise ValueError(f'{path}: pictures have 1 or 3 channels, and {channels} are wanted; give an .npz')
    if (frames != frames[..., :1]).any():
        raise ValueError(f'{path} is in colour, and grey pictures are wanted')
    return frames[..., :1]
