"""How clips move: flicker, identity over time, and paths held against the physics of what is shown.

Flicker is what changes between frames and is no motion. Each block b of a frame is sought in the frame before,

    flicker = mean over k, b of  min over |d| <= reach  mean over b of |x_{k+1}(p) - x_k(p + d)|                     (1)

in bytes: the sum of absolute differences by which video codecs match blocks (Jain & Jain 1981). Motion by parts of a
pixel, turns and overlaps are not undone, in real clips no more than in made ones: what counts is the ratio to these.

A body that flies straight and bounces between two walls at the distance L is, along one axis, at

    p(k) = a + |s - 2 L round(s / 2 L)|,    s = p0 + k v                                                             (2)
"""

from collections.abc import Callable

import numpy as np

STEPS = 48  # of the first grid over p0 and v
REFINEMENTS = 6  # each with a grid a third as wide


def flicker(clips: np.ndarray, *, block: int = 8, reach: int = 4) -> np.ndarray:
    """Equation (1) of each clip: uint8 [N, T, H, W, C] -> [N], in bytes. `block` divides H and W."""
    _, num_frames, height, width, _ = clips.shape
    if num_frames < 2 or height % block or width % block:
        raise ValueError(
            f'flicker wants clips of at least 2 frames whose sides are multiples of {block}, got shape {clips.shape}'
        )
    return np.array([_flicker(clip.astype(np.float32), block, reach) for clip in clips])


def _flicker(clip: np.ndarray, block: int, reach: int) -> float:
    num_frames, height, width, channels = clip.shape
    before, after = np.pad(clip[:-1], ((0, 0), (reach, reach), (reach, reach), (0, 0)), 'edge'), clip[1:]
    best = np.full((num_frames - 1, height // block, width // block), np.inf, np.float32)
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            change = np.abs(after - before[:, down : down + height, right : right + width])
            blocks = change.reshape(num_frames - 1, height // block, block, width // block, block, channels)
            best = np.minimum(best, blocks.mean((2, 4, 5)))
    return float(best.mean())


def constancy(classes: np.ndarray) -> float:
    """The share of clips whose frames are all of one class: [N, T] -> a number from 0 to 1."""
    return float((classes == classes[:, :1]).all(axis=1).mean())


def frame_classes(clips: np.ndarray, classify: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The class of every frame: [N, T, H, W, C] -> [N, T]. classify: [M, H, W, C] -> [M]."""
    return np.asarray(classify(clips.reshape(-1, *clips.shape[2:]))).reshape(clips.shape[:2])


def centres(clips: np.ndarray) -> np.ndarray:
    """The centre of mass of each frame's light, (y, x) in pixels from the corner: [N, T, H, W, C] -> [N, T, 2].

    A frame without light has its centre in the middle.
    """
    light = clips.astype(np.float64).sum(-1)
    _, _, height, width = light.shape
    total = light.sum((2, 3))
    places = [
        (light.sum(3) @ (np.arange(height) + 0.5), height / 2),
        (light.sum(2) @ (np.arange(width) + 0.5), width / 2),
    ]
    return np.stack([np.where(total > 0, s / np.maximum(total, 1e-9), middle) for s, middle in places], -1)


def bounce_residual(places: np.ndarray, span: float, max_speed: float) -> np.ndarray:
    """How far paths are from the nearest one by equation (2), the root mean square over frames: [N, T, 2] -> [N].

    Args:
      places: along two axes, in any unit.
      span: L, in that unit; where the walls are, a, is fitted with p0 and v.
      max_speed: |v| is at most that, in the unit and frame.
    """
    squares = sum(_fit_axis(places[:, :, axis], span, max_speed) for axis in range(2))
    return np.sqrt(squares)


def _fit_axis(p: np.ndarray, span: float, max_speed: float) -> np.ndarray:
    """The least mean square of p - (2) over p0, v and a: [N, T] -> [N]. By grids, each around the best of the last."""
    frames = np.arange(p.shape[1])
    start, speed = np.full(len(p), span), np.zeros(len(p))  # s has the period 2 L
    reach, best = (span, max_speed), np.full(len(p), np.inf)
    for _ in range(1 + REFINEMENTS):
        offsets = np.linspace(-1, 1, STEPS + 1)
        starts = start[:, None, None] + reach[0] * offsets[None, :, None]
        speeds = np.clip(speed[:, None, None] + reach[1] * offsets[None, None, :], -max_speed, max_speed)
        s = starts[..., None] + frames * speeds[..., None]
        residual = p[:, None, None] - np.abs(s - 2 * span * np.round(s / (2 * span)))
        squares = residual.var(axis=-1).reshape(len(p), -1)  # a is the mean
        chosen = squares.argmin(1)
        best = np.minimum(best, squares[np.arange(len(p)), chosen])
        i, j = np.unravel_index(chosen, (STEPS + 1, STEPS + 1))
        start, speed = (
            starts[np.arange(len(p)), i, 0],
            np.broadcast_to(speeds, (len(p), 1, STEPS + 1))[np.arange(len(p)), 0, j],
        )
        reach = reach[0] / 3, reach[1] / 3
    return best
