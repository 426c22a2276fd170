"""Grids against the papers' formulas and published tables."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import betainc

from diffjax.core import grids, schedules

FLOW, LINEAR, SD, EDM = schedules.Flow(), schedules.Linear(), schedules.ScaledLinear(), schedules.EDM()
ENDS = {name: inspect.signature(getattr(grids, name)).parameters.get('end') for name in grids.__all__}
ENDING = [name for name, end in ENDS.items() if end is not None and end.default == 'zero']


def ratio(schedule, t):
    """sigma / alpha."""
    return schedule.sigma(t) / schedule.alpha(t)


def told(schedule, t):
    """Integer timesteps, exactly."""
    steps = schedule.timestep(t)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    return np.round(steps).astype(int).tolist()


def test_shape_ends_and_direction(schedule, grid):
    """Falling, within [0, 1], from any number of steps; only one leading step makes no sense."""
    for num_steps in (1, 2, 3, 5, 50, 333, 1000):
        if grid is grids.leading and num_steps == 1:
            with pytest.raises(ValueError, match='one leading step starts at timestep 0'):
                grid(schedule, num_steps)
            continue
        t = grid(schedule, num_steps)
        assert t.shape == (num_steps + 1,) and t.dtype == np.float64
        assert (np.diff(t) < 0).all() and t[-1] == 0 and t[0] <= 1


@pytest.mark.parametrize('name', ENDING)
def test_both_ends_of_a_grid(schedule, name):
    """end = 'lowest' stops at the lowest level, above 0 and at the first entry of a table, after as many steps."""
    grid = getattr(grids, name)
    options = {'steps_offset': 1} if name == 'leading' else {}
    if name == 'linspace':
        with pytest.raises(ValueError, match='the last evaluation is at timestep 0'):
            grid(schedule, 5, end='lowest')
        return
    for num_steps in (2, 5, 50):
        t = grid(schedule, num_steps, end='lowest', **options)
        assert t.shape == (num_steps + 1,) and (np.diff(t) < 0).all() and t[-1] > 0 and t[0] <= 1
        if name == 'align_your_steps':
            level = max(0.029, ratio(schedule, np.float64(1e-3)) if isinstance(schedule, schedules.Discrete) else 0)
            assert ratio(schedule, t[-1]) == pytest.approx(level, rel=1e-9)
        elif isinstance(schedule, schedules.Discrete) or name in ('leading', 'trailing'):
            assert t[-1] == pytest.approx(1e-3, rel=1e-9)
    with pytest.raises(ValueError, match="end is 'zero' .* got 'sigma_min'"):
        grid(schedule, 5, end='sigma_min')


def test_tables_are_not_asked_below_their_first_entry(grid):
    """Down to t = 0 the last evaluation is at the first entry or above: sigma / alpha = 0.0292 on SD's betas."""
    zero = schedules.ScaledLinear(zero_terminal=True)
    short = schedules.Linear(num_timesteps=50, beta_start=0.002, beta_end=0.4)
    for schedule in (SD, zero, schedules.Shifted(base=SD, resolution=128), short):
        for num_steps in (2, 10, 50):
            t = grid(schedule, num_steps)
            assert t[-2] > schedule.first_time * (1 - 1e-9)


# Times.


def test_uniform():
    np.testing.assert_allclose(grids.uniform(FLOW, 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(grids.uniform(FLOW, 2, start=0.6, end=0.2), [0.6, 0.4, 0.2])
    assert told(LINEAR, grids.uniform(LINEAR, 10)[:-1]) == list(range(999, 0, -100))  # trailing integer timesteps


def test_given_times():
    given = [1.0, 0.7, 0.3, 0.0]
    for values in (given, tuple(given), np.array(given)):
        np.testing.assert_array_equal(grids.times(FLOW, 3, values=values), given)
    assert grids.times(FLOW, 1, values=[1, 0]).dtype == np.float64
    with pytest.raises(ValueError, match='4 times make 3 steps, and num_steps is 50: set it to 3'):
        grids.times(FLOW, 50, values=given)
    for values in ([0.5], [], [0.0, 1.0], [1.0, 0.5, 0.5], [1.2, 0.1], [0.4, -0.1], [1.0, float('nan'), 0.0], '1,0', 3):
        with pytest.raises(ValueError, match='at least two times that fall within'):
            grids.times(FLOW, 2, values=values)


@pytest.mark.parametrize(('alpha', 'beta'), [(0.6, 0.6), (1.0, 1.0), (0.5, 2.0)])
def test_beta_quantiles(alpha, beta):
    """The incomplete beta function takes the times back to equal steps; on a table, between its entries."""
    t = grids.beta(FLOW, 12, alpha=alpha, beta=beta)
    np.testing.assert_allclose(betainc(alpha, beta, t), np.linspace(1, 0, 13), atol=1e-9)
    t = grids.beta(SD, 12, alpha=alpha, beta=beta)
    np.testing.assert_allclose(betainc(alpha, beta, (t[:-1] - 1e-3) / 0.999), np.linspace(1, 0, 12), atol=1e-9)
    assert t[0] == 1 and t[-2] == pytest.approx(1e-3)


def test_a_flow_shift_by_hand():
    """Esser et al. 2024, Eq. 23 with shift 3: 0.75 -> 0.9, 0.5 -> 0.75, 0.25 -> 0.5; both ends stay where they are."""
    np.testing.assert_allclose(grids.shifted(FLOW, 4), [1, 0.9, 0.75, 0.5, 0], rtol=1e-14)
    np.testing.assert_allclose(grids.shifted(FLOW, 4, shift=1.0), [1, 0.75, 0.5, 0.25, 0], rtol=1e-14)
    moved = FLOW.logsnr(grids.shifted(FLOW, 9, shift=5.0)[1:-1]) - FLOW.logsnr(grids.uniform(FLOW, 9)[1:-1])
    np.testing.assert_allclose(moved, -2 * np.log(5), rtol=1e-12)


def test_a_shift_down_to_a_lowest_time():
    """diffusers' Stable Diffusion 3: 28 sigmas from 1 to 3 * 0.001 / 1.002 = 0.0029940, all of them shifted, then 0."""
    twice = 0.003 / 1.002
    expected = np.linspace(1, twice, 28)
    expected = np.append(3 * expected / (1 + 2 * expected), 0)
    np.testing.assert_allclose(grids.shifted(FLOW, 28, shift=3.0, low=twice), expected, rtol=1e-13)


@pytest.mark.parametrize('shift', [1e-8, 0.0008, 3.0, 1e8])
def test_a_shift_keeps_the_ends_to_the_last_digit(shift):
    """Where 1 is lost in a small shift, too; between the ends against Eq. 23 in exact fractions."""
    t = grids.shifted(FLOW, 8, shift=shift)
    exact = [Fraction(shift) * n / (8 + (Fraction(shift) - 1) * n) for n in range(8, -1, -1)]
    np.testing.assert_allclose(t, np.array(exact, np.float64), rtol=1e-15)
    assert t[0] == 1 and t[-1] == 0


@pytest.mark.parametrize(
    ('num_tokens', 'mu'), [(256, 0.5), (4096, 1.15), (2176, 0.825), (1024, 0.63), (8192, 5.53 / 3)]
)
def test_dynamic_shift_by_hand(num_tokens, mu):
    """FLUX.1: mu on the line through (256, 0.5) and (4096, 1.15); t' = e^mu / (e^mu + 1 / t - 1)."""
    t = np.array([0.8, 0.6, 0.4, 0.2])
    expected = np.exp(mu) / (np.exp(mu) + 1 / t - 1)
    shifted = grids.dynamic_shift(FLOW, 5, num_tokens=num_tokens)
    np.testing.assert_allclose(shifted, [1, *expected, 0], rtol=1e-7)
    if num_tokens == 4096:
        np.testing.assert_array_equal(grids.dynamic_shift(FLOW, 5), shifted)


# Integer timesteps.


def test_spacings_are_table_2s():
    """Lin et al. 2024, Table 2, T = 1000 and 10 steps, there counted from 1; solvers step from each to the next."""
    assert told(SD, grids.leading(SD, 10)) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0, -1]
    assert told(SD, grids.linspace(SD, 10)) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0, -1]
    assert told(SD, grids.trailing(SD, 10)) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]


def test_spacings_where_steps_do_not_divide():
    """As diffusers 0.42 rounds them: 30 steps of 1000, 3 steps with a tie, 48 with ties that rounding undoes."""
    assert told(SD, grids.leading(SD, 30))[:4] == [957, 924, 891, 858]
    assert told(SD, grids.leading(SD, 7)) == [852, 710, 568, 426, 284, 142, 0, -1]
    assert told(SD, grids.trailing(SD, 30))[:5] == [999, 966, 932, 899, 866]
    assert told(SD, grids.linspace(SD, 30))[:5] == [999, 965, 930, 896, 861]
    assert told(SD, grids.linspace(SD, 3)) == [999, 500, 0, -1]
    for num_steps in (7, 13, 24, 37, 48, 61, 333, 999, 1000):
        descending = np.round(np.arange(1000, 0, -1000 / num_steps)).astype(int) - 1
        assert told(SD, grids.trailing(SD, num_steps)) == [*descending[:num_steps], -1]
        assert told(SD, grids.linspace(SD, num_steps)) == [*np.linspace(0, 999, num_steps).round()[::-1], -1]


def test_spacings_of_stable_diffusion():
    """steps_offset = 1 and set_alpha_to_one = False: 50 steps 981, 961, ..., 1, the last to the first entry."""
    t = grids.leading(SD, 50, steps_offset=1, end='lowest')
    assert told(SD, t) == [*range(981, 0, -20), 0]
    assert ratio(SD, t[-1]) == pytest.approx(0.0292, abs=5e-5)


def test_one_step_starts_at_the_top():
    for grid in (grids.trailing, grids.linspace, grids.karras, grids.logsnr, grids.exponential, grids.align_your_steps):
        assert grid(SD, 1).tolist() == [1.0, 0.0]


def test_spacings_on_a_continuous_schedule():
    """As of a table of 1000 entries."""
    np.testing.assert_allclose(grids.leading(FLOW, 4), [0.751, 0.501, 0.251, 0.001, 0])
    np.testing.assert_allclose(grids.trailing(FLOW, 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(grids.linspace(FLOW, 4), [1, 0.667, 0.334, 0.001, 0])


def test_spacings_that_do_not_fit_are_refused():
    for grid in (grids.leading, grids.trailing, grids.linspace):
        with pytest.raises(ValueError, match='at most 50 steps, got num_steps = 51'):
            grid(schedules.Linear(num_timesteps=50), 51)
    with pytest.raises(ValueError, match='within 0 to 999, and 10 .* steps_offset = 100 go from 1000 to 100'):
        grids.leading(SD, 10, steps_offset=100)
    with pytest.raises(ValueError, match='steps_offset = -1 go from 899 to -1'):
        grids.leading(SD, 10, steps_offset=-1)


# Noise levels.


@pytest.mark.parametrize('rho', [1.0, 7.0])
def test_karras_is_the_papers_formula(rho):
    """Karras et al. 2022, Eq. 5: sigma_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho, sigma_N = 0."""
    i = np.arange(18)
    sigma = (80 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    t = grids.karras(EDM, 18, rho=rho)
    np.testing.assert_allclose(80 * t, np.append(sigma, 0), rtol=1e-9)
    np.testing.assert_allclose(80 * grids.karras(EDM, 17, rho=rho, end='lowest'), sigma, rtol=1e-9)


def test_karras_reaches_the_same_levels_everywhere(schedule):
    """sigma / alpha of the grid, on every schedule, with the top cut to what the schedule reaches."""
    top = min(20.0, schedule.sigma(np.float64(1)) / max(schedule.alpha(np.float64(1)), 1e-9))
    t = grids.karras(schedule, 9, sigma_min=0.02, sigma_max=20.0)[:-1]
    ramp = np.linspace(top ** (1 / 7), 0.02 ** (1 / 7), 9) ** 7
    np.testing.assert_allclose(ratio(schedule, t), ramp, rtol=1e-7)


def test_exponentials_are_k_diffusions():
    """sigma = exp(u^rho log(max / min) + log min), u from 1 to 0."""
    t = grids.exponential(EDM, 5, sigma_min=0.05, sigma_max=50.0)
    np.testing.assert_allclose(80 * t[:-1], 50 * (0.05 / 50) ** np.array([0, 0.25, 0.5, 0.75, 1]), rtol=1e-9)
    t = grids.polyexponential(EDM, 5, rho=2.0, sigma_min=0.05, sigma_max=50.0)
    levels = 0.05 * 1000 ** np.array([1, 0.5625, 0.25, 0.0625, 0])
    np.testing.assert_allclose(80 * t[:-1], levels, rtol=1e-9)
    np.testing.assert_array_equal(grids.polyexponential(SD, 6), grids.exponential(SD, 6))


def test_logsnr_steps_are_equal(schedule):
    low = max(-9.0, schedule.logsnr(np.float64(1)))
    t = grids.logsnr(schedule, 12, low=-9.0, high=8.0)
    np.testing.assert_allclose(schedule.logsnr(t[:-1]), np.linspace(low, 8, 12), atol=1e-7)


def test_default_levels():
    """EDM's 80 and 0.002, logsnr from -10 to 10; on SD's betas the table's own 14.6146 and 0.0292."""
    for grid, high, low in (
        (grids.karras, 80, 0.002),
        (grids.exponential, 80, 0.002),
        (grids.polyexponential, 80, 0.002),
        (grids.logsnr, np.exp(5), np.exp(-5)),
    ):
        np.testing.assert_allclose(ratio(FLOW, grid(FLOW, 7)[[0, -2]]), [high, low], rtol=1e-9)
        np.testing.assert_allclose(ratio(SD, grid(SD, 7)[[0, -2]]), [14.6146, 0.029167], rtol=1e-5)


def test_a_grid_that_asks_for_more_starts_at_one(schedule):
    for grid in (grids.karras, grids.exponential, grids.polyexponential):
        t = grid(schedule, 5, sigma_max=1e3)
        assert t[0] == 1 or ratio(schedule, t[0]) == pytest.approx(1e3, rel=1e-5)
        assert t[0] > 0.99
    assert grids.logsnr(schedules.VE(), 5, low=-30)[0] == grids.align_your_steps(SD, 5)[0] == 1


def test_softplus_is_even_in_its_coordinate(schedule):
    """log(1 + 3 alpha / sigma), written out, from what the schedule reaches to 0.2 / N or a table's first entry."""
    t = grids.softplus(schedule, 9)[:-1]
    steps = np.log1p(3 * schedule.alpha(t) / schedule.sigma(t))
    np.testing.assert_allclose(np.diff(steps), (steps[-1] - steps[0]) / 8, rtol=1e-6)
    assert t[0] == 1
    low = schedule.first_time or schedule.t_of_logsnr(-2 * np.log(np.float64(0.2 / 9)))
    assert t[-1] == pytest.approx(low, rel=1e-9)
    t = grids.softplus(schedules.Flow(), 6, knee=1.0, sigma_min=0.05)[:-1]
    np.testing.assert_allclose(t, np.geomspace(1, 0.05 / 1.05, 6), rtol=1e-12)
    with pytest.raises(ValueError, match='sigma_min lies between 0 and 80'):
        grids.softplus(schedules.EDM(), 9, sigma_min=90.0)
    with pytest.raises(ValueError, match="softplus's knee is a number above 0, got 0.0"):
        grids.softplus(schedules.EDM(), 9, knee=0.0)


PUBLISHED = {  # Sabour et al. 2024, Table 3
    'sd15': [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    'sdxl': [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    'deepfloyd': [160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006],
    'svd': [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}
TIMESTEPS = {  # the same, as published in timesteps of Stable Diffusion
    'sd15': [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
    'sdxl': [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
}


@pytest.mark.parametrize('model', PUBLISHED)
def test_align_your_steps_is_published(model):
    table, wide = PUBLISHED[model], schedules.EDM(sigma_max=1000.0)
    t = grids.align_your_steps(wide, 10, model=model)
    np.testing.assert_allclose(ratio(wide, t), [*table[:-1], 0], rtol=1e-9)
    np.testing.assert_allclose(
        ratio(wide, grids.align_your_steps(wide, 10, model=model, end='lowest')), table, rtol=1e-9
    )
    t = grids.align_your_steps(wide, 20, model=model)
    halfway = np.sqrt(np.array(table[:-1]) * np.array(table[1:]))  # log-linear between two levels
    np.testing.assert_allclose(ratio(wide, t[1::2]), halfway, rtol=1e-9)
    if model in TIMESTEPS:
        steps = SD.timestep(grids.align_your_steps(SD, 10, model=model)[:-1])
        np.testing.assert_allclose(steps, TIMESTEPS[model], atol=1.0)


def test_bad_options_are_refused():
    for make, message in (
        (lambda: grids.karras(SD, 5, rho=0.0), 'rho is a number above 0, got 0'),
        (lambda: grids.polyexponential(SD, 5, rho=-1.0), 'rho is a number above 0, got -1'),
        (lambda: grids.karras(SD, 5, sigma_min=20.0), 'from 80 to 20, on ScaledLinear from at most 14.6'),
        (lambda: grids.exponential(SD, 5, sigma_min=0.0), 'sigma_min is a number above 0, got 0.0'),
        (lambda: grids.logsnr(FLOW, 5, low=3.0, high=1.0), 'the lowest must be above 0 and below the highest'),
        (lambda: grids.align_your_steps(SD, 5, model='sd3'), "sd15, sdxl, deepfloyd, svd; got 'sd3'"),
        (lambda: grids.align_your_steps(SD, 10, model='svd'), 'meet at t = 1: take fewer steps'),
        (lambda: grids.shifted(FLOW, 5, shift=0.0), 'a shift is a number above 0, got 0.0'),
        (lambda: grids.shifted(FLOW, 5, low=1.0), "shifted's low lies below 1, got 1.0"),
        (lambda: grids.dynamic_shift(FLOW, 5, num_tokens=0), "dynamic_shift's num_tokens is a number from 1 on, got 0"),
        (
            lambda: grids.dynamic_shift(FLOW, 5, base_tokens=4096),
            'base_tokens and max_tokens are two numbers, got 4096 twice',
        ),
        (lambda: grids.beta(FLOW, 5, alpha=0.0), "beta's alpha is a number above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
