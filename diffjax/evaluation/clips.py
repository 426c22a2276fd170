"""Clips to look at: a sheet with a clip in each row, a GIF and an MP4 of many side by side; and their frames as images.

MP4 needs the extra `video` (`pip install 'diffjax[video]'`: imageio-ffmpeg, which brings its own ffmpeg).
"""

import importlib.util
import os
from typing import TYPE_CHECKING

import numpy as np

from diffjax.evaluation.pictures import sample_grid

if TYPE_CHECKING:
    from PIL import Image

SHEET_CLIPS = 12  # at most, in a contact sheet
COLUMNS = 8  # clips side by side in motion
UNKNOWN = np.uint8(128)  # the grey of what is not known
FRAME_RATE = 8.0  # of clips that say none
HOW_TO_GET_MP4 = "an MP4 beside it needs imageio-ffmpeg: pip install 'diffjax[video]'"


def is_clip(shape: tuple[int, ...]) -> bool:
    """Whether examples of this shape are clips `[T, H, W, C]` rather than images `[H, W, C]`."""
    return len(shape) == 4


def one_frame_each(clips: np.ndarray, start: int = 0) -> np.ndarray:
    """Frame (start + i) mod T of clip i: `[N, T, H, W, C]` -> images `[N, H, W, C]`, all times alike.

    What figures of images measure of clips: with several frames of one clip, neighbours would be the clip itself.
    """
    places = np.arange(len(clips))
    return clips[places, (start + places) % clips.shape[1]]


def known_part(x0: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Clips `[N, T, H, W, C]` of which only what the mask, booleans that broadcast to them, has True is shown."""
    return np.where(mask, x0, UNKNOWN)


def contact_sheet(
    clips: np.ndarray, labels: np.ndarray, path: str | os.PathLike, given: np.ndarray | None = None
) -> 'Image.Image':
    """The first clip of each class, at most 12 evenly spaced ones, or the first clips where there is one class.

    Its frames stand from left to right, its label at the left. What it was made from, `given`, stands above it; then
    there are half as many.
    """
    at_most = SHEET_CLIPS if given is None else SHEET_CLIPS // 2
    classes, first = np.unique(labels, return_index=True)
    if len(classes) == 1:
        first = np.arange(len(clips))[:at_most]
    chosen = first[np.linspace(0, len(first) - 1, min(len(first), at_most)).round().astype(int)]
    num_frames, shown, names = clips.shape[1], clips[chosen], [str(labels[i]) for i in chosen]
    if given is not None:
        shown = np.stack([given[chosen], shown], axis=1)
        names = [text for name in names for text in (f'{name} given', 'made')]
    frames = shown.reshape(-1, *clips.shape[2:])
    rows = np.repeat(np.arange(len(names)), num_frames)
    scale = max(1, round(1000 / (num_frames * clips.shape[3])))
    return sample_grid(frames, rows, columns=num_frames, scale=scale, classes=range(len(names)), names=names, path=path)


def side_by_side(clips: np.ndarray, labels: np.ndarray, given: np.ndarray | None = None) -> list['Image.Image']:
    """A picture for each time: the first clips of each class in a row, as in `sample_grid`, which says how many.

    What each was made from, `given`, stands at its left; then there are half as many.
    """
    columns = COLUMNS
    if given is not None:
        gap = np.full((*clips.shape[:3], 1, clips.shape[-1]), 255, np.uint8)
        clips, columns = np.concatenate([given, gap, clips], axis=3), COLUMNS // 2
    return [sample_grid(clips[:, k], labels, columns=columns) for k in range(clips.shape[1])]


def write_gif(pictures: list['Image.Image'], path: str | os.PathLike, frame_rate: float = FRAME_RATE) -> None:
    """An endless GIF, in 256 colours that all its pictures share: with their own, what stands still would flicker."""
    from PIL import Image

    strip = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))
    palette = strip.quantize(256)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    duration = round(1000 / (frame_rate or FRAME_RATE))
    frames[0].save(path, format='GIF', save_all=True, append_images=frames[1:], duration=duration, loop=0)


def can_write_mp4() -> bool:
    return importlib.util.find_spec('imageio_ffmpeg') is not None


def write_mp4(pictures: list['Image.Image'], path: str | os.PathLike, frame_rate: float = FRAME_RATE) -> None:
    """An MP4 (H.264), its sides made even as that format wants. Raises ValueError without imageio-ffmpeg."""
    if not can_write_mp4():
        raise ValueError(HOW_TO_GET_MP4)
    import imageio_ffmpeg

    frames = [np.asarray(picture.convert('RGB')) for picture in pictures]
    height, width = frames[0].shape[:2]
    even = [np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge') for frame in frames]
    size = (width + width % 2, height + height % 2)
    writer = imageio_ffmpeg.write_frames(
        str(path), size, fps=frame_rate or FRAME_RATE, codec='libx264', macro_block_size=2, ffmpeg_log_level='error'
    )
    writer.send(None)
    for frame in even:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
