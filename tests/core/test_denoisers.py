"""Denoisers: a network, lifted; guidance over an exact class-conditional denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles, parameterizations, schedules
from diffjax.core.denoisers import network_denoiser, stateless
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.parameterizations import target
from diffjax.core.types import Denoiser, Estimate

X = np.random.default_rng(0).standard_normal((6, 2))
LABELS = np.array([0, 1, 2, 3, 0, 1])


def test_a_perfect_network_is_the_exact_denoiser(schedule, parameterization):
    """A network that outputs the exact target, from its scaled input alone, gives the mixture's own estimate."""
    mixture, t = oracles.gmm2d(), float(schedule.t_of_logsnr(np.float64(0.5)))
    alpha, sigma = schedule.alpha(np.float64(t)), schedule.sigma(np.float64(t))
    x = np.hypot(alpha, sigma) * X
    scale = parameterization.input_scale(schedule, np.float64(t))

    def network(scaled, time, labels):
        assert time.shape == (6,)
        guess = mixture.posterior(np.asarray(scaled) / scale, alpha, sigma, labels)
        return jnp.asarray(target(parameterization, schedule, guess.x0, guess.eps, np.full(6, t)))

    with jax.enable_x64(True):
        denoiser = network_denoiser(network, schedule, parameterization)
        guess, state = denoiser.apply(denoiser.init(x, LABELS), jnp.asarray(x), jnp.float64(t), LABELS)
    exact = mixture.posterior(x, alpha, sigma, LABELS)
    np.testing.assert_allclose(guess.x0, exact.x0, atol=1e-8)
    np.testing.assert_allclose(guess.eps, exact.eps, atol=1e-8)
    assert state == () and guess.variance is None


def test_a_learned_variance_stands_beside_the_estimate():
    def network(x, time, cond):
        return jnp.concatenate([0.5 * x, jnp.full_like(x, -0.5)], -1)

    x = jnp.asarray(X, jnp.float32)
    flow, v = schedules.Flow(), parameterizations.V()
    learned = network_denoiser(network, flow, v, learned_variance=True)
    plain = network_denoiser(lambda x, time, cond: 0.5 * x, flow, v)
    (guess, _), (expected, _) = (d.apply((), x, jnp.float32(0.4), None) for d in (learned, plain))
    np.testing.assert_array_equal(guess.x0, expected.x0)
    np.testing.assert_allclose(guess.variance, np.full((6, 2), 0.25))


def test_low_precision_networks_give_full_precision_estimates():
    denoiser = network_denoiser(lambda x, t, c: x.astype(jnp.bfloat16), schedules.Flow(), parameterizations.Velocity())
    assert denoiser.apply((), jnp.ones((2, 2)), jnp.float32(0.5), None)[0].x0.dtype == jnp.float32


@jax.jit
def guide(guidance, baseline, t, labels):
    denoiser = classifier_free(oracles.gmm2d().denoiser(schedules.Flow()), guidance, baseline)
    return denoiser.apply(denoiser.init(X, labels), jnp.asarray(X), t, labels)[0]


def guided(scale, labels=LABELS, baseline=-1, t=0.4, low=0.0, high=1.0):
    """The guided estimate of the mixture on the straight line, float64."""
    with jax.enable_x64(True):
        t = np.asarray(t)
        return jax.tree.map(np.asarray, guide(Guidance(*np.array([scale, low, high])), np.asarray(baseline), t, labels))


def exact(labels, t=0.4):
    return oracles.gmm2d().posterior(X, 1 - t, t, np.broadcast_to(labels, (6,)))


@pytest.mark.parametrize('scale', [0.0, 0.3, 1.0, 2.5, -1.0])
def test_the_formula(scale):
    """e_null + w (e_cond - e_null), for x0 and eps alike; 1 the conditional model, 0 the unconditional."""
    guess, given, null = guided(scale), exact(LABELS), exact(-1)
    np.testing.assert_allclose(guess.x0, null.x0 + scale * (given.x0 - null.x0), atol=1e-12)
    np.testing.assert_allclose(guess.eps, null.eps + scale * (given.eps - null.eps), atol=1e-12)
    if scale == 1:
        np.testing.assert_array_equal(guess.x0, guided(1.0, baseline=2).x0)  # to the bit, whatever the baseline
    np.testing.assert_allclose(0.6 * guess.x0 + 0.4 * guess.eps, X, atol=1e-12)  # still an estimate of this x


def test_a_negative_prompt_is_guidance():
    """e_prompt + a (e_prompt - e_negative) is w = 1 + a with the negative as the baseline (FORMULAS)."""
    given, negative = exact(LABELS), exact(3)
    guess = guided(1 + 0.7, baseline=3)
    np.testing.assert_allclose(guess.eps, given.eps + 0.7 * (given.eps - negative.eps), atol=1e-12)


@pytest.mark.parametrize(('t', 'inside'), [(0.1, False), (0.2, True), (0.4, True), (0.6, True), (0.7, False)])
def test_the_interval(t, inside):
    guess = guided(3.0, t=t, low=0.2, high=0.6)
    given, null = exact(LABELS, t), exact(-1, t)
    expected = null.x0 + 3 * (given.x0 - null.x0) if inside else given.x0
    np.testing.assert_allclose(guess.x0, expected, atol=1e-12)


def test_the_interval_with_a_time_for_each_example():
    t = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 0.3])
    guess = guided(3.0, t=t, low=0.2, high=0.6)
    for i in range(6):
        np.testing.assert_allclose(guess.x0[i], guided(3.0, t=t[i], low=0.2, high=0.6).x0[i], atol=1e-12)


def test_one_call_on_a_batch_of_two():
    """Both branches in one network call of 2B; pytree conditions; a baseline that broadcasts; state passed through."""
    calls = []

    def apply(state, x, t, cond):
        calls.append((x.shape, cond['text'].shape, cond['label'].tolist()))
        return Estimate(x * cond['text'].mean(-1, keepdims=True), x, 0 * x + cond['label'][:, None]), state + 1

    counting = Denoiser(lambda x, cond: jnp.zeros(x.shape[0]), apply)
    cond = {'text': jnp.full((3, 5), 2.0), 'label': jnp.asarray([4, 5, 6])}
    denoiser = classifier_free(counting, Guidance(2.0), {'text': jnp.zeros(5), 'label': jnp.asarray(9)})
    x = jnp.ones((3, 2))
    guess, state = denoiser.apply(denoiser.init(x, cond), x, jnp.float32(0.5), cond)
    assert calls == [((6, 2), (6, 5), [4, 5, 6, 9, 9, 9])]
    np.testing.assert_allclose(guess.x0, 4 * x)  # 0 + 2 (2 - 0)
    np.testing.assert_array_equal(guess.variance, [[4, 4], [5, 5], [6, 6]])  # the conditional branch's
    np.testing.assert_array_equal(state, np.ones(6))


def test_guidance_nests():
    """Guidance of a guided denoiser: w2 of (w1 of ...); twice w = 1 is still the conditional model."""
    base = stateless(lambda x, t, cond: Estimate(x + cond[:, None], x - cond[:, None]))
    inner = classifier_free(base, Guidance(3.0), jnp.asarray(0.0))
    outer = classifier_free(inner, Guidance(2.0), jnp.asarray(1.0))
    x, cond = jnp.ones((3, 2)), jnp.asarray([1.0, 2.0, 3.0])
    guess, _ = outer.apply((), x, jnp.float32(0.5), cond)
    np.testing.assert_allclose(guess.x0, x + (3 * (1 + 2 * (cond - 1)))[:, None], rtol=1e-6)
