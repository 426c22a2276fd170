"""Optimisers and learning-rate schedules, put together from optax."""

import math

import jax
import jax.numpy as jnp
import optax

from diffjax.core.types import PyTree
from diffjax.training.sharding import is_stacked

__all__ = ['adam', 'adamw', 'muon', 'sgd']

DECAYS = ('constant', 'cosine', 'linear', 'rsqrt')


def learning_rate_schedule(
    peak: float, decay: str, warmup_steps: int, num_steps: int, reference_steps: int = 0
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then `decay` over what is left of `num_steps`.

    `rsqrt` is peak / sqrt(max(step / reference_steps, 1)) (Karras et al. 2024, Eq. 67); reference_steps = 0 means
    warmup_steps, at the end of which the decay then begins (Vaswani et al. 2017, section 5.3).
    Raises ValueError for an unknown decay, or a warm-up that does not end before the run.
    """
    if decay not in DECAYS:
        raise ValueError(f'decay is one of {", ".join(DECAYS)}; got {decay!r}')
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(f'warmup_steps = {warmup_steps} must be below num_steps = {num_steps}, and 0 or more')
    if reference_steps and (decay != 'rsqrt' or reference_steps < warmup_steps):
        raise ValueError(
            f'reference_steps = {reference_steps} is for decay rsqrt and not below warmup_steps = {warmup_steps}; '
            f'decay is {decay!r}'
        )
    left, first = num_steps - warmup_steps, max(warmup_steps, 1)
    after = {
        'constant': optax.constant_schedule(peak),
        'cosine': optax.cosine_decay_schedule(peak, left),
        'linear': optax.linear_schedule(peak, 0.0, left),
        'rsqrt': lambda step: peak * jnp.maximum((first + step) / (reference_steps or first), 1.0) ** -0.5,
    }[decay]
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def is_matrix(params: PyTree) -> PyTree:
    """True where weight decay applies: kernels; not biases, norms, tables of labels or positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def _check(**options: float) -> None:
    """Raises ValueError for an option that would turn, blow up or stop the descent; momenta are below 1."""
    for name, value in options.items():
        most = 1.0 if name in ('b1', 'b2', 'momentum') else math.inf
        if not 0 <= value < most:
            raise ValueError(f'{name} is a number from 0 on{f" and below {most:g}" if most == 1 else ""}, got {value}')


def _chain(clip_norm: float | None, *parts: optax.GradientTransformation) -> optax.GradientTransformation:
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f'clip_norm is a number above 0, or None for no clipping, got {clip_norm}')
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    return optax.chain(*clip, *parts)


def adamw(
    *,
    num_steps: int,
    learning_rate: float = 1e-4,
    decay: str = 'constant',
    warmup_steps: int = 0,
    reference_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; kernels alone are decayed."""
    _check(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    schedule = learning_rate_schedule(learning_rate, decay, warmup_steps, num_steps, reference_steps)
    return _chain(clip_norm, optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=is_matrix))


def muon(
    *,
    num_steps: int,
    learning_rate: float = 1e-2,
    adam_learning_rate: float = 1e-3,
    decay: str = 'constant',
    warmup_steps: int = 0,
    reference_steps: int = 0,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.99,
    rms: float = 0.2,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for kernels, Adam for all else, after clipping by the global norm; kernels decay.

    A kernel, its last axis against all others, is moved along the orthogonal matrix nearest to its averaged gradient,
    with entries of root mean square `rms` (Liu et al. 2025, arXiv:2502.16982, section 2.2), as Adam's updates have.
    """
    _check(learning_rate=learning_rate, adam_learning_rate=adam_learning_rate, momentum=momentum, b1=b1, b2=b2)
    _check(rms=rms, weight_decay=weight_decay)
    rates = [
        learning_rate_schedule(peak, decay, warmup_steps, num_steps, reference_steps)
        for peak in (learning_rate, adam_learning_rate)
    ]

    def axes(params: PyTree) -> PyTree:
        def of(path, leaf):
            layers = any(is_stacked(str(getattr(entry, 'key', ''))) for entry in path)  # axis 0 counts them
            return optax.contrib.MuonDimensionNumbers(tuple(range(int(layers), leaf.ndim - 1)), leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    turned = optax.contrib.muon(
        rates[0], beta=momentum, weight_decay=weight_decay, muon_weight_dimension_numbers=axes, consistent_rms=rms
    )

    def kinds(params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda kernel, leaf: 'muon' if kernel and leaf.ndim > 1 else 'adam', is_matrix(params), params
        )

    return _chain(clip_norm, optax.multi_transform({'muon': turned, 'adam': optax.adam(rates[1], b1, b2)}, kinds))


def adam(
    *,
    num_steps: int,
    learning_rate: float = 1e-4,
    decay: str = 'constant',
    warmup_steps: int = 0,
    reference_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) after clipping by the global norm."""
    _check(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
    schedule = learning_rate_schedule(learning_rate, decay, warmup_steps, num_steps, reference_steps)
    return _chain(clip_norm, optax.adam(schedule, b1, b2, eps))


def sgd(
    *,
    num_steps: int,
    learning_rate: float = 1e-2,
    decay: str = 'constant',
    warmup_steps: int = 0,
    reference_steps: int = 0,
    momentum: float = 0.9,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum after clipping by the global norm."""
    _check(learning_rate=learning_rate, momentum=momentum)
    schedule = learning_rate_schedule(learning_rate, decay, warmup_steps, num_steps, reference_steps)
    return _chain(clip_norm, optax.sgd(schedule, momentum))
