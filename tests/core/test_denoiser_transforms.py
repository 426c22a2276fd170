"""Thresholds and zero-init: their formulas in NumPy, the identity x = alpha x0 + sigma eps, and both ends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles, schedules
from diffjax.core.denoisers import stateless
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.sampling import pad, sample, sample_keys
from diffjax.core.solvers import euler, heun
from diffjax.core.transforms import Transforms, dynamic_threshold, static_threshold, transformed, zero_init
from diffjax.core.types import Estimate

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6, 5, 2))
X0 = RNG.standard_normal((4, 6, 5, 2)) * np.array([0.2, 1.0, 2.0, 8.0])[:, None, None, None]
X0[0] = np.clip(X0[0], -0.9, 0.9)  # the first sample lies within [-1, 1]


def ask(wrap, schedule, t, x0=X0):
    """(estimate of the wrapped denoiser, estimate before) in float64, for a denoiser that believes in x0."""
    alpha, sigma = (float(f(np.float64(t))) for f in (schedule.alpha, schedule.sigma))
    eps = (X - alpha * x0) / sigma if sigma else np.ones_like(x0)
    before = Estimate(jnp.asarray(x0), jnp.asarray(eps), jnp.full(x0.shape, 0.5))
    denoiser = wrap(stateless(lambda x, t, cond: before))
    guess, _ = denoiser.apply(denoiser.init(X, None), jnp.asarray(X), jnp.asarray(t, jnp.float64), None)
    return jax.tree.map(np.asarray, (guess, before))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def static(schedule, limit=1.0):
    return lambda denoiser: static_threshold(denoiser, schedule, limit)


def dynamic(schedule, quantile=0.9, maximum=None):
    return lambda denoiser: dynamic_threshold(denoiser, schedule, quantile, maximum)


@pytest.mark.parametrize('limit', [0.5, 1.0, 3.0])
def test_static_threshold(limit):
    flow = schedules.Flow()
    guess, before = ask(static(flow, limit), flow, 0.3)
    np.testing.assert_array_equal(guess.x0, np.clip(X0, -limit, limit))
    inside = np.abs(X0) <= limit
    np.testing.assert_array_equal(guess.eps[inside], before.eps[inside])
    np.testing.assert_allclose(guess.eps, (X - 0.7 * np.clip(X0, -limit, limit)) / 0.3, atol=1e-12)
    np.testing.assert_array_equal(guess.variance, before.variance)
    twice, _ = ask(lambda d: static(flow, limit)(static(flow, limit)(d)), flow, 0.3)
    jax.tree.map(np.testing.assert_array_equal, twice, guess)


@pytest.mark.parametrize(
    ('quantile', 'maximum'), [(0.5, np.inf), (0.9, np.inf), (0.995, 1.5), (1.0, np.inf), (1.0, 1.0)]
)
def test_dynamic_threshold(quantile, maximum):
    """s is the quantile of each sample, at least 1; clipped to [-s, s] and divided by s (Saharia et al. 2022)."""
    cosine = schedules.Cosine()
    guess, before = ask(dynamic(cosine, quantile, maximum), cosine, 0.3)
    for i in range(4):
        s = min(max(np.percentile(np.abs(X0[i]), 100 * quantile), 1), maximum)
        np.testing.assert_allclose(guess.x0[i], np.clip(X0[i], -s, s) / s, atol=1e-12)
    alpha, sigma = np.cos(0.15 * np.pi), np.sin(0.15 * np.pi)
    np.testing.assert_allclose(alpha * guess.x0 + sigma * guess.eps, X, atol=1e-12)
    np.testing.assert_array_equal(guess.x0[0], X0[0])  # it lay within [-1, 1]
    np.testing.assert_array_equal(guess.eps[0], before.eps[0])
    assert np.abs(guess.x0).max() <= 1


def test_dynamic_threshold_at_the_ends_of_its_settings():
    """The whole range divides by the largest value; a maximum of 1 is the static threshold."""
    flow = schedules.Flow()
    guess, _ = ask(dynamic(flow, 1.0), flow, 0.3)
    largest = np.abs(X0).max((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(guess.x0, X0 / np.maximum(largest, 1), atol=1e-12)
    clipped, _ = ask(dynamic(flow, 0.995, 1.0), flow, 0.3)
    np.testing.assert_array_equal(clipped.x0, np.clip(X0, -1, 1))


@pytest.mark.parametrize('wrap', [static, dynamic])
def test_thresholds_at_both_ends(schedule, wrap):
    """Everywhere the estimate adds up, but at sigma = 0, where eps is left alone; finite throughout, in float32 too."""
    for t in (0.0, 1e-6, 0.5, 1.0):
        guess, before = ask(wrap(schedule), schedule, t)
        alpha, sigma = (float(f(np.float64(t))) for f in (schedule.alpha, schedule.sigma))
        assert np.isfinite(guess.eps).all() and (np.abs(guess.x0) <= 1).all()
        if sigma:
            np.testing.assert_allclose(alpha * guess.x0 + sigma * guess.eps, X, atol=1e-9)
        else:
            np.testing.assert_array_equal(guess.eps, before.eps)
        if not alpha:
            np.testing.assert_array_equal(guess.eps, before.eps)
    with jax.enable_x64(False):
        single = wrap(schedule)(stateless(lambda x, t, cond: Estimate(3 * x, 0 * x)))
        for t in (0.0, 1e-12, 1e-4, 1.0):
            guess, _ = single.apply((), jnp.asarray(X, jnp.float32), jnp.float32(t), None)
            assert np.isfinite(guess.eps).all() and np.isfinite(guess.x0).all()


def test_zero_init_holds_x_still(schedule):
    """While it lasts alpha' x0 + sigma' eps is 0, at both ends too, and the estimate adds up."""
    inner = stateless(lambda x, t, cond: Estimate(2 * x, 3 * x, x))
    denoiser, x = zero_init(inner, schedule, 2), jnp.asarray(X)
    state = denoiser.init(x, None)
    for call, t in enumerate((0.0, 1.0, 0.5)):
        guess, state = denoiser.apply(state, x, jnp.float64(t), None)
        if call == 2:
            np.testing.assert_array_equal(guess.x0, 2 * X)
            np.testing.assert_array_equal(guess.eps, 3 * X)
            break
        t = np.float64(t)
        slope = schedule.alpha_prime(t) * guess.x0 + schedule.sigma_prime(t) * guess.eps
        size = np.hypot(schedule.alpha_prime(t), schedule.sigma_prime(t))
        np.testing.assert_allclose(slope / size, 0, atol=1e-9)
        np.testing.assert_allclose(schedule.alpha(t) * guess.x0 + schedule.sigma(t) * guess.eps, X, atol=1e-9)
        np.testing.assert_array_equal(guess.variance, X)
    assert state[0] == 3


@pytest.mark.parametrize(('solver', 'calls', 'steps'), [(euler, 1, 1), (euler, 3, 3), (heun, 2, 1), (heun, 4, 2)])
def test_zero_init_skips_first_steps(solver, calls, steps):
    """Euler in t, and Heun with two calls in each step, arrive as if they had begun later from the same x."""
    flow, grid, keys = schedules.Flow(), np.linspace(1, 0, 9), sample_keys(jax.random.key(0), 4)
    exact, x = oracles.gmm2d().denoiser(flow), jnp.asarray(X[:, 0, :2, 0])
    labels = jnp.arange(4)
    whole = sample(zero_init(exact, flow, calls), solver(flow, grid, coordinate='t'), x, labels, keys)[0]
    later = sample(exact, solver(flow, grid[steps:], coordinate='t'), x, labels, keys)[0]
    np.testing.assert_allclose(whole, later, atol=1e-12)


def test_zero_init_counts_rows_and_not_padding():
    flow, keys, x = schedules.Flow(), sample_keys(jax.random.key(0), 4), jnp.asarray(X[:, 0, :2, 0])
    plan = euler(flow, np.linspace(1, 0, 4), coordinate='t')
    held = zero_init(oracles.gmm2d().denoiser(flow), flow, 3)
    np.testing.assert_allclose(sample(held, pad(plan, 8, 3, 1), x, jnp.arange(4), keys)[0], x, atol=1e-12)


def test_the_order_of_nesting():
    """Thresholds within zero-init; static within dynamic; None builds no wrapper."""
    flow = schedules.Flow()
    base = stateless(lambda x, t, cond: Estimate(4 * x, (x - 0.6 * 4 * x) / 0.4))
    assert transformed(base, flow, Transforms()) is base
    both = transformed(base, flow, Transforms(threshold=3.0, quantile=1.0, zero_init=1))
    x = jnp.asarray(5 * X)
    state = both.init(x, None)
    first, state = both.apply(state, x, jnp.float64(0.4), None)
    np.testing.assert_allclose(first.x0, x, atol=1e-12)  # not clipped: with no velocity x0 = x = eps on Flow
    second, _ = both.apply(state, x, jnp.float64(0.4), None)
    np.testing.assert_allclose(second.x0, np.clip(4 * x, -3, 3) / 3, atol=1e-12)
    np.testing.assert_allclose(0.6 * second.x0 + 0.4 * second.eps, x, atol=1e-12)


def test_thresholds_act_on_the_guided_estimate():
    """What guidance drives out of range comes back; samples of strong guidance end within it."""
    mixture, flow, labels = oracles.gmm2d(), schedules.Flow(), jnp.arange(4)
    guided = classifier_free(mixture.denoiser(flow), Guidance(8.0), jnp.asarray(-1))
    clipped = static_threshold(guided, flow, 1.2)
    plan, keys = euler(flow, np.linspace(1, 0, 9)), sample_keys(jax.random.key(0), 4)
    x = jnp.asarray(X[:, 0, :2, 0])
    free, held = (np.asarray(sample(d, plan, x, labels, keys)[0]) for d in (guided, clipped))
    assert np.abs(free).max() > 1.5
    assert np.abs(held).max() <= 1.2 + 1e-12


def test_settings_are_arguments():
    """One program for every value of every transform."""
    traces, flow, labels = [], schedules.Flow(), jnp.arange(4)
    plan, keys = euler(flow, np.linspace(1, 0, 6)), sample_keys(jax.random.key(0), 4)
    x = jnp.asarray(3 * X[:, 0, :2, 0])

    @jax.jit
    def draw(transforms):
        traces.append(transforms)
        return sample(transformed(oracles.gmm2d().denoiser(flow), flow, transforms), plan, x, labels, keys)[0]

    results = [
        np.asarray(draw(Transforms(np.float64(a), np.float64(b), np.float64(c), np.int32(d))))
        for a, b, c, d in ((9, 1, 9, 0), (0.4, 1, 9, 0), (9, 0.2, 9, 0), (9, 1, 1.1, 0), (9, 1, 9, 2))
    ]
    assert len(traces) == 1
    for one, other in itertools.combinations(results, 2):
        assert np.abs(one - other).max() > 1e-3
