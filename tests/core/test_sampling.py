"""The one loop: against a plain Python loop, padding, noise by key, projection, saving, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles, parameterizations, schedules, solvers
from diffjax.core.denoisers import stateless
from diffjax.core.sampling import check_plan, pad, sample, sample_keys, starting_noise
from diffjax.core.solvers import Plan
from diffjax.core.types import Denoiser, Estimate

COSINE = schedules.Cosine()


def wild_plan(num_rows=6, num_remembered=3, num_noises=2):
    """A plan that uses every column."""
    rng = np.random.default_rng(0)
    width = 2 + num_remembered + num_noises
    return Plan(
        t=np.linspace(0.9, 0.1, num_rows),
        remember=rng.normal(size=(num_rows, 2)),
        to_x=0.4 * rng.normal(size=(num_rows, width)),
        to_anchor=0.4 * rng.normal(size=(num_rows, width)),
        log_variance_range=rng.uniform(0, 1, (num_rows, num_noises)),
        live=np.array([True, True, False, True, True, False])[:num_rows],
        start=np.array([0.3, 0.7]),
    )


def counting_denoiser(variance=True):
    """Its state counts calls, and enters the estimate."""

    def apply(state, x, t, cond):
        x0 = jnp.tanh(x) * (1 + t) + cond[:, None] + 0.1 * state
        return Estimate(x0, jnp.cos(x) * t, 0.5 + 0.4 * jnp.sin(x) if variance else None), state + 1

    return Denoiser(lambda x, cond: jnp.zeros(()), apply)


def plain_loop(denoiser, plan, x, cond, keys, project):
    """What `sample` says it does, one row and one sum at a time."""
    anchor, memory, state, saved = x, [np.zeros_like(x)] * plan.num_remembered, denoiser.init(x, cond), []
    for m in range(len(plan.t)):
        if not plan.live[m]:
            saved.append(np.zeros_like(x))
            continue
        guess, state = denoiser.apply(state, jnp.asarray(x), plan.t[m], cond)
        memory = [plan.remember[m, 0] * guess.x0 + plan.remember[m, 1] * guess.eps, *memory[:-1]]
        noises = []
        for j in range(plan.num_noises):
            z = [
                jax.random.normal(jax.random.fold_in(jax.random.fold_in(k, m + 1), j), x.shape[1:], x.dtype)
                for k in keys
            ]
            widen = 1 if guess.variance is None else np.exp(guess.variance * plan.log_variance_range[m, j] / 2)
            noises.append(np.stack(z) * widen)
        parts = [x, anchor, *memory, *noises]
        x, anchor = (sum(c * np.asarray(p) for c, p in zip(row[m], parts)) for row in (plan.to_x, plan.to_anchor))
        x = project(x, m)
        saved.append(x * plan.t[m])
    return x, np.stack(saved)


@pytest.mark.parametrize('variance', [True, False])
def test_the_loop_is_a_plain_loop(variance):
    plan, denoiser = wild_plan(), counting_denoiser(variance)

    def project(x, number):
        return x * (1 + 0.1 * number)

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 4)
        x, cond = np.random.default_rng(1).normal(size=(4, 3)), jnp.linspace(-0.2, 0.2, 4)
        run = jax.jit(lambda plan, x: sample(denoiser, plan, x, cond, keys, project=project, save=lambda x, t: x * t))
        out, saved = run(plan, jnp.asarray(x))
        expected, trajectory = plain_loop(denoiser, plan, x, cond, keys, project)
        np.testing.assert_allclose(out, expected, atol=1e-12)
        np.testing.assert_allclose(saved, trajectory, atol=1e-12)
        without = sample(denoiser, plan, jnp.asarray(x), cond, keys, project=project)
        np.testing.assert_allclose(without[0], expected, atol=1e-12)
        assert without[1] is None


def test_padding_changes_nothing():
    """Bit for bit, rows and columns added, in the samples and in what is saved."""
    plan, denoiser = wild_plan(), counting_denoiser()
    keys, x = sample_keys(jax.random.key(0), 5), jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)), jnp.float32)
    run = jax.jit(lambda plan: sample(denoiser, plan, x, jnp.zeros(5), keys, save=lambda x, t: (x, t)))
    out, (states, at) = run(plan)
    longer, (padded_states, padded_at) = run(pad(plan, 11, 5, 3))
    np.testing.assert_array_equal(out, longer)
    np.testing.assert_array_equal(padded_states[:6], states)
    np.testing.assert_array_equal(padded_at[:6], at)
    assert not padded_states[6:].any() and not padded_at[6:].any()
    with pytest.raises(ValueError, match=r'\(6, 3, 2\) does not fit into \(5, 3, 2\)'):
        pad(plan, 5, 3, 2)


def test_padded_rows_do_not_call_the_network():
    """At run time too: a callback counts."""
    calls = []

    def denoise(x, t, cond):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return Estimate(x, x)

    plan = solvers.heun(COSINE, [0.9, 0.5, 0.2])
    out, _ = sample(stateless(denoise), pad(plan, 20, 3, 1), jnp.ones((2, 2)), None, sample_keys(jax.random.key(0), 2))
    out.block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), [0.2, 0.5, 0.5, 0.9], rtol=1e-6)


def test_sample_i_does_not_depend_on_the_batch():
    """Samples 3 to 6 of a batch of 8 alone: noise bit-equal, samples equal to float tolerance."""
    mixture, key = oracles.gmm2d(), jax.random.key(5)
    plan = solvers.ddpm(COSINE, np.linspace(1, 0, 9))
    keys = sample_keys(key, 8)
    noise = starting_noise(plan, keys, (2,))
    few = sample_keys(key, 3, start=3)
    np.testing.assert_array_equal(jax.random.key_data(few), jax.random.key_data(keys[3:6]))
    np.testing.assert_array_equal(starting_noise(plan, few, (2,)), noise[3:6])
    run = jax.jit(lambda x, keys: sample(mixture.denoiser(COSINE), plan, x, None, keys)[0])
    np.testing.assert_allclose(run(noise[3:6], few), run(noise, keys)[3:6], atol=1e-5)

    zero = stateless(lambda x, t, cond: Estimate(jnp.zeros_like(x), jnp.zeros_like(x)))
    drawn = jax.jit(lambda keys: sample(zero, wild_plan(), jnp.zeros((len(keys), 2)), None, keys)[0])
    np.testing.assert_array_equal(drawn(few), drawn(keys)[3:6])


def test_every_draw_is_its_own():
    """Samples, rows, draws and the starting noise share no numbers: all different, and standard normal."""
    num, rows = 64, 20
    keep = np.zeros((rows, 5))
    keep[:, 3] = 1  # x becomes the first draw; the anchor the second
    anchor = np.zeros((rows, 5))
    anchor[:, 4] = 1
    plan = wild_plan(6, 1, 2)._replace(
        t=np.full(rows, 0.5),
        remember=np.zeros((rows, 2)),
        to_x=keep,
        to_anchor=anchor,
        log_variance_range=np.zeros((rows, 2)),
        live=np.ones(rows, bool),
        start=np.array([0.0, 1.0]),
    )
    last = plan._replace(to_x=np.concatenate([keep[:-1], anchor[-1:]]))
    zero = stateless(lambda x, t, cond: Estimate(jnp.zeros_like(x), jnp.zeros_like(x)))
    keys = sample_keys(jax.random.key(2), num)
    start = starting_noise(plan, keys, (3,))
    run = jax.jit(lambda plan: sample(zero, plan, start, None, keys, save=lambda x, t: x))
    draws = np.concatenate([np.ravel(run(plan)[1]), np.ravel(run(last)[0]), np.ravel(start)])
    assert len(np.unique(draws)) > 0.999 * draws.size
    assert abs(draws.mean()) < 4.5 / np.sqrt(draws.size)
    assert abs(draws.var() - 1) < 4.5 * np.sqrt(2 / draws.size)


def test_starting_noise():
    keys = sample_keys(jax.random.key(0), 3)
    plan = solvers.ddim(schedules.Flow(), [0.6, 0.3, 0.0])
    pure = starting_noise(plan, keys, (4, 2))
    assert pure.shape == (3, 4, 2)
    x0 = jnp.ones((3, 4, 2))
    np.testing.assert_allclose(starting_noise(plan, keys, (4, 2), x0), 0.4 + pure, rtol=1e-5)
    full = starting_noise(solvers.ddim(schedules.EDM(), [1.0, 0.0]), keys, (4, 2))
    np.testing.assert_allclose(full, 80 / 0.6 * pure, rtol=1e-5)


def test_projection_holds_what_it_projects():
    """Inpainting's shape: a coordinate put back after every row."""
    plan = solvers.dpmpp_2m(COSINE, np.linspace(1, 0, 7))
    keys = sample_keys(jax.random.key(0), 4)
    known = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    out, path = sample(
        oracles.gmm2d().denoiser(COSINE),
        plan,
        starting_noise(plan, keys, (2,)),
        None,
        keys,
        project=lambda x, number: x.at[:, 0].set(known),
        save=lambda x, t: x,
    )
    np.testing.assert_array_equal(path[:, :, 0], np.tile(known, (6, 1)))
    np.testing.assert_array_equal(path[-1], out)


def test_a_learned_variance_widens_the_noise():
    """f = 0 is 'small', f = 1 is 'large', between them the geometric mean; and a denoiser without one changes none."""
    grid, keys = np.linspace(1, 0.3, 6), sample_keys(jax.random.key(4), 3)
    learned = solvers.ddpm(COSINE, grid, variance='learned')

    @jax.jit
    def run(plan, fraction):
        def denoise(x, t, cond):
            return Estimate(0.3 * x, x, None if fraction is None else jnp.full_like(x, fraction))

        return sample(stateless(denoise), plan, jnp.ones((3, 2)), None, keys)[0]

    small, large = (run(solvers.ddpm(COSINE, grid, variance=v), None) for v in ('small', 'large'))
    np.testing.assert_allclose(run(learned, 0.0), small, rtol=1e-5)
    np.testing.assert_allclose(run(learned, 1.0), large, rtol=1e-5)
    np.testing.assert_allclose(run(learned, None), small, rtol=1e-5)
    half = learned._replace(to_x=np.array(learned.to_x))
    for i in range(5):
        factor = (COSINE.sigma(grid[i]) / COSINE.sigma(grid[i + 1])) ** 0.5  # (beta / beta~)^(1/4)
        half.to_x[i, 3] *= factor
    np.testing.assert_allclose(run(learned, 0.5), run(half, None), rtol=1e-5)


def test_products_keep_float32():
    """No dot at the default precision, which is bfloat16 on TPUs and TF32 on GPUs: coefficients would lose digits."""
    plan = wild_plan()
    keys = sample_keys(jax.random.key(0), 2)
    program = jax.jit(lambda x: sample(counting_denoiser(), plan, x, jnp.zeros(2), keys)[0])
    for line in program.lower(jnp.ones((2, 3))).as_text().splitlines():
        if 'dot_general' in line:
            assert 'HIGHEST' in line, line


def test_check_plan_refuses():
    flow, eps, v = schedules.Flow(), parameterizations.Eps(), parameterizations.V()
    full = solvers.ddim(flow, [1.0, 0.5, 0.0])
    check_plan(full, flow, v, learned_variance=False)
    check_plan(solvers.ddim(flow, [0.99, 0.5, 0.0]), flow, eps, learned_variance=False)
    with pytest.raises(ValueError, match='target Eps cannot be used at t = 1.*Targets that can: X0, V, Velocity, EDM'):
        check_plan(full, flow, eps, learned_variance=False)
    with pytest.raises(ValueError, match='target X0 cannot be used at t = 0'):
        check_plan(solvers.ddim(flow, [0.0, 0.5, 0.9]), flow, parameterizations.X0(), learned_variance=False)
    learned = solvers.ddpm(COSINE, [1.0, 0.5, 0.0], variance='learned')
    check_plan(learned, COSINE, v, learned_variance=True)
    with pytest.raises(ValueError, match="does not have: use 'small' or 'large'"):
        check_plan(learned, COSINE, v, learned_variance=False)
    broken = full._replace(to_x=np.where(np.eye(2, 3, dtype=bool), np.nan, full.to_x))
    with pytest.raises(ValueError, match="the plan's to_x is not finite at row 0"):
        check_plan(broken, flow, v, learned_variance=False)
    check_plan(pad(full, 9, 3, 1), flow, v, learned_variance=False)
