"""Editing by a mask and what is known: image to video, interpolation, inpainting, continuation; and long clips.

One mechanism. A mask says which values of x0 are known. Whenever a row of the plan has taken the state to a level
(alpha, sigma), the known values are put there as they would be at that level,

    x <- mask (alpha x0 + sigma eps) + (1 - mask) x                                                                 (1)

and after the last row they are x0 itself, exactly (Lugmayr et al. 2022, arXiv:2201.09865, equation 8; Song et al. 2021,
arXiv:2011.13456, appendix I.2). Each value of x is overwritten or left alone, so that (1) goes with every solver. What
is made knows of what is known through the network's estimates alone; `solvers.repaint` goes back and forth in time,
which brings the two into harmony.

Masks here are for clips [B, T, H, W, C], to which they broadcast, True where known; any other booleans are a mask too.

Long clips are made by a denoiser of short ones. MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113, equation 5) asks
it about overlapping windows, here of frames, and takes for each frame a weighted mean of what it is told.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.checks import check_whole
from diffjax.core.sampling import sample, starting_noise
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan
from diffjax.core.types import Array, Denoiser, PyTree

KNOWN = 0x6B6E6F77  # folded into a sample's key for the noise of what is known; rows of a plan do not reach it


class Known(NamedTuple):
    """x0: [B, ...], whose values count where mask is True; mask: booleans that broadcast to x0."""

    x0: Array
    mask: Array


# Masks ----------------------------------------------------------------------------------------------------------------


def first_frames(num_frames: int, num_known: int = 1) -> np.ndarray:
    """[T, 1, 1, 1]: image to video where one is known, continuation where it is more."""
    check_whole('num_known', num_known)
    if num_known >= num_frames:
        raise ValueError(f'num_known={num_known} leaves none of {num_frames} frames to make')
    return _of_frames(num_frames, range(num_known))


def first_and_last(num_frames: int) -> np.ndarray:
    """[T, 1, 1, 1]: interpolation."""
    if num_frames < 3:
        raise ValueError(f'between the first and the last of {num_frames} frames there is none; give at least 3')
    return _of_frames(num_frames, (0, num_frames - 1))


def cinemagraph(num_frames: int, moving: Array) -> np.ndarray:
    """[T, H, W, 1]: a picture of which a region moves, and all else stands still. moving: booleans [H, W].

    What is known is the picture in every frame (`still`), and all of it in the first.
    """
    moving = np.asarray(moving)
    if moving.ndim != 2 or moving.dtype != bool:
        raise ValueError(f'moving must be booleans [H, W], got {moving.dtype} of shape {moving.shape}')
    return _of_frames(num_frames, (0,)) | ~moving[None, :, :, None]


def still(image: Array, num_frames: int) -> Array:
    """A clip whose frames are all the image: [B, H, W, C] -> [B, T, H, W, C]."""
    return jnp.repeat(jnp.asarray(image)[:, None], num_frames, axis=1)


def _of_frames(num_frames: int, known: Iterable[int]) -> np.ndarray:
    return np.isin(np.arange(num_frames), list(known))[:, None, None, None]


# What is known, kept --------------------------------------------------------------------------------------------------


def keep_known(
    plan: Plan, schedule: Schedule, known: Known, keys: Array, *, fresh: bool | Array = True
) -> Callable[[Array, Array], Array]:
    """The `project` of `sampling.sample` that keeps what is known (Eq. 1), and after the last row keeps it exactly.

    Args:
        plan: the one that is followed; padded or traced, it may be an argument of a compiled function.
        keys: [B], the samples' own, whose noise here is another than the plan's.
        fresh: eps is drawn anew for every row, as the forward process has it, for solvers that add noise; False: eps is
            that of `starting_noise`, one path from noise to data, for those that do not. See `adds_noise`.
    """
    _check_known(known)
    live, t = jnp.asarray(plan.live), jnp.asarray(plan.t)
    ahead = jnp.append(t[1:], 0.0)  # row m ends where row m + 1 asks
    last = jnp.max(jnp.where(live, jnp.arange(len(live)), -1))

    def project(x, row):
        level = ahead[row]
        anew = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, KNOWN), row))(keys)
        first = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        keys_of_row = jnp.where(fresh, anew, first)
        eps = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys_of_row)
        alpha, sigma = (f(level).astype(x.dtype) for f in (schedule.alpha, schedule.sigma))
        there = jnp.where(row == last, known.x0, alpha * known.x0 + sigma * eps).astype(x.dtype)
        return jnp.where(known.mask, there, x)

    return project


def sample_known(
    denoiser: Denoiser,
    plan: Plan,
    schedule: Schedule,
    known: Known,
    cond: PyTree,
    keys: Array,
    *,
    fresh: bool | Array = True,
) -> Array:
    """Samples [B, ...] that have the known values exactly, and the others made to go with them.

    keys: [B], one for each sample; fresh: see `keep_known`.
    """
    project = keep_known(plan, schedule, known, keys, fresh=fresh)
    shape = known.x0.shape[1:]
    x = jnp.where(known.mask, starting_noise(plan, keys, shape, known.x0), starting_noise(plan, keys, shape))
    return sample(denoiser, plan, x, cond, keys, project=project)[0]


def adds_noise(plan: Plan) -> jax.Array:
    """Whether a plan draws noise on its way, which is what `fresh` asks: a boolean [], traced where the plan is."""
    first = 2 + plan.num_remembered
    return jnp.any(jnp.asarray(plan.to_x)[:, first:] != 0) | jnp.any(jnp.asarray(plan.to_anchor)[:, first:] != 0)


def _check_known(known: Known) -> None:
    """Raises ValueError where a mask is no mask of x0."""
    shape, of = jnp.shape(known.mask), jnp.shape(known.x0)
    if known.mask.dtype != bool:
        raise ValueError(f'a mask is booleans, True where x0 is known; got {known.mask.dtype}')
    fits = len(shape) <= len(of) and all(a in (1, b) for a, b in zip(shape[::-1], of[::-1]))
    if not fits:
        raise ValueError(f'a mask of shape {shape} does not broadcast to x0 of shape {of}')


# Long clips -----------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """A clip of `num_frames`, made in windows of `size` frames that begin every `stride` of them."""

    num_frames: int
    size: int
    stride: int

    @property
    def joins(self) -> list[int]:
        """Where a window begins or ends within the clip: k, for the step from frame k to k + 1."""
        starts = _starts(self.num_frames, self.size, self.stride)
        return sorted({start - 1 for start in starts[1:]} | {start + self.size - 1 for start in starts[:-1]})


def windowed(denoiser: Denoiser, window: int, stride: int, weights: Array | None = None) -> Denoiser:
    """A denoiser of clips of any length from one of `window` frames (MultiDiffusion over time).

    x: [B, T, ...] is cut into windows that begin every `stride` frames, and one that ends with the last; all of them go
    into one call on [B * windows, window, ...]. The estimate of frame t is

        sum_i w_i(t) e_i(t),    sum_i w_i(t) = 1                                                                    (2)

    over the windows i that hold it, and x = alpha x0 + sigma eps goes on holding.

    Args:
        weights: [window], positive, of the frames of a window, before they are normalised as in (2): ones are
            MultiDiffusion's mean. By default sin^2, which is near 0 at both ends of a window, so that no estimate sets
            in abruptly: where windows of 16 frames of a Gaussian process join, with ones x_{t+1} - x_t spreads 1.7
            times as far as elsewhere, and with sin^2 as far as elsewhere to 2 %.
    """
    check_whole('window', window)
    check_whole('stride', stride)
    if stride > window:
        raise ValueError(f'stride={stride} leaves frames between windows of {window}; it is at most the window')
    if weights is None:
        weights = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    weights = np.asarray(weights, np.float64)
    if weights.shape != (window,) or not (weights > 0).all():
        raise ValueError(f'weights must be {window} positive numbers, one for each frame of a window, got {weights}')

    def cut(x, cond):
        starts = _starts(x.shape[1], window, stride)
        cuts = jnp.stack([x[:, s : s + window] for s in starts], axis=1).reshape(-1, window, *x.shape[2:])
        return cuts, jax.tree.map(lambda c: jnp.repeat(jnp.asarray(c), len(starts), axis=0), cond), starts

    def init(x, cond):
        return denoiser.init(*cut(x, cond)[:2])

    def apply(state, x, t, cond):
        cuts, conds, starts = cut(x, cond)
        guess, state = denoiser.apply(state, cuts, jnp.repeat(t, len(starts)) if jnp.ndim(t) else t, conds)
        return jax.tree.map(lambda e: _blend(e, starts, x.shape[1], weights), guess), state

    return Denoiser(init, apply)


def _starts(num_frames: int, window: int, stride: int) -> list[int]:
    """Where windows begin."""
    if num_frames < window:
        raise ValueError(f'a clip of {num_frames} frames is shorter than the window of {window}')
    return [*range(0, num_frames - window, stride), num_frames - window]


def _blend(estimates: jax.Array, starts: list[int], num_frames: int, weights: np.ndarray) -> jax.Array:
    """Equation (2): [B * windows, window, ...] -> [B, T, ...]."""
    window, shape = len(weights), estimates.shape[2:]
    shares = np.zeros((len(starts), num_frames))
    for share, start in zip(shares, starts):
        share[start : start + window] = weights
    shares /= shares.sum(0)
    each = estimates.reshape(-1, len(starts), window, *shape)
    total = jnp.zeros((each.shape[0], num_frames, *shape), estimates.dtype)
    for i, start in enumerate(starts):
        share = jnp.asarray(shares[i, start : start + window], estimates.dtype).reshape(-1, *[1] * len(shape))
        total = total.at[:, start : start + window].add(share * each[:, i])
    return total
