"""Free plans: every solver's states come back, times fall whatever the numbers, and nothing else can be lost."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.core import oracles, schedules, solvers
from diffjax.core.sampling import sample, sample_keys
from diffjax.core.solvers.free_plans import FreePlan, follow, free, times

SOLVERS = {  # deterministic, with times that fall strictly
    'ddim': {},
    'euler': {'coordinate': 't'},
    'dpmpp_2m': {},
    'dpmpp_3m': {},
    'dpm2': {},
    'unipc': {'order': 3},
    'lms': {},
    'deis': {'order': 3},
}
SCHEDULES = [schedules.Flow(), schedules.Cosine(), schedules.EDM()]
GRID = np.array([1.0, 0.8, 0.55, 0.3, 0.1, 0.0])


def in_float64(function, *args):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*args))


def states(plan, schedule, eps):
    """x after every row, float64: [M, B, 2]."""

    def run(plan, eps):
        denoiser = oracles.gmm2d().denoiser(schedule)
        keys = sample_keys(jax.random.key(0), len(eps))
        return sample(denoiser, plan, plan.start[1] * eps, None, keys, save=lambda x, t: x)[1]

    return in_float64(jax.jit(run), plan, eps)


@pytest.mark.parametrize(
    'schedule', [schedules.Flow(), schedules.Cosine(), schedules.EDM()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize('name', SOLVERS)
def test_a_free_plan_passes_through_the_solvers_states(schedule, name):
    """All of them: the form of Eq. 1 leaves nothing of a deterministic solver out."""
    plan = getattr(solvers, name)(schedule, GRID, **SOLVERS[name])
    eps = np.random.default_rng(0).standard_normal((16, 2))
    again = in_float64(lambda: follow(schedule, free(schedule, plan), plan.t[0]))
    np.testing.assert_allclose(again.t, plan.t, rtol=1e-12)
    np.testing.assert_allclose(states(again, schedule, eps), states(plan, schedule, eps), rtol=1e-7, atol=1e-8)


def test_where_a_solver_asks_twice_at_one_time_the_states_stay_near():
    """Heun's: the second question comes a hundredth of a step later."""
    schedule = schedules.EDM()
    plan = solvers.heun(schedule, schedule.t_of_logsnr(np.array([-8.7, -4.0, 0.0, 4.0, 8.0])))
    again = in_float64(lambda: follow(schedule, free(schedule, plan), plan.t[0]))
    assert (np.diff(again.t) < 0).all()
    np.testing.assert_allclose(again.t, plan.t, rtol=0.012)
    eps = np.random.default_rng(0).standard_normal((16, 2))
    gap = np.abs(states(again, schedule, eps)[-1] - states(plan, schedule, eps)[-1])
    assert np.median(gap) < 0.02


def test_weights_of_known_solvers():
    """DDIM in two steps by hand, on the straight line from t = 1 over 0.5 to 0: x_1 = (x_0 + x0_0) / 2, x_2 = x0_1. And
    whatever is exact for a constant denoiser has weights that sum to 1 and no extra noise."""
    flow = schedules.Flow()
    plan = free(flow, solvers.ddim(flow, [1.0, 0.5, 0.0]))
    np.testing.assert_allclose(plan.weights, [[1, 0], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(plan.extra_noise, [0, 0], atol=1e-12)
    np.testing.assert_allclose(plan.log_steps, np.log([0.5, 0.5]))
    for name in SOLVERS.keys() - {'euler'}:  # which is not, in t on this schedule
        plan = free(schedules.VP(), getattr(solvers, name)(schedules.VP(), GRID, **SOLVERS[name]))  # alpha(1) > 0
        np.testing.assert_allclose(plan.weights.sum(1), 1, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(plan.extra_noise, 0, atol=1e-9, err_msg=name)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=8), st.floats(0.1, 1))
def test_times_fall_from_the_start_to_above_zero(log_steps, start):
    """Whatever the numbers; each is the share of softmax, written out."""
    t = in_float64(lambda: times(FreePlan(np.array(log_steps), None, None), start))
    shares = np.exp(log_steps) / np.exp(log_steps).sum()
    np.testing.assert_allclose(t, [start * shares[m:].sum() for m in range(len(shares))], rtol=1e-12)
    assert t[0] == start and (np.diff(t) < 0).all() and t[-1] > 0


def test_the_part_above_the_diagonal_is_not_looked_at():
    flow = schedules.Flow()
    plan = free(flow, solvers.dpmpp_2m(flow, GRID))
    other = plan._replace(weights=plan.weights + np.triu(np.full((5, 5), 7.0), 1))
    mine, theirs = (in_float64(lambda p=p: follow(flow, p, 1.0)) for p in (plan, other))
    for a, b in zip(mine, theirs):
        np.testing.assert_array_equal(a, b)
    assert not np.triu(mine.to_x[:, 2:], 1).any()  # what no call has answered yet has no part in x


@pytest.mark.parametrize('schedule', [schedules.VP(), schedules.VE()], ids=lambda s: type(s).__name__)
def test_the_slope_in_every_free_number_is_right(schedule):
    """Against central differences, through the loop; also where sigma' is infinite at t = 0."""
    plan, eps = solvers.dpmpp_2m(schedule, GRID), np.random.default_rng(1).standard_normal((8, 2))
    start = free(schedule, plan)

    def loss(numbers, eps):
        made = follow(schedule, numbers, 1.0)
        keys = sample_keys(jax.random.key(0), 8)
        x = sample(oracles.gmm2d().denoiser(schedule), made, made.start[1] * eps, None, keys)[0]
        return (x**2).sum()

    slopes = in_float64(jax.jit(jax.grad(loss)), start, eps)
    value, rng = jax.jit(loss), np.random.default_rng(2)
    for _ in range(3):
        way = FreePlan(*(rng.standard_normal(a.shape) for a in start))
        ends = [in_float64(value, FreePlan(*(a + h * w for a, w in zip(start, way))), eps) for h in (1e-5, -1e-5)]
        along = sum((s * w).sum() for s, w in zip(slopes, way))
        assert np.isfinite(along) and along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_what_has_no_free_form_is_refused():
    flow = schedules.Flow()
    with pytest.raises(ValueError, match='is deterministic, and this plan draws noise'):
        free(flow, solvers.ddpm(flow, GRID))
    with pytest.raises(ValueError, match=r'times that fall from the first.*above sigma = 0; this one at \[0.1, 0.5\]'):
        free(flow, solvers.euler(flow, [0.1, 0.5, 0.9], coordinate='t'))
    twice = solvers.ddim(flow, GRID)
    with pytest.raises(ValueError, match='fall from the first'):
        free(flow, twice._replace(t=np.array([1.0, 1.0, 0.5, 0.3, 0.1])))
    with pytest.raises(ValueError, match='stay above sigma = 0'):
        free(flow, solvers.euler(flow, [0.0, 0.5], coordinate='t'))
