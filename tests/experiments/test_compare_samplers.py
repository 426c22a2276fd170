"""The comparison of samplers on an oracle, whose errors and evaluations are known beforehand, and on a tiny run."""

import csv

import pytest

COLUMNS = 'schedule,grid,solver,num_steps,num_evaluations,error,seconds_per_sample'


@pytest.fixture(scope='module')
def comparison(experiment, tmp_path_factory):
    """(rows of results.csv, text of the report, folder) of one small comparison."""
    out = tmp_path_factory.mktemp('comparison')
    experiment('compare_samplers').main(
        ['--oracle=gmm2d', '--schedules=cosine,edm', '--grids=uniform,karras', '--steps=20,10,40', f'--out={out}']
        + ['--num_samples=256', '--num_paths=64']
    )
    with open(out / 'results.csv', newline='') as file:
        return list(csv.DictReader(file)), (out / 'report.md').read_text(), out


def lines(rows, **wanted):
    """{number of steps: row} of the rows that have these values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return {int(row['num_steps']): row for row in found}


def test_the_csv_has_the_promised_columns_and_every_solver(comparison):
    from diffjax.core import solvers

    rows, _, out = comparison
    assert ','.join(rows[0]).startswith(COLUMNS + ',')
    assert {row['solver'].partition(':')[0] for row in rows} == set(solvers.__all__) - {
        'consistency',
        'lcm',
        'repaint',
        'tcd',  # these are for distilled models and for inpainting
    }
    assert {(row['schedule'], row['grid']) for row in rows} == {
        (schedule, grid) for schedule in ('cosine', 'edm') for grid in ('uniform', 'karras')
    }
    for name in ('errors', 'distributions', 'trajectories'):
        assert (out / f'{name}.png').stat().st_size > 10_000


def test_one_compilation_for_each_schedule_and_size_of_table(comparison):
    """Tables of up to 64 rows and, for four evaluations a step at 20 and 40 steps, of up to 256."""
    assert '**4 compilation(s)**' in comparison[1]


def test_a_budget_of_evaluations_is_used_up(experiment, tmp_path):
    """As many steps as the budget allows, by hand; 25 solvers at one budget compile once."""
    import numpy as np

    from diffjax.core import schedules, solvers

    module = experiment('compare_samplers')

    def make(solver, end):
        def plan(num_steps):
            times = np.linspace(0.9, end, num_steps + 1)
            return times, solver(schedules.Flow(), times)

        return plan

    for solver, end, budget, num_steps in (
        (solvers.ddim, 0.0, 20, 20),
        (solvers.heun, 0.0, 20, 10),  # 19 evaluations
        (solvers.heun, 0.1, 21, 10),
        (solvers.rk4, 0.1, 35, 8),
        (solvers.pndm, 0.0, 20, 19),  # the first step twice
    ):
        assert module.within_budget(make(solver, end), budget)[0] == num_steps
    with pytest.raises(ValueError, match='one step takes more than 3'):
        module.within_budget(make(solvers.rk4, 0.1), 3)
    arguments = ['--oracle=gmm2d', '--schedules=flow', '--grids=karras', '--evaluations=20', f'--out={tmp_path}']
    rows = module.main([*arguments, '--num_samples=64', '--num_paths=16'])
    assert len(rows) >= 25 and '**1 compilation(s)**' in (tmp_path / 'report.md').read_text()
    assert all(row['num_evaluations'] <= 20 for row in rows)
    assert sum(row['num_evaluations'] >= 18 for row in rows) > 0.9 * len(rows)


def test_evaluations_are_counted(comparison):
    rows = comparison[0]
    for steps, row in lines(rows, schedule='edm', grid='karras', solver='heun:coordinate=sigma/alpha').items():
        assert int(row['num_evaluations']) == 2 * steps - 1  # the last step ends at sigma = 0
    for steps, row in lines(rows, schedule='edm', grid='karras', solver='dpmpp_2m:final=adams').items():
        assert int(row['num_evaluations']) == steps


@pytest.mark.parametrize('schedule', ['cosine', 'edm'])
@pytest.mark.parametrize(
    'solver', ['ddim:eta=0', 'dpmpp_2m:final=adams', 'heun:coordinate=sigma/alpha', 'heun:coordinate=angle']
)
def test_the_distance_to_the_exact_flow_falls_with_steps(comparison, schedule, solver):
    found = lines(comparison[0], schedule=schedule, grid='karras', solver=solver)
    assert {row['error_kind'] for row in found.values()} == {'flow'}
    errors = [float(found[steps]['error']) for steps in (10, 20, 40)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2], errors


def test_solvers_agree_where_theory_says_so(comparison):
    """In EDM's time t is sigma / alpha up to a factor: Euler in t is DDIM, and Heun is the same in both."""
    rows = comparison[0]
    for one, other in (('euler:coordinate=t', 'ddim:eta=0'), ('heun:coordinate=t', 'heun:coordinate=sigma/alpha')):
        a, b = (lines(rows, schedule='edm', grid='karras', solver=name) for name in (one, other))
        for steps, row in a.items():
            assert float(row['error']) == pytest.approx(float(b[steps]['error']), rel=1e-6)


def test_stochastic_solvers_are_measured_as_distributions(comparison):
    rows, report, _ = comparison
    kinds = {row['solver']: row['error_kind'] for row in rows}
    assert kinds['ddpm:variance=small'] == kinds['ddim:eta=0.5'] == 'distribution'
    assert kinds['ddim:eta=0'] == 'flow'
    assert '*' in next(line for line in report.splitlines() if line.startswith('| ddpm:variance=small'))


def test_the_distribution_distance_is_zero_for_equal_quantiles_and_sees_a_shift(experiment):
    import numpy as np

    from diffjax.core import oracles

    mixture = oracles.GaussianMixture(weights=np.ones(1), means=np.zeros((1, 2)), variances=np.ones((1, 2)))
    distance = experiment('compare_targets').SlicedWasserstein(mixture, 5_000, seed=0)
    x = np.random.default_rng(0).standard_normal((5_000, 2))
    assert distance(x) < 0.1 and distance.floor < 0.1
    # a shift by m moves the quantiles of direction u by m . u, whose mean square over directions is |m|^2 / 2
    assert distance(x + np.array([3.0, 0.0])) == pytest.approx(3 / np.sqrt(2), rel=0.15)


def test_a_grid_may_be_a_list_of_times(experiment, tmp_path):
    """Beside a named one, at its own number of steps; budgets and steps that it does not fit are said."""
    main = experiment('compare_samplers').main
    arguments = ['--oracle=gmm2d', '--schedules=flow', '--solvers=ddim:eta=0,heun:coordinate=t', '--num_samples=16']
    rows = main([*arguments, '--grids=[1.0, 0.6, 0.2, 0.0],uniform', '--evaluations=4,9', f'--out={tmp_path}'])
    listed = [row for row in rows if row['grid'].startswith('[')]
    assert {(row['solver'], row['budget'], row['num_steps'], row['num_evaluations']) for row in listed} == {
        ('ddim:eta=0', 4, 3, 3),
        ('ddim:eta=0', 9, 3, 3),
        ('heun:coordinate=t', 9, 3, 5),
    }
    assert {row['num_steps'] for row in rows if row['grid'] == 'uniform'} == {2, 4, 5, 9}
    assert '3 steps take more than 4 evaluations' in (tmp_path / 'report.md').read_text()
    rows = main([*arguments, '--grids=(1, 0.6, 0)|uniform', '--steps=2,3', f'--out={tmp_path}'])
    assert {(row['grid'], row['num_steps']) for row in rows} == {('(1, 0.6, 0)', 2), ('uniform', 2), ('uniform', 3)}
    assert 'at 3 steps: 3 times make 2 steps' in (tmp_path / 'report.md').read_text()


def test_values_on_the_command_line(experiment):
    values = experiment('command_line').values
    assert values('ddim, heun') == ['ddim', 'heun']
    assert values('a:b=1,c=2|d') == ['a:b=1,c=2', 'd']
    assert values('[1, 0.5, 0],uniform') == values('[1, 0.5, 0]|uniform') == ['[1, 0.5, 0]', 'uniform']
    assert values('') == []


def test_mistakes_are_one_line(experiment, tmp_path):
    main = experiment('compare_samplers').main
    for arguments, message in (
        (['--oracle=gmm2d', '--solvers=heum'], 'did you mean heun'),
        (['--oracle=gmm2d', '--grids=log'], 'valid: '),
        (['--oracle=gmm2d', '--grids=[1, 0.5'], r'a list of times is written \[1, 0.5, 0\], got \[1, 0.5'),
        (['--oracle=gmm2d', '--grids=[0.5, 1]', '--schedules=flow'], 'two times that fall within'),
        ([f'--workdir={tmp_path}'], 'holds no run'),
        (
            ['--oracle=gmm2d', '--solvers=ddim:eta=3', '--schedules=flow'],
            "ddim's eta is a number from 0 on and at most 1",
        ),
    ):
        with pytest.raises(SystemExit, match='error: .*' + message) as caught:
            main([*arguments, '--num_samples=4', f'--out={tmp_path / "out"}'])
        assert '\n' not in str(caught.value)


def test_a_panel_that_is_left_over_stays_empty(experiment, tmp_path, monkeypatch):
    """Three schedules in a square of four panels."""
    from matplotlib.figure import Figure

    module, figures = experiment('compare_report'), []
    monkeypatch.setattr(module, 'Figure', lambda **options: figures.append(Figure(**options)) or figures[-1])
    rows = [
        {'schedule': name, 'source': 'diffjax', 'solver': 'ddim', 'budget': n, 'num_evaluations': n, 'error': 1 / n}
        for name in ('flow', 'edm', 'cosine')
        for n in (5, 10)
    ]
    module.draw_errors(tmp_path / 'errors.png', rows, 'error', 'distance', {})
    assert [ax.axison for ax in figures[0].axes] == [True, True, True, False]
    assert [ax.get_title() for ax in figures[0].axes] == ['flow', 'edm', 'cosine', '']
