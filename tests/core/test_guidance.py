"""What refines guidance: its rescaling (Lin et al. 2024) and CFG-Zero* (Fan et al. 2025), against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles, parameterizations, schedules
from diffjax.core.denoisers import stateless
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.sampling import sample, sample_keys
from diffjax.core.solvers import euler
from diffjax.core.types import Estimate

RNG = np.random.default_rng(0)
X, GIVEN, BASE = RNG.standard_normal((3, 5, 4, 3))  # the noisy state and the x0 of each branch: 5 samples of [4, 3]


def branches(schedule, t, given=GIVEN, base=BASE):
    """A denoiser with these two branches, condition 1 and 0; and both estimates in NumPy float64."""
    alpha, sigma = (np.broadcast_to(f(np.float64(t)), (5,))[:, None, None] for f in (schedule.alpha, schedule.sigma))
    both = [(x0, (X - alpha * x0) / sigma) for x0 in (given, base)]

    def denoise(x, t, cond):
        del t
        of = cond[:, None, None] == 1
        x0, eps = (jnp.where(of, jnp.concatenate([g, g]), jnp.concatenate([b, b])) for g, b in zip(*both))
        return Estimate(x0, eps, 0.25 * jnp.ones_like(x))

    return stateless(denoise), both


def guided(schedule, t, parameterization=None, given=GIVEN, base=BASE, **settings):
    """(guided estimate, both branches), float64."""
    with jax.enable_x64(True):
        denoiser, both = branches(schedule, t, given, base)
        guidance = Guidance(**{name: jnp.asarray(value) for name, value in settings.items()})
        wrapped = classifier_free(
            denoiser, guidance, jnp.asarray(0), schedule=schedule, parameterization=parameterization
        )
        guess, _ = wrapped.apply((), jnp.asarray(X), jnp.asarray(t, jnp.float64), jnp.ones(5, int))
        return jax.tree.map(np.asarray, guess), both


def adds_up(guess, schedule, t):
    alpha, sigma = schedule.alpha(np.float64(t)), schedule.sigma(np.float64(t))
    np.testing.assert_allclose(alpha * guess.x0 + sigma * guess.eps, X, atol=1e-9)


OUTPUTS = {  # of an estimate on Flow at t = 0.4, written out
    'Eps': lambda x0, eps: eps,
    'X0': lambda x0, eps: x0,
    'V': lambda x0, eps: 0.6 * eps - 0.4 * x0,
    'Velocity': lambda x0, eps: eps - x0,
}


@pytest.mark.parametrize('name', OUTPUTS)
@pytest.mark.parametrize('phi', [0.3, 1.0])
def test_rescale_is_the_papers_formula(name, phi):
    """y_cfg (phi std_cond / std_cfg + 1 - phi) in the network's output; at phi = 1 the conditional's std exactly."""
    output = OUTPUTS[name]
    kind = getattr(parameterizations, name)()
    guess, (given, base) = guided(schedules.Flow(), 0.4, kind, scale=4.0, rescale=phi)
    y_given, y_base = output(*given), output(*base)
    y = y_base + 4 * (y_given - y_base)
    axes = {'axis': (1, 2), 'keepdims': True}
    expected = phi * y * y_given.std(**axes) / y.std(**axes) + (1 - phi) * y
    np.testing.assert_allclose(output(guess.x0, guess.eps), expected, atol=1e-11)
    adds_up(guess, schedules.Flow(), 0.4)
    np.testing.assert_array_equal(guess.variance, np.full(X.shape, 0.25))
    if phi == 1:
        std = output(guess.x0, guess.eps).std((1, 2))
        np.testing.assert_allclose(std, y_given.std((1, 2)), rtol=1e-10)
        assert (std < 0.9 * y.std((1, 2))).all()  # it had something to do


@pytest.mark.parametrize('settings', [{'rescale': 0.0}, {'optimal_scale': False}])
def test_a_refinement_at_zero_is_plain_guidance(settings):
    plain, _ = guided(schedules.Cosine(), 0.3, scale=3.0)
    refined, _ = guided(schedules.Cosine(), 0.3, parameterizations.V(), scale=3.0, **settings)
    jax.tree.map(np.testing.assert_array_equal, refined, plain)


def test_at_scale_one_and_outside_the_interval_nothing_is_refined():
    """To the bit the conditional branch under the optimised scale; within rounding under the rescaling."""
    for settings in ({'scale': 1.0}, {'scale': 4.0, 'low': 0.5, 'high': 0.9}):
        guess, (given, _) = guided(schedules.Flow(), 0.4, optimal_scale=True, **settings)
        np.testing.assert_array_equal(guess.x0, given[0])
        np.testing.assert_array_equal(guess.eps, given[1])
        guess, _ = guided(schedules.Flow(), 0.4, parameterizations.Velocity(), rescale=0.7, **settings)
        np.testing.assert_allclose(guess.x0, given[0], atol=1e-13)


def test_cfg_zero_star_is_the_papers_formula_on_flow():
    """v = (1 - w) s* v_base + w v_cond with v = eps - x0 and s* from each sample's inner products."""
    guess, (given, base) = guided(schedules.Flow(), 0.4, scale=4.0, optimal_scale=True)
    v_given, v_base = given[1] - given[0], base[1] - base[0]
    for i in range(5):
        s = np.vdot(v_given[i], v_base[i]) / np.vdot(v_base[i], v_base[i])
        np.testing.assert_allclose((guess.eps - guess.x0)[i], -3 * s * v_base[i] + 4 * v_given[i], atol=1e-11)
        assert abs(s - 1) > 0.1
    adds_up(guess, schedules.Flow(), 0.4)


def test_cfg_zero_star_projects_velocities_of_the_schedule(schedule):
    """With x_t's own derivative as v: what guidance adds to v_cond is orthogonal to v_base, the least squares."""
    t = float(schedule.t_of_logsnr(np.float64(0.3)))
    guess, (given, base) = guided(schedule, t, scale=3.0, optimal_scale=True)
    h = 1e-6
    slopes = [(f(np.float64(t + h)) - f(np.float64(t - h))) / (2 * h) for f in (schedule.alpha, schedule.sigma)]

    def velocity(pair):
        return slopes[0] * pair[0] + slopes[1] * pair[1]

    added = velocity(guess) - velocity(given)  # 2 (v_cond - s* v_base)
    v_base = velocity(base)
    cosine = (added * v_base).sum((1, 2)) / np.sqrt((added**2).sum((1, 2)) * (v_base**2).sum((1, 2)))
    np.testing.assert_allclose(cosine, 0, atol=1e-5)
    adds_up(guess, schedule, t)


def test_parallel_branches_need_no_guidance():
    """v_cond = c v_base: the optimised baseline is v_cond itself, whatever the scale."""
    flow, t, factor = schedules.Flow(), 0.4, np.array([0.5, 2.0, -1.0, 1.0, 3.0])[:, None, None]
    v_base = (X - BASE) / t  # eps - x0 where x = (1 - t) x0 + t eps
    given = X - t * factor * v_base
    guess, _ = guided(flow, t, given=given, scale=7.0, optimal_scale=True)
    np.testing.assert_allclose(guess.x0, given, atol=1e-11)


def test_both_refinements_together():
    """The rescaling comes last: at phi = 1 the output has the conditional's std, along CFG-Zero*'s direction."""
    flow, velocity = schedules.Flow(), parameterizations.Velocity()
    zero, _ = guided(flow, 0.4, scale=4.0, optimal_scale=True)
    guess, (given, _) = guided(flow, 0.4, velocity, scale=4.0, optimal_scale=True, rescale=1.0)
    v, v_zero, v_given = (e[1] - e[0] for e in (guess, zero, given))
    np.testing.assert_allclose(v.std((1, 2)), v_given.std((1, 2)), rtol=1e-10)
    np.testing.assert_allclose(v / v_zero, np.broadcast_to((v / v_zero)[:, :1, :1], v.shape), rtol=1e-8)


def test_equal_times_of_each_example():
    """t of shape [B] is t of shape []."""
    one, _ = guided(schedules.VP(), 0.4, parameterizations.V(), scale=3.0, optimal_scale=True, rescale=0.7)
    each, _ = guided(schedules.VP(), np.full(5, 0.4), parameterizations.V(), scale=3.0, optimal_scale=True, rescale=0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), each, one)


@pytest.mark.parametrize('settings', [{'rescale': 0.7}, {'optimal_scale': True}])
def test_finite_at_both_ends(schedule, settings):
    """float32, with branches that agree as exact ones do: x0 = x at sigma = 0; the mean, whatever x, at alpha = 0."""
    mixture, x, labels = oracles.gmm2d(), jnp.asarray(X[:, :2, 0], jnp.float32), jnp.asarray([0, 1, 2, 3, 0])

    @jax.jit
    def guide(t):
        guided = classifier_free(
            mixture.denoiser(schedule),
            Guidance(3.0, **settings),
            jnp.asarray(-1),
            schedule=schedule,
            parameterization=parameterizations.EDM(),
        )
        return guided.apply((), x, t, labels)[0]

    for t in (0.0, 1.0, 0.5):
        guess, t = guide(jnp.float32(t)), np.float64(t)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        for half in (guess.x0, guess.eps):
            assert np.isfinite(half).all()
        scale = 1e-5 * max(1, np.abs(alpha * guess.x0).max(), np.abs(sigma * guess.eps).max())
        np.testing.assert_allclose(alpha * guess.x0 + sigma * guess.eps, x, atol=scale)
        if t == 0:
            np.testing.assert_allclose(guess.x0, x, atol=1e-4)


def test_vanishing_outputs_are_left_alone():
    """A velocity of zero has no direction and no std: 0 / 0 becomes nothing, not NaN."""
    flow, t = schedules.Flow(), 0.4
    for settings in ({'optimal_scale': True}, {'rescale': 1.0}):
        guess, _ = guided(flow, t, parameterizations.Velocity(), given=X, base=X, scale=3.0, **settings)
        np.testing.assert_allclose(guess.x0, X, atol=1e-12)


def test_what_is_missing_is_said():
    base = stateless(lambda x, t, cond: Estimate(x, x))
    with pytest.raises(ValueError, match='optimal scale is about velocities: give the schedule'):
        classifier_free(base, Guidance(optimal_scale=True), 0)
    with pytest.raises(ValueError, match="about the network's output: give the schedule and the parameterization"):
        classifier_free(base, Guidance(rescale=0.5), 0, schedule=schedules.Flow())


def test_settings_are_arguments():
    """One program for every scale, phi, interval and for CFG-Zero* on and off."""
    traces, flow = [], schedules.Flow()
    plan, keys = euler(flow, np.linspace(1, 0, 4)), sample_keys(jax.random.key(0), 3)
    x, labels = jnp.asarray(X[:3, :2, 0], jnp.float32), jnp.asarray([0, 1, 2])

    @jax.jit
    def draw(guidance):
        traces.append(guidance)
        velocity = parameterizations.Velocity()
        denoiser = oracles.gmm2d().denoiser(flow)
        guided = classifier_free(denoiser, guidance, jnp.asarray(-1), schedule=flow, parameterization=velocity)
        return sample(guided, plan, x, labels, keys)[0]

    def settings(scale=3.0, low=0.0, high=1.0, rescale=0.0, on=False):
        return Guidance(*(np.float32(v) for v in (scale, low, high, rescale)), np.bool_(on))

    plain = draw(settings())
    for other in (settings(2.0), settings(low=0.5), settings(rescale=0.7), settings(on=True)):
        assert np.abs(draw(other) - plain).max() > 1e-3
    assert len(traces) == 1
