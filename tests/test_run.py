"""A trained run in a notebook: what is loaded, what is drawn from it, and what is left to look at."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import diffjax
from diffjax.build import ConfigError, build, build_plan
from diffjax.core import solvers
from diffjax.core.guidance import Guidance
from diffjax.core.sampling import sample_keys
from diffjax.core.schedules import Flow
from diffjax.core.solvers.free_plans import follow, free
from diffjax.core.solvers.plan_records import PlanRecord, describe
from diffjax.evaluation import frechet_distance, precision_recall
from diffjax.evaluation.spaces import Features, Space
from diffjax.plan_files import write_plan
from diffjax.restoring import restore
from diffjax.results import finished, held_out_likelihood, measure, save_samples, summary_lines
from diffjax.run import Sampler, balanced_labels, check_labels, make_sampler

pytestmark = pytest.mark.usefixtures('fast_compilation')


@pytest.fixture(scope='module')
def run(trained):
    """The trained run with noise on its parameters: a network of four steps hardly looks at its labels."""
    run = diffjax.load(trained)
    rng = np.random.default_rng(0)

    def noisy(leaf):
        return jax.device_put(leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), leaf.sharding)

    return replace(run, params=jax.tree.map(noisy, run.params))


def draw(run, sampler=None, labels=(3, 1, 4, 1, 5, 9), **options):
    """float32 samples, before they are rounded to bytes."""
    return (sampler or run.sampler)(
        run.params, build_plan(run.experiment.sampler, run.experiment.task), labels, **options
    )


def test_load_gives_what_was_trained(trained):
    run = diffjax.load(trained)
    state, step = restore(build(run.config), trained)
    assert (run.step, step) == (4, 4)
    jax.tree.map(np.testing.assert_array_equal, run.params, state.ema['ema'])
    raw = diffjax.load(str(trained), overrides={'sampler': {'params': 'raw'}})
    jax.tree.map(np.testing.assert_array_equal, raw.params, state.params)
    assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(raw.params)))
    assert isinstance(run.schedule, Flow)
    output = run.network.apply(run.params, np.zeros((2, 8, 8, 1)), np.zeros(2), np.array([0, 10]))
    assert output.shape == (2, 8, 8, 1)


def test_load_says_what_is_missing(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match='holds no run: there is no config.json in it'):
        diffjax.load(tmp_path / 'nothing')
    shutil.copy(trained / 'config.json', tmp_path)
    with pytest.raises(FileNotFoundError, match='holds no checkpoint yet'):
        diffjax.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']
    with pytest.raises(ConfigError, match="unknown key 'samplr'"):
        diffjax.load(trained, overrides={'samplr': {'params': 'raw'}})


def test_samples_are_bytes_of_the_dataset_shape(run):
    images = run.sample([0, 5, 9])
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1)
    x = draw(run, labels=[0, 5, 9])
    np.testing.assert_array_equal(images, np.clip(np.rint((x.astype(np.float64) + 1) * 127.5), 0, 255))


def test_a_seed_is_its_samples(run, trained):
    once, again, other = (draw(run, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    reloaded = diffjax.load(trained)
    np.testing.assert_array_equal(run.experiment.source[0]['image'], reloaded.experiment.source[0]['image'])
    np.testing.assert_array_equal(diffjax.load(trained).sample([1, 2, 3], seed=5), reloaded.sample([1, 2, 3], seed=5))


def test_a_sample_depends_on_seed_place_and_label_alone(run):
    """Not on how many are drawn with it, nor in which batches: the noise is equal to the bit, the rest to rounding."""
    labels = np.arange(30) % 10
    whole = draw(run, labels=labels)  # batches of 40
    small = Sampler(run.experiment.task, (8, 8, 1), run.experiment.mesh, batch_size=8)
    np.testing.assert_allclose(draw(run, small, labels=labels), whole, atol=1e-4)
    np.testing.assert_allclose(draw(run, labels=labels[:5]), whole[:5], atol=1e-4)
    changed = labels.copy()
    changed[4] = 9
    other = draw(run, labels=changed)
    np.testing.assert_allclose(np.delete(other, 4, 0), np.delete(whole, 4, 0), atol=1e-4)
    assert np.abs(other[4] - whole[4]).max() > 1e-2
    assert len(np.unique(whole.round(3), axis=0)) == 30


def test_one_device_draws_what_eight_draw(run):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    alone = Sampler(run.experiment.task, (8, 8, 1), mesh, batch_size=6)
    params = jax.tree.map(np.asarray, run.params)
    x = alone(params, build_plan(run.experiment.sampler, run.experiment.task), (3, 1, 4, 1, 5, 9))
    np.testing.assert_allclose(x, draw(run), atol=1e-4)


def test_a_plan_may_come_from_a_file(run, tmp_path):
    """DDIM in ten steps as a free plan, which remembers all ten estimates: the same samples, whatever grid is named."""
    plan = solvers.ddim(Flow(), np.linspace(1, 0, 11))
    with jax.enable_x64(True):
        written = jax.tree.map(np.asarray, follow(Flow(), free(Flow(), plan), 1.0))
    assert (written.num_remembered, plan.num_remembered) == (10, 1)
    write_plan(tmp_path / 'plan.json', PlanRecord(written, describe(Flow()), 'ddim', 'uniform', {}))
    expected = run.sample([3, 1, 4], solver='ddim', grid='uniform', num_steps=10)
    for grid, num_steps in (('uniform', 10), ('karras', 3)):
        images = run.sample([3, 1, 4], solver=str(tmp_path / 'plan.json'), grid=grid, num_steps=num_steps)
        assert np.abs(images.astype(int) - expected).max() <= 1  # a byte's rounding
    assert np.abs(run.sample([3, 1, 4], solver='ddim', num_steps=3).astype(int) - expected).max() > 1


def test_guidance(run):
    free = draw(run)
    np.testing.assert_allclose(draw(run, guidance=Guidance(np.float32(1))), free, atol=1e-4)
    strong = draw(run, guidance=Guidance(np.float32(4)))
    assert np.abs(strong - free).max() > 1e-2
    # Scale 0 is the baseline: the null label, or a negative one.
    zero = Guidance(np.float32(0))
    np.testing.assert_allclose(draw(run, guidance=zero), draw(run, labels=[10] * 6), atol=1e-4)
    np.testing.assert_allclose(draw(run, guidance=zero, negative_label=2), draw(run, labels=[2] * 6), atol=1e-4)
    images = run.sample([3, 1], guidance=4.0, negative_label=2)
    assert (images != run.sample([3, 1], guidance=4.0)).any()
    set_in_config = replace(
        run, experiment=replace(run.experiment, sampler=replace(run.experiment.sampler, negative_label=2))
    )
    np.testing.assert_array_equal(set_in_config.sample([3, 1], guidance=4.0), images)


def test_refined_guidance_and_transforms(run, compiles):
    """Each setting does what it says, on its own and in one program with its other values."""
    labels = np.arange(20) % 10
    strong = run.sample(labels, guidance=6.0)
    for change in ({'guidance_rescale': 0.7}, {'cfg_zero_star': True}, {'zero_init': 1}):
        assert (run.sample(labels, guidance=6.0, **change) != strong).any(), change
    plan = build_plan(run.experiment.sampler, run.experiment.task)

    def at_data(**changes):
        settings = replace(run.experiment.sampler, guidance=6.0, **changes)
        return run.sampler(run.params, plan, labels, **run.experiment.sampling_options(settings))

    assert np.abs(at_data()).max() > 1.2  # the last step lands on x0
    assert np.abs(at_data(threshold=0.5)).max() <= 0.5 + 1e-5
    assert np.abs(at_data(dynamic_threshold=0.9)).max() <= 1 + 1e-5
    with compiles() as programs:
        np.testing.assert_allclose(at_data(threshold=1e4), at_data(threshold=2e4), atol=1e-5)
        assert np.abs(at_data(threshold=0.4)).max() <= 0.4 + 1e-5
        assert (at_data(dynamic_threshold=0.5) != at_data(dynamic_threshold=0.9, dynamic_threshold_max=1.0)).any()
    assert programs == []
    np.testing.assert_allclose(at_data(threshold=1e4), at_data(), atol=1e-4)
    with pytest.raises(ConfigError, match='lies in'):
        run.sample(labels, dynamic_threshold=99)


@pytest.mark.parametrize('labels', [[11], [-1], [0.5], [[1, 2]], [], ['3'], [True]])
def test_wrong_labels(run, labels):
    with pytest.raises(ConfigError, match=r'labels are whole numbers from 0 to 9; got \['):
        run.sample(labels)


def test_one_label_and_the_null_label(run):
    assert run.sample(3).shape == (1, 8, 8, 1)
    assert run.sample([10]).shape == (1, 8, 8, 1)
    np.testing.assert_array_equal(check_labels(np.array([1, 2], np.uint8), 10), np.array([1, 2], np.int32))


def test_overrides(run):
    plain = run.sample([0, 1])
    for override in ({'solver': 'ddim'}, {'grid': 'karras:rho=3'}, {'num_steps': 9}, {'guidance': 3.0}):
        assert (run.sample([0, 1], **override) != plain).any(), override
    assert (run.sample([0, 1], guidance=3.0, guidance_low=0.01, guidance_high=0.02) == plain).all()
    np.testing.assert_array_equal(run.sample([0, 1]), plain)  # nothing sticks
    for key in ('solvr', 'params', 'batch_size'):
        with pytest.raises(ConfigError, match=f"'{key}'; valid: solver, grid, num_steps, guidance"):
            run.sample([0], **{key: 'x'})
    with pytest.raises(ConfigError, match="unknown name 'hein'"):
        run.sample([0], solver='hein')
    with pytest.raises(ConfigError, match='negative_label is a class from 0 to 9'):
        run.sample([0], guidance=2.0, negative_label=12)


def test_nothing_is_compiled_twice(run, compiles):
    """Solver, grid, number of steps, seed, labels, scale, interval: one program without guidance, one with."""
    sampler = make_sampler(run.experiment)
    fresh = replace(run, sampler=sampler)
    changes = (
        {'solver': 'ddim:eta=0.5'},
        {'solver': 'ddpm:variance=large'},
        {'solver': 'dpmpp_2m', 'grid': 'logsnr'},
        {'solver': 'euler', 'num_steps': 50},
        {'solver': 'heun', 'grid': 'karras', 'num_steps': 20},
        {'num_steps': 1},
        {'seed': 123},
    )
    fresh.sample([1, 2])
    assert sampler.num_traces == 1
    with compiles() as programs:
        for change in changes:
            fresh.sample([7, 8], **change)
    assert programs == [] and sampler.num_traces == 1
    with compiles() as programs:
        fresh.sample([1, 2], guidance=2.0)
    assert 'jit(draw)' in programs and sampler.num_traces == 2
    with compiles() as programs:
        for change in changes:
            fresh.sample([7, 8], guidance=3.5, guidance_low=0.1, negative_label=3, **change)
    assert programs == [] and sampler.num_traces == 2


@pytest.mark.parametrize('num, classes', [(1437, 10), (40, 10), (7, 10), (5, 0), (1000, 1000)])
def test_classes_are_as_equally_often_as_the_number_allows(num, classes):
    labels = balanced_labels(num, classes)
    counts = np.bincount(labels, minlength=max(classes, 1))
    assert len(labels) == num and labels.dtype == np.int32
    assert counts.max() - counts.min() <= (1 if num >= classes else counts.max())
    assert labels.max() < max(classes, 1)


def test_what_a_run_leaves(run, trained, tmp_path):
    """Samples, figures and a report, of the very samples that the sampler draws: none is chosen."""
    shutil.copy(trained / 'metrics.csv', tmp_path)
    small = replace(run.experiment.evaluation, num_samples=43, noise_levels=3)
    experiment = replace(run.experiment, evaluation=small)
    assert not finished(tmp_path, 4)
    figures = measure(experiment, run.params, tmp_path, 4, seed=2, progress=False)
    assert finished(tmp_path, 4) and finished(tmp_path, 3) and not finished(tmp_path, 5)

    archive = np.load(tmp_path / 'samples.npz')
    assert sorted(archive) == ['arr_0', 'labels']
    assert archive['arr_0'].dtype == np.uint8 and archive['arr_0'].shape == (43, 8, 8, 1)
    assert np.bincount(archive['labels']).tolist() == [5, 5, 5] + [4] * 7
    np.testing.assert_array_equal(archive['arr_0'], run.sample(archive['labels'], seed=2))

    stored = json.loads((tmp_path / 'figures.json').read_text())
    assert (stored['step'], stored['seed'], stored['num_samples']) == (4, 2, 43)
    assert stored['evaluations_per_sample'] == 5  # three steps of Heun; the last lands on the data
    assert {'class_accuracy', 'frechet_ratio', 'precision', 'recall', 'memorised_fraction'} <= set(stored)
    assert stored['frechet_distance'] == figures['frechet_distance']
    report = (tmp_path / 'report.md').read_text()
    for text in (
        '# digits',
        'class accuracy',
        'Frechet',
        '](samples.png)',
        '](loss_by_noise_level.png)',
        '](loss.png)',
    ):
        assert text in report
    assert f'{figures["frechet_ratio"]:.3f}' in report and f'{figures["class_accuracy"]:.2%}' in report
    assert report.count('| 0.') >= 3  # the table by noise level
    for name in ('samples.png', 'loss.png', 'loss_by_noise_level.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'
    assert f'class accuracy {figures["class_accuracy"]:.2%}' in summary_lines(figures)


def test_figures_in_the_space_and_against_the_reference_of_the_config(run, tmp_path, monkeypatch):
    """Inception's place is taken by a small map of the pixels, with its three kinds of features."""

    def inception(*, weights='', resize='tensorflow'):
        def extract(images):
            x = images.reshape(len(images), -1) / np.float32(255)
            return Features(x[:, 20:28], x[:, :6] + x[:, -6:], 3 * x[:, 24:])

        return Space(f'{weights}, {resize}', extract, lambda shape: (8, 6), 16)

    monkeypatch.setattr('diffjax.evaluation.spaces.inception', inception)
    experiment = run.experiment
    real = {'train': experiment.source.arrays['image'], 'test': experiment.test.arrays['image']}
    np.savez(tmp_path / 'half.npz', real['test'][:180])
    drawn = {}
    for reference in ('', str(tmp_path / 'half.npz')):
        settings = replace(experiment.evaluation, features='inception:resize=pytorch', inception_weights='w.x')
        settings = replace(settings, reference=reference, num_samples=43, noise_levels=1)
        figures = measure(replace(experiment, evaluation=settings), run.params, tmp_path, 4, seed=2, progress=False)
        images = drawn[reference] = np.load(tmp_path / 'samples.npz')['arr_0']
        target = real['test'] if not reference else real['test'][:180]
        points = [inception().extract(x) for x in (images, target, real['train'][:43])]
        for i, name in ((0, 'frechet_distance'), (1, 'spatial_frechet_distance')):
            assert figures[name] == pytest.approx(frechet_distance(points[0][i], points[1][i]), rel=1e-6)
        assert (figures['precision'], figures['recall']) == precision_recall(points[1].points, points[0].points)
        assert figures['inception_score'] > 1 and figures['features'] == 'w.x, pytorch'
        assert 0 <= figures['class_accuracy'] <= 1 and 'memorised_fraction' not in figures
        if reference:
            assert figures['reference'] == 'half.npz (180 images)' and 'frechet_ratio' not in figures
        else:
            assert figures['reference'] == 'digits test (360 images)'
            expected = frechet_distance(points[2].points, points[1].points)
            assert figures['frechet_distance_train'] == pytest.approx(expected, rel=1e-6)
        report, lines = (tmp_path / 'report.md').read_text(), summary_lines(figures)
        assert 'w.x, pytorch' in report and figures['reference'] in report and 'Inception Score' in report
        assert '  between samples and reference in w.x, pytorch' in lines
        assert f'spatial Frechet distance {figures["spatial_frechet_distance"]:.4g}' in lines
    np.testing.assert_array_equal(*drawn.values())


def bits_by_runge_kutta(run, batch, seed, t_min, num_steps=100):
    """Bits per dimension by fixed steps of the ODE in t, dx/dt = network, and the divergence along one probe each."""
    num = len(batch['label'])
    bins, probes = jnp.moveaxis(jax.vmap(jax.random.split)(sample_keys(jax.random.key(seed), num)), 1, 0)
    u = jax.vmap(lambda key: jax.random.uniform(key, (8, 8, 1)))(bins)
    v = jax.vmap(lambda key: jax.random.rademacher(key, (1, 8, 8, 1), np.float32)[0])(probes)

    @jax.jit
    def slope(x, t):
        def velocity(x):
            return run.network.apply(run.params, x, jnp.full(num, 1000 * t), batch['label'])

        value, along = jax.jvp(velocity, (x,), (v,))
        return value, (v * along).sum((1, 2, 3))

    x, gain, h = (batch['image'].astype(np.float32) + u - 0.5) * (2 / 255) - 1, 0.0, (1 - t_min) / num_steps
    x = (1 - t_min) * x
    for t in t_min + np.arange(num_steps, dtype=np.float32) * np.float32(h):
        (a, da), t2 = slope(x, t), t + np.float32(h / 2)
        b, db = slope(x + h / 2 * a, t2)
        c, dc = slope(x + h / 2 * b, t2)
        d, dd = slope(x + h * c, t + np.float32(h))
        x, gain = x + h / 6 * (a + 2 * b + 2 * c + d), gain + h / 6 * (da + 2 * db + 2 * dc + dd)
    log_density = norm.logpdf(np.asarray(x, np.float64)).sum((1, 2, 3)) + np.asarray(gain, np.float64)
    log_density += 64 * np.log(1 - t_min)  # of x_t / alpha
    return 8 - (log_density / 64 + np.log(256 * 2 / 255)) / np.log(2)  # 8 bits if it were uniform over all bins


def test_bits_per_dimension_of_held_out_images(run, monkeypatch):
    """By another integrator, in other coordinates, with the same draws; in batches of eight as in one."""
    settings = replace(run.experiment.evaluation, num_likelihoods=9, likelihood_tolerance=1e-3)
    settings = replace(settings, likelihood_t_min=0.1)
    experiment = replace(run.experiment, evaluation=settings, sampler=replace(run.experiment.sampler, batch_size=8))
    figures = held_out_likelihood(experiment, run.params)
    bits = bits_by_runge_kutta(run, experiment.test.read(range(9)), experiment.seed, np.float32(0.1))
    assert figures['num_likelihoods'] == 9 and 50 < figures['likelihood_evaluations'] < 4000
    np.testing.assert_allclose(figures['bits_per_dimension'], bits.mean(), atol=1e-3)
    np.testing.assert_allclose(figures['bits_standard_error'], bits.std() / np.sqrt(9), atol=1e-3)
    assert figures['bits_blur'] == pytest.approx(0.1 / 0.9)  # of Flow at t = 0.1
    assert summary_lines(figures)[1] == 'of the density blurred by noise of 0.11: likelihood_t_min is above 0'

    monkeypatch.setattr('diffjax.core.likelihood.MAX_STEPS', 2)
    short = held_out_likelihood(experiment, run.params)
    assert short['likelihoods_out_of_steps'] == 9 and 'bits_per_dimension' not in short
    assert held_out_likelihood(run.experiment, run.params) == {}


def test_without_a_held_out_split_there_is_still_a_report(run, tmp_path):
    config = {**run.config, 'dataset': {**run.config['dataset'], 'test_split': ''}}
    config['evaluation'] = {**config['evaluation'], 'num_samples': 8}
    experiment = build(config)
    assert experiment.test is None
    figures = measure(experiment, run.params, tmp_path, 4, seed=0, progress=False)
    assert set(figures) == {'step', 'evaluations_per_sample', 'seconds_per_sample'}
    assert (tmp_path / 'samples.npz').exists() and 'samples.png' in (tmp_path / 'report.md').read_text()


def test_latents_are_stored_as_latents(tmp_path):
    latents = np.random.default_rng(0).standard_normal((4, 32, 32, 4)).astype(np.float32)
    archive, picture = save_samples(tmp_path / 'a' / 'x', latents, np.array([0, 1, 2, 3]))
    stored = np.load(archive)
    assert sorted(stored) == ['labels', 'latents'] and picture.read_bytes()[:4] == b'\x89PNG'
    np.testing.assert_array_equal(stored['latents'], latents)
