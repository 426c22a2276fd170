"""Every solver's order against the exact flow of a mixture, and what one compiled program must serve."""

import numpy as np
import pytest

from diffjax.core import schedules, solvers
from diffjax.core.solvers import COORDINATES

ORDERS = {'ddpm': None, 'ddim': 1, 'euler': 1, 'heun': 2, 'dpmpp_2m': 2}  # None: noise at any setting
STEPS = (24, 48, 96, 192)


@pytest.fixture
def schedule(solver_schedule):
    return solver_schedule


@pytest.fixture
def grid(solver_grid):
    return solver_grid


def is_stochastic(name, options):
    return ORDERS[name] is None or options.get('eta', 0) > 0


@pytest.fixture(scope='module')
def exact(interior):
    """(program) -> (x at logsnr -6, the exact flow's x at logsnr 6), solved once per schedule."""
    known = {}

    def solve(run):
        schedule = run.schedule
        if schedule not in known:
            t, s = interior(schedule, 1)
            x = run.start(t)
            known[schedule] = x, run.mixture.flow(schedule, x, t, s, tolerance=1e-10)
        return known[schedule]

    return solve


def test_observed_order(schedule, solver, program, exact, interior):
    """The slope of log error against log steps, within 0.25 of the claim: logsnr from -6 to 6 in equal steps, which
    are smooth in every coordinate. float64, one compiled program for each schedule.
    """
    name, options, make = solver
    if is_stochastic(name, options):
        pytest.skip('has no order along a path; its moments are tested in test_stochastic.py')
    if options.get('coordinate') == 't' and isinstance(schedule, schedules.Discrete):
        pytest.skip("the table's alpha' jumps at every entry: not smooth in t")
    run = program(schedule)
    x, truth = exact(run)
    errors = []
    for num_steps in STEPS:
        error = run(make(schedule, interior(schedule, num_steps)), x) - truth
        errors.append(np.sqrt((error**2).mean()))
    order = -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    assert abs(order - ORDERS[name]) < 0.25, (order, errors)
    assert errors[-1] < (0.05 if ORDERS[name] == 1 else 0.01)


def test_finite_from_end_to_end(schedule, solver, grid, program):
    """From alpha = 0 to sigma = 0, through every grid, and the samples lie where the data does."""
    _, _, make = solver
    run = program(schedule)
    for num_steps in (2, 12):
        plan = make(schedule, grid(schedule, num_steps))
        out = run(plan, run.start(1.0))
        assert np.isfinite(out).all()
    assert np.abs(out).max() < 6 and out.std() > 0.1


def rising(solver):
    name, options, make = solver
    if is_stochastic(name, options):
        pytest.skip('a rising grid is for deterministic solvers')
    return make


def test_rising_grids_reach_both_ends(schedule, solver, program):
    """Inversion from sigma = 0 to alpha = 0 is finite, or refused where the coordinate's slope is infinite."""
    make, run = rising(solver), program(schedule)
    grid = np.linspace(0, 1, 13)
    square_root = schedule.sigma_prime(np.float64(0)) > 1e6
    if solver[1].get('coordinate') == 't' and square_root:
        with pytest.raises(ValueError, match='t = 0'):
            make(schedule, grid)
        return
    out = run(make(schedule, grid), run.start(0.0))
    size = np.hypot(schedule.alpha(np.float64(1)), schedule.sigma(np.float64(1)))
    assert np.isfinite(out).all() and 0.1 < out.std() / size < 4


def test_inversion_and_sampling_round_trip(schedule, solver, program, interior):
    make, run = rising(solver), program(schedule)
    if solver[1].get('coordinate') == 't' and isinstance(schedule, schedules.Discrete):
        pytest.skip("the table's alpha' jumps at every entry: not smooth in t")
    falling = interior(schedule, 192, -4.0, 4.0)
    x = run.start(falling[-1])
    noise = run(make(schedule, falling[::-1]), x)
    back = run(make(schedule, falling), noise)
    assert np.sqrt(((back - x) ** 2).mean()) < (0.05 if ORDERS[solver[0]] == 1 else 3e-3)
    flowed = run.mixture.flow(schedule, x, falling[-1], falling[0], tolerance=1e-8)
    size = np.hypot(schedule.alpha(falling[0]), schedule.sigma(falling[0]))
    assert np.sqrt(((noise - flowed) ** 2).mean()) / size < (0.05 if ORDERS[solver[0]] == 1 else 3e-3)


def test_nothing_retraces(program):
    """Another solver, step count, guidance scale, seed, class: the denoiser is not traced again."""
    schedule = schedules.Cosine()
    run = program(schedule)
    x = run.start(1.0)
    run(solvers.ddim(schedule, np.linspace(1, 0, 9)), x)
    traces, results = run.traces, []
    for name in solvers.__all__:
        for num_steps in (3, 20):
            plan = getattr(solvers, name)(schedule, np.linspace(1, 0, num_steps + 1))
            for scale, seed, label in ((1.0, 0, -1), (2.5, 0, 2), (2.5, 7, 2)):
                results.append(run(plan, x, scale=scale, seed=seed, cond=np.full(len(x), label)))
    assert run.traces == traces
    assert run.compiled._cache_size() == 1
    assert len({r.tobytes() for r in results}) > len(solvers.__all__) * 4  # and they did change something


def test_each_coordinate_is_a_method_of_its_own(program):
    """The names must not be settings without effect: on the same grid they differ."""
    schedule = schedules.VP()
    run = program(schedule)
    x, grid = run.start(0.9), np.linspace(0.9, 0.1, 9)
    for make in (solvers.euler, solvers.heun):
        outs = [run(make(schedule, grid, coordinate=c), x) for c in COORDINATES]
        for i in range(len(outs)):
            for j in range(i):
                assert np.abs(outs[i] - outs[j]).max() > 1e-4
