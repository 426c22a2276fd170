"""Spaces in which clips are compared, chosen by name: features of whole clips, and what is recognised in them.

What stands in `__all__` is what `evaluation.clip_features` can name.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.evaluation.spaces import network_space
from diffjax.nets.i3d import I3D, MIN_FRAMES
from diffjax.nets.recognizer import ClipRecognizer
from diffjax.weights.i3d import open_weights
from diffjax.weights.recognizer import MOVING_DIGITS, open_recognizer

__all__ = ['recognizer', 'i3d']


class Seen(NamedTuple):
    """What is known of clips."""

    points: np.ndarray  # [N, D] of distances
    number: np.ndarray | None = None  # int [N]: of bodies
    kinds: np.ndarray | None = None  # int [N, T]: the likeliest kind of body in each frame, by this frame alone


class ClipSpace(NamedTuple):
    """`see(clips)`: uint8 `[N, T, H, W, C]`, N >= 1 -> `Seen`; `channels` are those of the clips, None: 1 or 3."""

    name: str  # for a report
    see: Callable[[np.ndarray], Seen]
    channels: int | None
    min_frames: int = 1


def recognizer(*, weights: str | os.PathLike = MOVING_DIGITS, batch_size: int = 50) -> ClipSpace:
    """A recogniser of clips, by default that of the moving digits, which comes with the package.

    Args:
      weights: the file that a run of configs/recognizer_clips.py leaves. Checked now; values are read when the first
        clips come.
    """
    opened = open_recognizer(weights)
    network = opened.network
    if not isinstance(network, ClipRecognizer):
        raise ValueError(f'{weights} recognises images; configs/recognizer_clips.py trains what recognises clips')

    def apply(params, clips):
        x = clips.astype(jnp.float32) / 127.5 - 1
        points, number, kinds = network.apply({'params': params}, x, method='summary')
        return Seen(points, number.argmax(-1), kinds.argmax(-1))

    name = 'the recogniser of moving digits' if weights == MOVING_DIGITS else f'the recogniser {weights}'
    return ClipSpace(name, _in_parts(name, apply, opened.load, batch_size), opened.in_channels)


def i3d(*, weights: str | os.PathLike = '', resize: str = 'tensorflow', batch_size: int = 8) -> ClipSpace:
    """Inception-I3D, with which published Frechet video distances are measured: its 400 logits.

    Args:
      weights: a safetensors file, see `weights/i3d.py`. Checked now; values are read when the first clips come.
      resize: of `nets.i3d.I3D`; 'tensorflow' for the reference implementation's figures.
    """
    if not weights:
        raise ValueError(
            'I3D needs its weights (i3d:weights=PATH): a safetensors file made by two lines that stand in '
            'diffjax/weights/i3d.py; got none'
        )
    network, name = I3D(resize=resize), f'I3D, frames resized as by {resize}'

    def apply(params, clips):
        return Seen(network.apply({'params': params}, clips).logits)

    return ClipSpace(name, _in_parts(name, apply, open_weights(weights), batch_size), None, MIN_FRAMES)


def _in_parts(name: str, apply: Callable, load: Callable, batch_size: int) -> Callable[[np.ndarray], Seen]:
    """All clips through a network, `batch_size` at once, over the devices of this process."""
    space = network_space(name, apply, load, lambda shape: (0, 0), batch_size)

    def see(clips: np.ndarray) -> Seen:
        parts = []
        for start in range(0, len(clips), space.batch_size):
            part = clips[start : start + space.batch_size]
            parts.append(jax.tree.map(lambda a: np.asarray(a)[: len(part)], space.extract(part)))  # noqa: B023
        return jax.tree.map(lambda *each: np.concatenate(each), *parts)

    return see
