"""Clips made from clips, and longer ones than were learned: the keys known, known_from, num_frames and window_stride of
the section `sampler`.

    known                                  what of each clip is given, and kept to the last bit (`core/masks.py`)
      first_frames                         image to video
      first_frames:num_known=4             continuation
      first_and_last                       interpolation
      region:start=0.25,end=0.75,top=0,bottom=1,left=0.5,right=1      inpainting of a box in space and time
      cinemagraph:top=0.25,bottom=0.75,left=0.25,right=0.75           a picture of which a box moves
      MASK.png, MASK.npz                   any mask (`data/clip_files.py`): white, or True, where known
    known_from                             the clips that it is of: '' the held-out ones of the test split in their
                                           order, or a file, NPZ as --mode=sample writes it, GIF, PNG or JPEG
    num_frames, window_stride              clips of so many frames, in windows of as many as were learned (`windowed`)

Sample i is made from clip i, and from clip i - M where there are only M. Its label is the clip's, where none is asked
for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.components import component
from diffjax.core import masks
from diffjax.core.editing import Known, Windows
from diffjax.data import Source
from diffjax.data.clip_files import is_mask_file, read_clips, read_mask
from diffjax.evaluation.seams import seam_figures
from diffjax.settings import ConfigError, SamplerSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """What is known of samples before they are drawn."""

    clips_of: str  # where the clips come from
    num_clips: int
    from_file: bool
    read: Callable[[np.ndarray], dict[str, np.ndarray]]  # numbers of clips [N] -> `video` [N, t, H, W, C], `label`
    keep: Callable[[np.ndarray], Known]  # bytes of clips -> what is known of those that are made

    def known(self, num_samples: int) -> Known:
        """Of samples 0 to num_samples: x0 uint8 [N, T, H, W, C], mask [T, H, W, 1]."""
        return self.keep(self.read(self._clips(num_samples))['video'])

    def labels(self, num_samples: int) -> np.ndarray | None:
        """[N]; None where the clips have none."""
        return self.read(self._clips(num_samples)).get('label')

    def _clips(self, num_samples: int) -> np.ndarray:
        return np.arange(num_samples) % self.num_clips


FOR_CLIPS = 'known, known_from, num_frames and window_stride are for clips of pixels, which this experiment has none of'


def windows_of(settings: SamplerSettings, shape: tuple[int, ...] | None) -> Windows | None:
    """None where clips have as many frames as were learned.

    shape: [T, H, W, C], as learned; None: there are no clips.
    """
    if shape is None and settings.num_frames:
        raise ConfigError(f'sampler.num_frames = {settings.num_frames}: {FOR_CLIPS}')
    if shape is None or settings.num_frames in (0, shape[0]):
        return None
    if settings.num_frames < shape[0]:
        raise ConfigError(
            f'sampler.num_frames = {settings.num_frames} is less than the {shape[0]} frames that were learned, '
            'of which windows are; 0 is as many'
        )
    if settings.window_stride > shape[0]:
        raise ConfigError(
            f'sampler.window_stride = {settings.window_stride} leaves frames between windows of {shape[0]}; it is at '
            f'most {shape[0]}, and 0 is half of that'
        )
    return Windows(settings.num_frames, shape[0], settings.window_stride or max(shape[0] // 2, 1))


def open_edit(
    settings: SamplerSettings, shape: tuple[int, ...] | None, test: Source | None, clips: np.ndarray | None = None
) -> Edit | None:
    """What the settings say is known; None where that is nothing.

    Args:
        shape: [T, H, W, C], as learned; None: there are no clips.
        test: the held-out clips, as they are drawn.
        clips: uint8 [M, t, H, W, C] in the place of those that `known_from` names.

    Raises ConfigError for what cannot be read, for clips of another size, and for clips that do not hold what is known.
    """
    is_given = not (isinstance(settings.known, str) and settings.known == '')
    if shape is None and (is_given or clips is not None):
        raise ConfigError(f'sampler.known = {settings.known!r}: {FOR_CLIPS}')
    if not is_given:
        if clips is not None:
            raise ConfigError('clips are what something is known of: say what, such as known="first_frames"')
        return None
    num_frames, size = settings.num_frames or shape[0], shape[1:]
    where = settings.known_from
    if clips is not None:
        source = {'clips_of': 'the clips given', **_in_memory({'video': _checked(clips, size)})}
    elif where:
        try:
            arrays = read_clips(where, size)
        except ValueError as error:
            raise ConfigError(f'sampler.known_from: {error}') from error
        source = {'clips_of': where, **_in_memory(arrays)}
    elif test is None:
        raise ConfigError(
            'sampler.known is of held-out clips, and dataset.test_split names none: give a file as sampler.known_from'
        )
    else:
        source = {'clips_of': f'{test.name} {test.split}', 'num_clips': len(test), 'read': test.read}
    edit = Edit(**source, from_file=bool(where), keep=_keeping(settings.known, num_frames))
    edit.known(1)  # checks itself
    return edit


def _in_memory(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {'num_clips': len(arrays['video']), 'read': lambda i: {name: a[i] for name, a in arrays.items()}}


def _checked(clips: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    clips = np.asarray(clips)
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[2:] != tuple(size) or not clips.size:
        raise ConfigError(f'clips are uint8 [N, T, {", ".join(map(str, size))}], got {clips.dtype} {list(clips.shape)}')
    return clips


def _keeping(known: Any, num_frames: int) -> Callable[[np.ndarray], Known]:
    """clips -> Known: of a component, of a mask's file, or of a mask itself."""
    if not (is_mask_file(known) or isinstance(known, np.ndarray)):
        return lambda clips: component(masks, known, 'sampler.known', 'clips', 'num_frames')(clips, num_frames)
    try:
        mask = np.asarray(known if isinstance(known, np.ndarray) else read_mask(known))
        if mask.dtype != bool or mask.ndim not in (2, 3):
            raise ValueError(f'a mask is booleans [H, W] or [T, H, W], got {mask.dtype} {list(mask.shape)}')
    except ValueError as error:
        raise ConfigError(f'sampler.known: {error}') from error

    def keep(clips):
        try:
            return masks.masked(clips, num_frames, mask[..., None])
        except ValueError as error:
            raise ConfigError(f'sampler.known: {error}') from error

    return keep


# What comes of it -----------------------------------------------------------------------------------------------------


def edit_figures(clips: np.ndarray, known: Known | None, windows: Windows | None) -> dict[str, Any]:
    """What the figures of clips [N, T, H, W, C] are to be read with: how much was known, and whether windows show."""
    figures = {}
    if known is not None:
        where = np.broadcast_to(known.mask, known.x0.shape[1:])
        figures['known_share'] = float(where.mean())
        figures['known_kept'] = float((clips[:, where] == known.x0[:, where]).mean())
    return figures if windows is None else figures | seam_figures(clips, windows.joins)


def described(edit: Edit | None, known: Any, windows: Windows | None) -> str:
    """The same for a report, as sentences; '' where there is nothing to say."""
    said = ''
    if edit is not None:
        said += f' Of each clip something was known, {known} of {edit.clips_of}; figures count it with the rest.'
    if windows is not None:
        said += f' Clips of {windows.num_frames} frames in windows of {windows.size}, one every {windows.stride}.'
    return said
