"""The training loss: what it weighs, where it is finite, and where its minimum lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles, parameterizations, schedules, times, weights
from diffjax.core.losses import Loss
from diffjax.core.parameterizations import target

RNG = np.random.default_rng(0)
NUM = 6
X0, EPS, MISS = RNG.standard_normal((3, NUM, 2, 3))


def reach(schedule, low=-5.5, high=7.0):
    """Uniform times between two levels that every schedule reaches, and their density in logsnr by differences."""
    ends = schedule.t_of_logsnr(np.array([high, low]))
    between = times.Uniform(low=float(ends[0]), high=float(ends[1]))

    def density(level):
        h = 1e-5
        t = schedule.t_of_logsnr(np.array([level - h, level + h]))
        return (t[0] - t[1]) / (2 * h) / (ends[1] - ends[0])

    return between, density


WEIGHTS = {  # (snr, density of logsnr) -> (weight on the x0 error, weight on the eps error): each paper's, one of them
    'eps': lambda snr, p: (None, 1.0),
    'x0': lambda snr, p: (1.0, None),
    'v': lambda snr, p: (snr + 1, None),
    'truncated_snr': lambda snr, p: (np.maximum(snr, 1.0), None),
    'min_snr': lambda snr, p: (np.minimum(snr, 5.0), None),
    'edm': lambda snr, p: ((1 / snr + 0.25) / (0.25 / snr), None),
    'elbo': lambda snr, p: (None, 0.5 / p),
    'sigmoid': lambda snr, p: (None, 0.5 / (1 + snr) / p),
}


def test_weights_are_their_papers(schedule, parameterization, weight):
    """A network whose estimate misses x0 by a known amount pays the same, whatever it predicts."""
    name = weight.__name__
    # the inverse cosine rushes through the outer levels: times there would be refused
    low, high = (-3.0, 3.5) if isinstance(schedule, schedules.InverseCosine) else (-5.5, 7.0)
    between, density = reach(schedule, low, high)
    levels = np.linspace(low + 0.2, high - 0.7, NUM)
    t = schedule.t_of_logsnr(levels)
    x0_miss, eps_miss = MISS, -np.exp(0.5 * levels)[:, None, None] * MISS
    with jax.enable_x64(True):
        loss = Loss(schedule=schedule, parameterization=parameterization, times=between, weight=weight)
        output = target(parameterization, schedule, X0 + x0_miss, EPS + eps_miss, t)
        value, metrics = loss.at(lambda x, time: output, *map(jnp.asarray, (X0, t, EPS)))
    if name == 'target':
        expected = metrics['mse']
    else:
        on_x0, on_eps = WEIGHTS[name](np.exp(levels), np.array([density(level) for level in levels]))
        expected = on_eps * (eps_miss**2).mean((1, 2)) if on_x0 is None else on_x0 * (x0_miss**2).mean((1, 2))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_target_weight_is_the_plain_error(schedule, parameterization, formula):
    """mse is the error of the target as its paper writes it; the `target` weight leaves it as it is."""
    t = float(schedule.t_of_logsnr(np.float64(0.7)))
    y = formula(type(parameterization).__name__, schedule, X0, EPS, t)
    between, _ = reach(schedule)
    with jax.enable_x64(True):
        loss = Loss(schedule=schedule, parameterization=parameterization, times=between, weight=weights.target)
        value, metrics = loss.at(lambda x, time: jnp.asarray(MISS), X0, jnp.full(NUM, t), EPS)
    expected = ((MISS - y) ** 2).mean((1, 2))
    np.testing.assert_allclose(metrics['mse'], expected, rtol=1e-2)
    np.testing.assert_allclose(value, metrics['mse'], rtol=1e-6)


def test_flow_matching_is_the_plain_velocity_loss():
    """Flow, velocity, target weight: mean (y_hat - (eps - x0))^2 (Lipman et al. 2023, Eq. 9)."""
    loss = Loss(
        schedule=schedules.Flow(),
        parameterization=parameterizations.Velocity(),
        times=times.LogitNormal(),
        weight=weights.target,
    )
    t = jnp.linspace(0, 1, NUM)
    value, _ = loss.at(lambda x, time: jnp.sin(x) + time[:, None, None] / 1000, X0, t, EPS)
    at = np.asarray(t)[:, None, None]
    expected = ((np.sin((1 - at) * X0 + at * EPS) + at - (EPS - X0)) ** 2).mean((1, 2))
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def exact_outputs(mixture, schedule, parameterization, x0, t, eps):
    """What an exact network says at (x0, eps, t); NumPy float64."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    guess = mixture.posterior(alpha[:, None] * x0 + sigma[:, None] * eps, alpha, sigma)
    return target(parameterization, schedule, guess.x0, guess.eps, t)


def whole_line(name, schedule):
    """Each time distribution, made to cover nearly every logsnr that matters to the sigmoid weight."""
    ends = schedule.t_of_logsnr(np.array([12.0, -12.0]))
    options = {'Uniform': {'low': float(ends[0]), 'high': float(ends[1])}, 'Discrete': {'num_timesteps': 20000}}
    if name == 'LogitNormal' and isinstance(schedule, schedules.InverseCosine):  # sigma^2 grows like a root of t
        return times.LogitNormal(mean=0.0, std=4.0)
    wide = {'LogitNormal': {'mean': -1.0, 'std': 2.2}, 'LogNormalSigma': {'mean': -0.5, 'std': 1.8}}
    return getattr(times, name)(**options.get(name, wide.get(name, {})))


def test_the_sigmoid_loss_knows_no_schedule_and_no_times(schedule, distribution):
    """Kingma & Gao 2023, Eq. 6: the loss is the integral of w(logsnr) error(logsnr) d logsnr, here by the trapezoid
    rule, and its average over any times, here at equal steps of u, must be that. 4 pairs (x0, eps), exact denoiser.
    """
    if isinstance(schedule, schedules.InverseCosine) and isinstance(distribution, times.Discrete):
        with pytest.raises(ValueError, match='at t = 1 .* no finite variance'):  # it passes that level infinitely fast
            Loss(schedule=schedule, parameterization=parameterizations.V(), times=distribution, weight=weights.sigmoid)
        return
    mixture, pairs = oracles.gmm2d(), np.random.default_rng(3).standard_normal((2, 4, 1, 2))
    reached = max(-12.0, float(schedule.logsnr(np.float64(1))))
    level = np.linspace(reached, 12, 1201)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-level)), 1 / np.sqrt(1 + np.exp(level))
    x0, eps = np.broadcast_to(pairs, (2, 4, len(level), 2)).reshape(2, -1, 2)
    a, s = np.tile(alpha, 4), np.tile(sigma, 4)
    error = mixture.posterior(a[:, None] * x0 + s[:, None] * eps, a, s).eps - eps
    error = (error**2).mean(-1).reshape(4, -1).mean(0)
    expected = np.trapezoid(0.5 / (1 + np.exp(level)) * error, level)

    u = (np.arange(1000) + 0.5) / 1000
    v = parameterizations.V()
    with jax.enable_x64(True):
        covering = whole_line(type(distribution).__name__, schedule)
        loss = Loss(schedule=schedule, parameterization=v, times=covering, weight=weights.sigmoid)
        t = np.tile(np.asarray(covering.sample(schedule, jnp.asarray(u))), 4)
        x0, eps = np.broadcast_to(pairs, (2, 4, len(u), 2)).reshape(2, -1, 2)
        output = exact_outputs(mixture, schedule, v, x0, t, eps)
        value, _ = loss.at(lambda x, time: output, jnp.asarray(x0), jnp.asarray(t), jnp.asarray(eps))
        value = np.asarray(value)
    assert float(value.mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize('name', ['Flow', 'EDM', 'VP'])
def test_the_minimum_is_the_exact_denoiser(name, parameterization):
    """d loss / d theta = 0 at the exact output plus theta times anything, within 4.5 standard errors, and any theta
    pays: the noise's share of the target is uncorrelated with every function of (x, t).
    """
    schedule, mixture, num = getattr(schedules, name)(), oracles.gmm2d(), 4000
    between, _ = reach(schedule, -5, 5)
    rng = np.random.default_rng(5)
    t = rng.uniform(between.low, between.high, num)
    x0 = np.asarray(mixture.sample(jax.random.key(1), num)[0], np.float64)
    eps = rng.standard_normal(x0.shape)
    exact = exact_outputs(mixture, schedule, parameterization, x0, t, eps)
    x = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * eps
    size = np.abs(parameterization.row(schedule, t)).max(0)  # of the target
    change = size[:, None] * np.cos(x + 0.5)
    with jax.enable_x64(True):
        loss = Loss(schedule=schedule, parameterization=parameterization, times=between, weight=weights.v)

        def per_example(theta):
            return loss.at(lambda x, time: exact + theta * change, *map(jnp.asarray, (x0, t, eps)))[0]

        at_zero, slope = jax.jvp(per_example, (0.0,), (1.0,))
        up, down = (np.asarray(per_example(theta) - at_zero) for theta in (0.5, -0.5))
    slope = np.asarray(slope)
    assert slope.std() > 0
    assert abs(slope.mean()) < 4.5 * slope.std() / np.sqrt(num)
    for rise in (up, down):
        assert rise.mean() > 4.5 * rise.std() / np.sqrt(num)


def expects_refusal(schedule, parameterization, weight, t):
    """Whether a row or the weight on the network's own error grows without bound at an end, by its value in float64
    a hair inside, where nothing is floored yet: close to 0, and at the last time below 1 that float32 can draw.
    """
    t = np.float64(min(max(t, 1e-60), 1 - 2.0**-24))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = parameterization.row(schedule, t)
    speed = 2 * abs(alpha * schedule.sigma_prime(t) - sigma * schedule.alpha_prime(t)) / (alpha * sigma)
    gain = ((alpha * b - sigma * a) / alpha) ** 2
    if weight.__name__ == 'target':
        factor = 1.0
    else:
        on_x0, on_eps = WEIGHTS[weight.__name__]((alpha / sigma) ** 2, 1 / speed)
        factor = (on_eps if on_x0 is None else on_x0 * (sigma / alpha) ** 2) / gain
    return max(abs(a), abs(b)) > 1e6 or factor > 1e6


def test_both_ends_are_finite_or_refused(schedule, parameterization, weight):
    """Uniform times over all of [0, 1], and DDPM's on its own table: a ValueError, or a finite loss at both ends."""
    cases = [(times.Uniform(), (0.0, 1.0))]
    if isinstance(schedule, schedules.Discrete):
        cases.append((times.Discrete(), (1e-3, 1.0)))
    for whole, ends in cases:
        parts = {'schedule': schedule, 'parameterization': parameterization, 'times': whole, 'weight': weight}
        if any(expects_refusal(schedule, parameterization, weight, t) for t in ends):
            with pytest.raises(ValueError, match='no finite variance'):
                Loss(**parts)
            continue
        value, _ = Loss(**parts).at(lambda x, time: 0.3 * x, X0, jnp.asarray([*ends, 0.2, 0.4, 0.6, 0.8]), EPS)
        assert np.isfinite(value).all()


def test_gradients_are_finite_at_both_ends(parameterization):
    """On the straight line, where alpha and sigma are exactly 0 at the ends, with the plain error of the target."""
    whole = times.Uniform(low=1e-3) if type(parameterization).__name__ == 'Score' else times.Uniform()
    loss = Loss(schedule=schedules.Flow(), parameterization=parameterization, times=whole, weight=weights.target)
    t = jnp.linspace(whole.low, 1.0, NUM)
    slope = jax.jit(jax.grad(lambda scale: loss.at(lambda x, time: scale * jnp.tanh(x), X0, t, EPS)[0].sum()))(0.3)
    assert np.isfinite(slope)


def test_each_example_has_its_own_key():
    """Example i has the same loss in a batch of 8 and in a batch of 3, and no two share their noise or time."""
    loss = Loss(
        schedule=schedules.Cosine(), parameterization=parameterizations.V(), times=times.Uniform(), weight=weights.v
    )
    seen = []

    def predict(x, time):
        seen.append((x, time))
        return jnp.sin(x)

    x0, keys = jnp.ones((8, 2, 3)), jax.random.split(jax.random.key(0), 8)
    eight, _ = loss(predict, x0, keys)
    three, _ = loss(predict, x0[3:6], keys[3:6])
    np.testing.assert_allclose(three, eight[3:6], rtol=1e-6)
    x, time = seen[0]
    np.testing.assert_array_equal(seen[1][1], time[3:6])
    assert len(np.unique(time)) == 8 and len(np.unique(x)) == x.size


def test_times_and_noise_are_independent_and_right():
    """20,000 examples: t uniform, eps standard normal, uncorrelated with each other, within 4.5 standard errors."""
    loss = Loss(
        schedule=schedules.EDM(sigma_max=1.0),
        parameterization=parameterizations.Eps(),
        times=times.Uniform(low=0.2),
        weight=weights.eps,
    )
    seen, num = {}, 20000

    def predict(x, time):
        t = time / 1000
        seen.update(t=np.asarray(t), eps=np.asarray(x * jnp.sqrt(1 + t**2)[:, None] / t[:, None]))
        return x

    loss(predict, jnp.zeros((num, 2)), jax.random.split(jax.random.key(3), num))
    z = np.concatenate([(seen['t'][:, None] - 0.6) * np.sqrt(12) / 0.8, seen['eps']], 1)
    assert np.abs(z.mean(0)).max() < 4.5 / np.sqrt(num)
    assert np.abs(z.T @ z / num - np.eye(3)).max() < 4.5 * np.sqrt(2 / num)


def test_the_network_sees_what_the_target_asks_for(schedule, parameterization):
    seen = {}
    between, _ = reach(schedule)

    def predict(x, time):
        seen.update(x=x, time=time)
        return x

    t = np.full(NUM, schedule.t_of_logsnr(np.float64(-1.0)))
    with jax.enable_x64(True):
        loss = Loss(schedule=schedule, parameterization=parameterization, times=between, weight=weights.v)
        loss.at(predict, jnp.asarray(X0), jnp.asarray(t), jnp.asarray(EPS))
    alpha, sigma = schedule.alpha(t[0]), schedule.sigma(t[0])
    edm = isinstance(parameterization, parameterizations.EDM)
    size = np.sqrt(sigma**2 + 0.25 * alpha**2) if edm else max(1.0, np.sqrt(alpha**2 + sigma**2))
    time = np.log(sigma / alpha) / 4 if edm else schedule.timestep(t[0])
    np.testing.assert_allclose(seen['x'], (alpha * X0 + sigma * EPS) / size, rtol=1e-9)
    np.testing.assert_allclose(seen['time'], np.full(NUM, time), rtol=1e-9)


def test_a_learned_uncertainty_balances_the_levels():
    """exp(-u) w mse + u (Karras et al. 2024, Eq. 21), u told the network's time: least at u = log(w mse), where it is
    1 + log(w mse) and every level's gradient on the output has the same size. Without u nothing changes, bit for bit.
    """
    loss = Loss(
        schedule=schedules.EDM(),
        parameterization=parameterizations.EDM(),
        times=times.LogNormalSigma(),
        weight=weights.v,
    )
    t = jnp.asarray(loss.schedule.t_of_logsnr(np.linspace(-4, 4, NUM)), jnp.float32)
    plain, metrics = loss.at(lambda x, time: MISS, X0, t, EPS)
    assert set(metrics) == {'mse'}
    np.testing.assert_array_equal(loss.at(lambda x, time: MISS, X0, t, EPS, lambda time: None)[0], plain)
    seen = []

    def two(time):
        seen.append(time)
        return jnp.linspace(-1.0, 2.0, NUM)

    value, metrics = loss.at(lambda x, time: MISS, X0, t, EPS, two)
    u = np.linspace(-1, 2, NUM)
    np.testing.assert_allclose(value, np.exp(-u) * np.asarray(plain, np.float64) + u, rtol=1e-5)
    np.testing.assert_allclose(metrics['log_variance'], u, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(seen[0], loss.parameterization.time_input(loss.schedule, t), rtol=1e-6)

    def slopes(u):
        return jax.grad(lambda u: loss.at(lambda x, time: MISS, X0, t, EPS, lambda time: u)[0].sum())(u)

    best = jnp.log(plain)
    np.testing.assert_allclose(slopes(best), 0, atol=1e-5)
    np.testing.assert_allclose(loss.at(lambda x, time: MISS, X0, t, EPS, lambda time: best)[0], 1 + best, rtol=1e-5)
    error, noise_level = MISS - target(loss.parameterization, loss.schedule, X0, EPS, np.asarray(t, np.float64)), best
    gradient = jax.grad(lambda y: loss.at(lambda x, time: y, X0, t, EPS, lambda time: noise_level)[0].sum())(
        jnp.asarray(MISS, jnp.float32)
    )
    sizes = (np.asarray(gradient) * error).sum((1, 2))  # 2 exp(-u) w mse = 2 at every level
    np.testing.assert_allclose(sizes, 2, rtol=1e-4)


def test_an_uncertainty_stands_beside_a_learned_variance():
    """The bound's term is not weighed by it."""
    options = {
        'schedule': schedules.Linear(),
        'parameterization': parameterizations.Eps(),
        'times': times.Discrete(),
        'weight': weights.eps,
    }
    t = jnp.asarray([0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
    output, u = jnp.concatenate([MISS, EPS], -1), jnp.linspace(-1.0, 1.0, NUM)
    loss = Loss(**options, bound_scale=0.001)
    plain, metrics = loss.at(lambda x, time: output, X0, t, EPS)
    value, more = loss.at(lambda x, time: output, X0, t, EPS, lambda time: u)
    assert set(more) == {'mse', 'bound', 'log_variance'}
    np.testing.assert_allclose(value - plain, (np.exp(-u) - 1) * metrics['mse'] + u, rtol=1e-3, atol=1e-5)
