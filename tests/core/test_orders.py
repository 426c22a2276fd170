"""Every deterministic solver's order against the exact flow of a mixture, by regression, and what caps it."""

import functools
import inspect
import itertools

import numpy as np
import pytest

from diffjax.core import grids, schedules, solvers
from diffjax.core.solvers.coordinates import COORDINATES
from diffjax.core.solvers.exponential import POLYNOMIALS

ORDERS = {  # by name; the name of an option that is the order
    'ddim': 1,
    'deis': 'order',
    'dpm2': 2,
    'dpm2_ancestral': 2,
    'dpm_solver': 'order',
    'dpm_solver_m': 'order',
    'dpmpp_2m': 2,
    'dpmpp_2m_sde': 2,
    'dpmpp_2s': 2,
    'dpmpp_2s_ancestral': 2,
    'dpmpp_3m': 3,
    'dpmpp_3m_sde': 3,
    'dpmpp_3s': 3,
    'dpmpp_sde': 2,
    'edm': 2,
    'euler': 1,
    'euler_ancestral': 1,
    'euler_maruyama': 1,
    'heun': 2,
    'lms': 'order',
    'pndm': 2,
    'restart': 2,
    'rk4': 4,
    'sa_solver': 'predictor',
    'tcd': 1,
    'unipc': 'order',
}
EVALUATIONS = np.array([48, 96, 192, 384])


def order_of(solver):
    """What is claimed; of second order where the last step is of first."""
    options = solver.options
    claim = ORDERS[solver.name]
    order = claim if isinstance(claim, int) else options.get(claim, 3)
    if solver.name == 'sa_solver':  # a corrector has one more node than what it corrects had
        order = max(order, min(options.get('corrector', 4), order + 1))
    lowered = options.get('final', 'lower' if solver.name == 'sa_solver' else '') == 'lower'
    return min(order, 2) if options.get('halved') or lowered else order


def num_given(solver):
    """How many states a multistep method is given: orders above 2 need a start of that order."""
    multistep = solver.name in ('deis', 'dpm_solver_m', 'dpmpp_3m', 'dpmpp_3m_sde', 'lms')
    return order_of(solver) - 1 if multistep and solver.options.get('start') != 'singlestep' else 0


def skip_if_none(solver, schedule):
    """A path with noise has no order; nor has the time t of a table."""
    if solver.stochastic:
        pytest.skip('has no order along a path; its moments are tested in test_stochastic.py')
    options = solver.options
    coordinate = options.get('coordinate', options.get('polynomial', 't' if solver.name == 'euler_maruyama' else ''))
    if coordinate == 't' and isinstance(schedule, schedules.Discrete):
        pytest.skip("the table's alpha' jumps at every entry: not smooth in t")


@pytest.fixture(scope='module')
def exact(interior):
    """(program, num_steps, num_states, low) -> (x at logsnr `low`, the exact flow's states at the first times after it
    and at logsnr 6), each solved once.
    """

    @functools.cache
    def start(run, low):
        return run.start(interior(run.schedule, 1, low)[0])

    @functools.cache
    def flow(run, low, num_steps, until):
        grid = interior(run.schedule, num_steps, low)
        before = flow(run, low, num_steps, until - 1) if 1 < until < num_steps else start(run, low)
        at = grid[until - 1] if until < num_steps else grid[0]
        return run.mixture.flow(run.schedule, before, at, grid[until], tolerance=1e-12)

    def solve(run, num_steps, num_states, low=-6.0):
        return start(run, low), [flow(run, low, num_steps, i + 1) for i in range(num_states)], flow(run, low, 1, 1)

    return solve


@pytest.fixture(scope='module')
def errors(exact, interior):
    """(program, make, numbers of steps, states given, low) -> RMS errors at logsnr 6, from `low` in equal steps."""

    def measure(run, make, steps, given=0, low=-6.0):
        found = []
        for num_steps in steps:
            x, states, truth = exact(run, num_steps, given, low)
            out = run(make(run.schedule, interior(run.schedule, num_steps, low)), x, given=states)
            found.append(np.sqrt(((out - truth) ** 2).mean()))
        return np.array(found)

    return measure


def slope(steps, errors):
    """The order, by regression."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.fixture(scope='module')
def check_order(errors, interior):
    """(program, solver, evaluations): the order is within 0.25 of the claim, which for UniPC is "at least"."""

    def check(run, solver, evaluations):
        in_a_step = solver.make(run.schedule, interior(run.schedule, 12)).num_evaluations // 12
        steps = evaluations // in_a_step
        found = errors(run, solver.make, steps, num_given(solver))
        order, claimed = slope(steps, found), order_of(solver)
        above = 1.5 if solver.name == 'unipc' or solver.options.get('final') == 'lower' else 0.25
        assert claimed - 0.25 < order < claimed + above, (order, found)
        assert found[-1] < (0.05 if claimed == 1 else 0.01)

    return check


def test_observed_order(solver_schedule, solver, program, check_order):
    """In two dimensions, logsnr from -6 to 6 in equal steps, which are smooth in every coordinate."""
    skip_if_none(solver, solver_schedule)
    check_order(program(solver_schedule), solver, EVALUATIONS)


@pytest.fixture(scope='module')
def inverted(interior):
    """(program) -> (times, x at the last of them, the exact flow's x at the first)."""

    @functools.cache
    def solve(run):
        falling = interior(run.schedule, 96, -4.0, 4.0)
        x = run.start(falling[-1])
        return falling, x, run.mixture.flow(run.schedule, x, falling[-1], falling[0], tolerance=1e-8)

    return solve


def test_inversion_and_sampling_round_trip(solver_schedule, solver, program, inverted):
    """On rising grids as on falling ones: the exact flow both ways."""
    skip_if_none(solver, solver_schedule)
    run = program(solver_schedule)
    falling, x, flowed = inverted(run)
    noise = run(solver.make(solver_schedule, falling[::-1]), x)
    back = run(solver.make(solver_schedule, falling), noise)
    size = np.hypot(solver_schedule.alpha(falling[0]), solver_schedule.sigma(falling[0]))
    tolerance = 0.06 if order_of(solver) == 1 else 3e-3
    assert np.sqrt(((back - x) ** 2).mean()) < tolerance
    assert np.sqrt(((noise - flowed) ** 2).mean()) / size < tolerance


def test_observed_order_in_64_dimensions(solver, program, check_order):
    skip_if_none(solver, schedules.Flow())
    check_order(program(schedules.Flow(), 'gmm64'), solver, 2 * EVALUATIONS)


@pytest.mark.parametrize(
    ('make', 'order', 'cap'),
    [
        (functools.partial(solvers.lms, order=3), 3, 2),
        (functools.partial(solvers.lms, order=4), 4, 2),
        (functools.partial(solvers.deis, order=3), 3, 2),
        (functools.partial(solvers.deis, order=4, polynomial='logsnr'), 4, 2),
        (functools.partial(solvers.dpm_solver_m, order=3), 3, 2),
        (solvers.dpmpp_3m, 3, 2),
        (functools.partial(solvers.dpmpp_3m_sde, eta=0.0), 3, 2),
        (functools.partial(solvers.unipc, order=4), 5, 3),
    ],
    ids=lambda value: str(getattr(value, 'keywords', '')),
)
def test_a_first_order_start_caps_the_order(program, errors, make, order, cap):
    """Where x0 changes at once, from logsnr 0 on: at 2, with a corrector at 3. Exact states in place of the first
    ones, or a single-step start, lift the cap.
    """
    run = program(schedules.Flow())
    measure = functools.partial(errors, run, steps=EVALUATIONS, low=0.0)
    assert abs(slope(EVALUATIONS, measure(make)) - cap) < 0.15
    if order < 5:
        assert slope(EVALUATIONS, measure(make, given=order - 1)) > order - 0.25
    if 'start' in inspect.signature(make).parameters:
        started = measure(functools.partial(make, start='singlestep'))
        assert slope(EVALUATIONS, started) > order - 0.25


@pytest.mark.parametrize('name', ['dpmpp_2m', 'dpmpp_3m', 'dpm_solver_m', 'deis', 'unipc'])
def test_the_last_step_keeps_the_order(program, name):
    """To sigma = 0 from sigma / alpha = 0.03, far below the data's width: with final='adams' the error goes on falling;
    with a first-order last step it stays where it is.
    """
    schedule = schedules.ScaledLinear()
    run = program(schedule)
    steps, x = (24, 48, 96), run.start(1.0)
    truth = run.mixture.flow(schedule, x, 1.0, 0.0, tolerance=1e-11)
    errors = {}
    for final in ('adams', 'euler', 'lower'):
        plans = [getattr(solvers, name)(schedule, grids.karras(schedule, n), final=final) for n in steps]
        errors[final] = [np.sqrt(((run(plan, x) - truth) ** 2).mean()) for plan in plans]
    assert errors['adams'][0] > 3 * errors['adams'][1] > 3 * errors['adams'][2]
    for final in ('euler', 'lower'):
        assert errors[final][2] > 0.8 * errors[final][1] and errors[final][2] > 8 * errors['adams'][2]


def test_each_coordinate_is_a_method_of_its_own(program):
    """The names must not be settings without effect: on the same grid they differ."""
    schedule = schedules.VP()
    run = program(schedule)
    x, grid = run.start(0.9), np.linspace(0.9, 0.1, 9)
    for make in (solvers.euler, solvers.heun, solvers.rk4, functools.partial(solvers.lms, order=2)):
        outs = [run(make(schedule, grid, coordinate=c), x) for c in COORDINATES]
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(outs, 2)) > 1e-4
    for make in (solvers.deis, solvers.unipc):
        outs = [run(make(schedule, grid, polynomial=c), x) for c in POLYNOMIALS]
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(outs, 2)) > 1e-6
