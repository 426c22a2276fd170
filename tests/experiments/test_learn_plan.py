"""Learned plans: where the best is known the optimisers find it, files hold what is stated, nothing gets worse."""

import csv
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tqdm import tqdm

from diffjax.core import oracles, parameterizations, schedules, solvers
from diffjax.core.sampling import sample, sample_keys, starting_noise
from diffjax.core.solvers.plan_records import PlanRecord, describe
from diffjax.plan_files import write_plan

SMALL = ['--num_train=256', '--num_held_out=128', '--num_screened=32', '--batch_size=128']
AGAINST = ['--against_solvers=ddim|dpmpp_2m|heun:coordinate=t', '--against_grids=uniform|karras']


@pytest.fixture(scope='module')
def learned(experiment, tmp_path_factory):
    """(rows of results.csv, folder) of two small plans."""
    out = tmp_path_factory.mktemp('learned')
    experiment('learn_plan').main(
        ['--oracle=gmm2d', '--schedules=flow,edm', '--num_evaluations=4', '--num_updates=5', '--num_polish=20']
        + ['--learning_rate=0.01', f'--out={out}', *SMALL, *AGAINST]
    )
    with open(out / 'results.csv', newline='') as file:
        return list(csv.DictReader(file)), out


def plain_sampling(plan, posterior, x):
    """The loop in NumPy, from a plan as it stands in the JSON."""
    anchor, memory = x, [np.zeros_like(x)] * (len(plan['to_x'][0]) - 2)
    for t, (p, q), to_x, to_anchor in zip(plan['t'], plan['remember'], plan['to_x'], plan['to_anchor']):
        guess = posterior(x, t)
        memory = [p * guess.x0 + q * guess.eps, *memory[:-1]]
        parts = [x, anchor, *memory]
        x, anchor = (sum(c * part for c, part in zip(row, parts)) for row in (to_x, to_anchor))
    return x


@pytest.mark.parametrize('name', ['Flow', 'EDM'])
def test_the_file_holds_what_is_stated(learned, name):
    """Held-out RMS distance: the JSON's numbers, a NumPy loop, noise drawn anew, and the exact flow."""
    rows, out = learned
    data = json.loads((out / f'{name.lower()}-4' / 'plan.json').read_text())
    assert data['schedule']['name'] == name
    schedule, mixture = getattr(schedules, name)(), oracles.gmm2d()
    with jax.enable_x64(True):
        keys = sample_keys(jax.random.key(0), 128, start=256)
        eps = np.asarray(starting_noise(SimpleNamespace(start=(0.0, 1.0)), keys, (2,)))
    top = float(schedule.sigma(np.float64(1.0)))
    ends = mixture.flow(schedule, top * eps, 1.0, 0.0, tolerance=1e-9)

    def posterior(x, t):
        return mixture.posterior(x, schedule.alpha(np.float64(t)), schedule.sigma(np.float64(t)))

    x = plain_sampling(data['plan'], posterior, data['plan']['start'][1] * eps)
    rms = np.sqrt(np.mean(np.sum((x - ends) ** 2, 1)))
    row = next(r for r in rows if r['schedule'] == name.lower() and r['solver'] == 'learned')
    assert rms == pytest.approx(float(row['held_out_rms']), rel=1e-6) == pytest.approx(data['notes']['held_out_rms'])


@pytest.mark.parametrize('name', ['flow', 'edm'])
def test_learning_lowers_the_error_on_both_kinds_of_starts(learned, name):
    rows, _ = learned
    made = [row for row in rows if row['schedule'] == name]
    assert made[0]['solver'] == 'learned' and len(made) > 4
    for kind in ('train_rms', 'held_out_rms'):
        assert float(made[0][kind]) < 0.7 * min(float(row[kind]) for row in made[1:])


@pytest.mark.parametrize('name', ['flow', 'edm'])
def test_learned_times_fall_and_calls_are_as_many_as_asked(learned, name):
    rows, out = learned
    plan = json.loads((out / f'{name}-4' / 'plan.json').read_text())['plan']
    assert plan['t'][0] == 1 and (np.diff(plan['t']) < 0).all() and plan['t'][-1] > 0
    assert sum(plan['live']) == 4 == int(rows[0]['num_evaluations'])
    assert max(int(row['num_evaluations']) for row in rows) == 4


def test_the_report_and_pictures(learned):
    _, out = learned
    text = (out / 'report.md').read_text()
    assert 'flow-4/plan.json: ' in text and '128 held out' in text and '![plan](edm-4/plan.png)' in text
    for name in ('flow-4', 'edm-4'):
        assert (out / name / 'plan.png').stat().st_size > 10_000
        assert (out / name / 'learning.png').stat().st_size > 5_000


def test_errors_against_evaluations(experiment, tmp_path, monkeypatch):
    """For each schedule a curve of the learned plans and one of the best hand-made, over its numbers of evaluations."""
    module, drawn = experiment('learn_plan'), {}
    monkeypatch.setattr(module, 'line_plot', lambda path, curves, **axes: drawn.update(curves))
    cells = [
        SimpleNamespace(
            problem=SimpleNamespace(name=name),
            num_evaluations=num,
            rows=[{'held_out_rms': error}, {'held_out_rms': 3 * error}, {'held_out_rms': 9 * error}],
        )
        for name, num, error in (('flow', 4, 0.2), ('flow', 6, 0.1), ('vp', 4, 0.5), ('vp', 6, 0.4))
    ]
    module.draw_errors(tmp_path / 'errors.png', cells)
    assert drawn['flow: learned'] == ([4, 6], [0.2, 0.1])
    assert drawn['vp: best hand-made'] == ([4, 6], pytest.approx([1.5, 1.2])) and len(drawn) == 4


def gaussian_problem(experiment, schedule, num=64):
    """One Gaussian, whose flow is a straight map: mean and scale in closed form."""
    learning = experiment('plan_learning')
    mean, std = np.array([0.7, -0.4]), 0.6
    mixture = oracles.GaussianMixture(weights=np.ones(1), means=mean[None], variances=np.full((1, 2), std**2))
    denoiser, keys = mixture.denoiser(schedule), sample_keys(jax.random.key(3), 2 * num)
    alpha, sigma = (float(f(np.float64(1.0))) for f in (schedule.alpha, schedule.sigma))
    with jax.enable_x64(True):
        eps = np.asarray(starting_noise(SimpleNamespace(start=(0.0, 1.0)), keys, (2,)))
    ends = mean + std * (sigma * eps - alpha * mean) / np.hypot(alpha * std, sigma)

    def draw(params, plan, keys, labels):
        return sample(denoiser, plan, starting_noise(plan, keys, (2,)), None, keys)[0]

    starts = learning.Starts(np.asarray(jax.random.key_data(keys)), np.zeros(2 * num, np.int32), ends)
    return learning.Problem(
        name='gaussian',
        schedule=schedule,
        parameterization=parameterizations.EDM(),
        params=(),
        draw=draw,
        train=starts.take(slice(num)),
        held_out=starts.take(slice(num, None)),
        batch_size=num // 2,
        double=True,
    )


@pytest.mark.parametrize('adam, polish, reached', [(0, 40, 1e-4), (400, 0, 0.02)], ids=['bfgs', 'adam'])
def test_each_optimiser_finds_the_plan_that_is_exact(experiment, adam, polish, reached):
    """For a Gaussian x0 is linear in x, and so is the flow: one call suffices, if its two coefficients are right."""
    learning, schedule = experiment('plan_learning'), schedules.Cosine()
    problem, plan = gaussian_problem(experiment, schedule), solvers.ddim(schedule, [1.0, 0.0])
    distances = learning.Distances(problem, (1, 1, 0))
    settings = learning.Settings(num_updates=adam, num_polish=polish, learning_rate=0.05, seed=0)
    made = learning.learn(problem, plan, distances, settings, tqdm(disable=True))
    assert distances.rms(plan, problem.held_out) > 0.5  # one step of DDIM ends at the mean
    assert distances.rms(made.plan, problem.held_out) < reached
    assert made.curve[0]['held_out_rms'] == pytest.approx(distances.rms(plan, problem.held_out))
    assert (
        made.curve[-1]['update'] == adam + polish or made.curve[-1]['optimiser'] == 'bfgs'
    )  # which ends when it is done
    assert distances.num_traces == 1


def test_what_makes_it_worse_is_not_kept(experiment):
    """A learning rate that throws the plan away, and no update at all: the plan that came in comes out."""
    learning, schedule = experiment('plan_learning'), schedules.Cosine()
    problem, plan = gaussian_problem(experiment, schedule), solvers.dpmpp_2m(schedule, [1.0, 0.6, 0.3, 0.0])
    distances = learning.Distances(problem, (3, 3, 0))
    for settings in (learning.Settings(2, 0, 1e3, 0), learning.Settings(0, 0, 0.01, 0)):
        made = learning.learn(problem, plan, distances, settings, tqdm(disable=True))
        assert distances.rms(made.plan, problem.train) == pytest.approx(distances.rms(plan, problem.train), rel=1e-9)


def test_distances_fill_up_the_last_chunk_and_cut_it(experiment):
    """40 of 64 starts in chunks of 32: each distance is its own start's."""
    learning, schedule = experiment('plan_learning'), schedules.Cosine()
    problem, plan = gaussian_problem(experiment, schedule), solvers.ddim(schedule, [1.0, 0.5, 0.0])
    distances = learning.Distances(problem, (2, 2, 0))
    all_of_them = distances(plan, problem.train)
    few = distances(plan, problem.train.take(slice(40)))
    assert few.shape == (40,) and all_of_them.shape == (64,)
    np.testing.assert_array_equal(few, all_of_them[:40])


def test_another_mixture_is_an_oracle_too(experiment):
    """gmm64:seed=3 has the sizes of gmm64, and end points of its own."""
    options = experiment('learn_plan').parse(['--oracle=gmm64:seed=3', '--num_held_out=2'])
    assert (options.num_train, options.num_held_out) == (4096, 2)
    options.num_train = 3
    problem = experiment('plan_problems').oracle_problem('flow', options)
    with jax.enable_x64(True):
        eps = np.asarray(starting_noise(SimpleNamespace(start=(0.0, 1.0)), sample_keys(jax.random.key(0), 5), (64,)))
    ends = oracles.gmm64(seed=3).flow(schedules.Flow(), eps, 1.0, 0.0, tolerance=1e-9)
    np.testing.assert_allclose(problem.train.ends, ends[:3], atol=1e-6)
    np.testing.assert_allclose(problem.held_out.ends, ends[3:], atol=1e-6)


# The hand-made ones.


def test_the_hand_made_are_all_there_is(experiment):
    """Every solver and grid by name, as long as may be, none twice, and none that draws noise."""
    module, schedule = experiment('hand_made'), schedules.Flow()
    plans, refused = module.hand_made_plans(
        schedule, parameterizations.V(), 5, grid_specs=['uniform', 'uniform:start=1', 'karras']
    )
    names = {made.solver.partition(':')[0] for made in plans}
    assert names | set(refused) == set(solvers.__all__)
    assert {'ddpm', 'euler_maruyama', 'lcm'} <= {name for name, why in refused.items() if 'draws noise' in why}
    assert {'ddim', 'dpmpp_2m', 'heun', 'rk4', 'unipc'} <= names
    assert {made.grid for made in plans} == {'uniform', 'karras'}  # 'uniform:start=1' is the same, number for number
    by_name = {(made.solver, made.grid): made for made in plans}
    assert by_name['dpmpp_2m:final=adams', 'uniform'].plan.num_evaluations == 5
    heun = by_name['heun:coordinate=t', 'uniform']
    assert (heun.num_steps, heun.plan.num_evaluations) == (3, 5)
    assert all(1 <= made.plan.num_evaluations <= 5 for made in plans)


def test_settings_are_multiplied_out(experiment):
    specs = experiment('hand_made').specs(['a', 'b'], {'a': {'x': (1, 2), 'y': ('u', 'v')}})
    assert specs == ['a:x=1,y=u', 'a:x=1,y=v', 'a:x=2,y=u', 'a:x=2,y=v', 'b']


# On a trained run.


@pytest.mark.usefixtures('fast_compilation')
def test_a_plan_for_a_trained_run(experiment, trained, tmp_path, monkeypatch):
    """Learned, written, read back through `sampler.solver`, and measured by samples."""
    monkeypatch.setattr(experiment('plan_problems'), 'REFERENCE_STEPS', 20)
    arguments = ['--num_train=16', '--num_held_out=8', '--num_screened=8', '--batch_size=8', '--num_updates=0']
    begin = ['--solver=ddim', '--grid=karras', '--num_polish=3', '--num_evaluations=3']
    rows = experiment('learn_plan').main([f'--workdir={trained}', f'--out={tmp_path}', *arguments, *begin, *AGAINST])
    start = next(row for row in rows if (row['solver'], row['grid']) == ('ddim', 'karras'))
    assert rows[0]['grid'] == 'from ddim on karras' and rows[0]['train_rms'] < 0.9 * start['train_rms']
    report = (tmp_path / 'report.md').read_text()
    assert 'class_accuracy' in report and 'learned, 3 evaluations' in report and 'reference, 39 evaluations' in report
    data = json.loads((tmp_path / 'plan.json').read_text())
    assert data['schedule'] == {'name': 'Flow'} and data['notes']['sampler'] == {'guidance': 1.0}


@pytest.mark.usefixtures('fast_compilation')
def test_a_file_that_gives_another_error_stops_the_study(experiment, tmp_path):
    module = experiment('learn_plan')
    problem = gaussian_problem(experiment, schedules.Cosine())
    plan = solvers.ddim(schedules.Cosine(), [1.0, 0.5, 0.0])
    stated = experiment('plan_learning').Distances(problem, (2, 2, 0)).rms(plan, problem.held_out)
    cell = SimpleNamespace(problem=problem, num_evaluations=2, rows=[{'held_out_rms': stated}])
    path = tmp_path / 'plan.json'
    write_plan(path, PlanRecord(plan, describe(schedules.Cosine()), '', '', {}))
    assert module.check_file(cell, path, None) == pytest.approx(stated)
    write_plan(path, PlanRecord(plan._replace(to_x=1.05 * plan.to_x), describe(schedules.Cosine()), '', '', {}))
    with pytest.raises(module.Stop, match=r'plan.json gives the RMS distance .*, and learning had'):
        module.check_file(cell, path, None)


def test_mistakes_are_one_line(experiment, tmp_path):
    main = experiment('learn_plan').main
    for arguments, message in (
        (['--oracle=gmm2d', '--schedules=flaw'], 'did you mean Flow'),
        (['--oracle=gmm3d'], 'did you mean gmm2d'),
        (['--oracle=gmm2d', '--against_solvers=ddpm'], 'no solver makes a plan of 6 evaluations: draws noise'),
        (['--oracle=gmm2d', '--solver=heum', *AGAINST], 'did you mean heun'),
        (['--oracle=gmm2d', '--solver=ddpm', *AGAINST], 'draws noise'),
        ([f'--workdir={tmp_path}'], 'holds no run'),
    ):
        with pytest.raises(SystemExit, match='error: .*' + message) as caught:
            main([*arguments, '--num_train=4', '--num_held_out=4', f'--out={tmp_path / "out"}'])
        assert '\n' not in str(caught.value)
