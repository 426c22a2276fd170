"""Every solver on every grid at both ends, from alpha = 0 to sigma = 0 and back: finite, plausible, or refused.

In float32 and through the loop, as samples are drawn: all grids and numbers of steps at once, in one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, oracles, schedules
from diffjax.core.sampling import sample, sample_keys
from diffjax.core.solvers import Plan

MIXTURE = oracles.gmm2d()
STEPS = 1, 2, 3, 12, 20
REMEMBERED, NOISES, BATCH = 13, 2, 4
LEVELS = 'exponential', 'karras', 'logsnr', 'polyexponential', 'softplus'  # grids that are good on every schedule
LISTS = {
    'all at once': [1, 0],
    'two near': [1, 0.6, 0.3, 0.3 - 1e-9, 0.1, 0.1 - 1e-9, 0],
    'near data': [1, 0.6, 0.3, 0.1, 1e-9, 0],
    'near noise': [1, 1 - 1e-5, 0.6, 0.3, 0.1, 0],
    'short of both': [0.97, 0.6, 0.3, 0.02],
}
DISTILLED = 'consistency', 'lcm', 'tcd'  # made for a model that jumps to the data


@functools.cache
def every_grid(schedule):
    """{label: times}: every grid at every number of steps, to t = 0 and to the lowest level, and the lists."""
    options = {name: {} for name in grids.__all__ if name != 'times'} | {'polyexponential': {'rho': 2.0}}
    cases = [(name, name, given, STEPS) for name, given in options.items()]
    with_end = *LEVELS, 'align_your_steps', 'trailing'
    cases += [(name + ' lowest', name, {'end': 'lowest'}, (3, 20)) for name in with_end]
    made = {}
    for label, name, given, steps in cases:
        for num_steps in steps:
            if name != 'leading' or num_steps > 1:  # refused: it would start at the first entry of the table
                made[f'{label} {num_steps}'] = getattr(grids, name)(schedule, num_steps, **given)
    return made | {label: grids.times(schedule, len(times) - 1, values=times) for label, times in LISTS.items()}


def rising(cases):
    """Some of the grids the other way round."""
    some = [label for label in cases if label.split()[-1] not in ('1', '2', '12')]
    return {f'rising {label}': cases[label][::-1] for label in some}


@functools.cache
def program(schedule):
    exact = MIXTURE.denoiser(schedule)
    follow = jax.vmap(lambda plan, x, keys: sample(exact, plan, x, None, keys)[0], (0, 0, None))
    return jax.jit(follow)


def stacked(plans, num_plans):
    """All plans as one, padded with rows that are skipped: every table with a leading [plans]."""
    rows = 32 if max(len(plan.t) for plan in plans) <= 32 else 96
    width = 2 + REMEMBERED + NOISES
    shapes = (), (2,), (width,), (width,), (NOISES,)
    table = Plan(*(np.zeros((num_plans, rows, *shape)) for shape in shapes), live=None, start=np.zeros((num_plans, 2)))
    table = table._replace(live=np.zeros((num_plans, rows), bool))
    for i, plan in enumerate(plans):
        num, of_state = len(plan.t), 2 + plan.num_remembered
        for name in ('t', 'remember', 'live'):
            getattr(table, name)[i, :num] = getattr(plan, name)
        for name in ('to_x', 'to_anchor'):
            getattr(table, name)[i, :num, :of_state] = getattr(plan, name)[:, :of_state]
            noises = slice(2 + REMEMBERED, 2 + REMEMBERED + plan.num_noises)
            getattr(table, name)[i, :num, noises] = getattr(plan, name)[:, of_state:]
        table.start[i] = plan.start
    return table


def run(schedule, plans, num_plans):
    """Where all plans lead from noised data, float32. [plans, B, 2]."""
    table = stacked(plans, num_plans)
    rng = np.random.default_rng(0)
    which = rng.choice(8, BATCH, p=MIXTURE.weights)
    x0 = MIXTURE.means[which] + np.sqrt(MIXTURE.variances[which]) * rng.standard_normal((BATCH, 2))
    eps = rng.standard_normal((BATCH, 2))
    x = table.start[:, :1, None] * x0 + table.start[:, 1:, None] * eps
    keys = sample_keys(jax.random.key(0), BATCH)
    return np.asarray(program(schedule)(table, jnp.asarray(x, jnp.float32), keys))[: len(plans)]


def written(solver, schedule, times):
    """The plan, made without a warning, or None where the solver may refuse, and does, and says why."""
    if solver.name == 'restart' and solver.options.get('num_restarts') != 0:
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        if not ((sigma[1:] > 0) & (sigma[1:] <= solver.options['low'] * alpha[1:])).any():
            with pytest.raises(ValueError, match='restart needs a time at or below sigma / alpha = 0.5'):
                solver.make(schedule, times)
            return None
    steep = np.abs([schedule.alpha_prime(times[0]), schedule.sigma_prime(times[0])]).max() > 1e6
    if steep and (solver.options.get('coordinate') == 't' or 'scale' in solver.options):
        with pytest.raises(ValueError, match=r"slope in coordinate 't' is unbounded at t = .*choose another"):
            solver.make(schedule, times)
        return None
    with np.errstate(all='raise', under='ignore'):
        return solver.make(schedule, times)


def test_finite_from_end_to_end(solver_schedule, solver):
    """And 20 steps that fit the schedule end where the data is, from every solver that is not for distilled models;
    on rising grids, where the noise is. Noise on the way up is refused.
    """
    cases, up = every_grid(solver_schedule), rising(every_grid(solver_schedule))
    if solver.stochastic:
        with pytest.raises(ValueError, match='falling grid|rising grid'):
            solver.make(solver_schedule, up['rising uniform 3'])
    all_cases = cases if solver.stochastic else cases | up
    plans = {label: written(solver, solver_schedule, times) for label, times in all_cases.items()}
    plans = {label: plan for label, plan in plans.items() if plan is not None}
    assert len(plans) > 0.4 * len(all_cases)
    for label, x in zip(plans, run(solver_schedule, list(plans.values()), len(cases) + len(up))):
        assert np.isfinite(x).all(), label
        *way, name, last = label.split() if label[-1].isdigit() else ['', label]
        if name in LEVELS and last == '20' and not way and solver.name not in DISTILLED:
            assert np.abs(x).max() < 6 and x.std() > 0.3, label
        if name == 'karras' and last == '20' and way:
            end = all_cases[label][-1]
            assert 0.2 < x.std() / np.hypot(solver_schedule.alpha(end), solver_schedule.sigma(end)) < 5, label


def test_every_schedule_gives_moderate_coefficients(any_schedule, solver):
    """From t = 1 to t = 0, whatever the slopes there: finite float64 tables without a huge number in them."""
    for num_steps in (1, 7):
        plan = written(solver, any_schedule, np.linspace(1, 0, num_steps + 1))
        if plan is not None:
            for name, column in plan._asdict().items():
                assert np.isfinite(column).all(), name
                assert column.dtype == (bool if name == 'live' else np.float64)
                assert np.abs(column).max(initial=0) < 5e3, name
            assert plan.t[0] == 1
            top = np.float64(1)
            np.testing.assert_allclose(plan.start, [any_schedule.alpha(top), any_schedule.sigma(top)])


def test_grids_that_no_solver_takes(solver):
    for times in ([0.5], [], [0.9, 0.5, 0.6], [0.5, 0.5], [1.2, 0.3], [0.4, -0.1], [[0.9, 0.1]], [1, float('nan'), 0]):
        with pytest.raises(ValueError, match='at least two times in'):
            solver.make(schedules.Flow(), times)
