"""The few types that rooms share.

Notation, everywhere: `t` in [0, 1], t = 0 is data and t = 1 is noise, and

    x_t = alpha(t) x0 + sigma(t) eps,      logsnr = log(alpha^2 / sigma^2).
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any
OrNone = Annotated[int, 'how many there are; 0: there is none']  # of options whose default is another number


class Estimate(NamedTuple):
    """What a denoiser believes about a noisy `x`: `x = alpha x0 + sigma eps` holds for every estimate.

    `variance`, where a network learned it, is the fraction in [0, 1] by which the log variance of a reverse step lies
    between its lower bound (0, the posterior's) and its upper bound (1, the forward kernel's); None otherwise.
    """

    x0: jax.Array  # [B, ...]
    eps: jax.Array  # [B, ...]
    variance: jax.Array | None = None  # [B, ...]


class Denoiser(NamedTuple):
    """A pair of pure functions, as an optimiser is in optax.

    init(x, cond) -> state          what the denoiser remembers between calls (a pytree of arrays, often empty)
    apply(state, x, t, cond) -> (Estimate, state)          x: [B, ...], t: [] or [B], cond: any pytree with leading B
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    apply: Callable[[PyTree, jax.Array, jax.Array, PyTree], tuple[Estimate, PyTree]]


class Model(NamedTuple):
    """A network as pure functions over a pytree of parameters.

    init(key, x, t, cond) -> params
    apply(params, x, t, cond, key=None) -> output [B, ..., out_channels]; `key` drives dropout, None switches it off
    project(params) -> params     what every update is followed by: the nearest parameters that the network allows
    log_variance(params, t) -> u [B]     how uncertain the network is at a time; None where it does not learn that
    """

    init: Callable[..., PyTree]
    apply: Callable[..., jax.Array]
    project: Callable[[PyTree], PyTree] = lambda params: params
    log_variance: Callable[[PyTree, jax.Array], jax.Array | None] = lambda params, t: None
