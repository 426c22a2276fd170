"""Models that draw in one step, from a config: what is built, refused, trained, drawn, measured and written."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import diffjax
from diffjax.baselines import Baseline, build_baseline, drawing, load_baseline, measure
from diffjax.build import build
from diffjax.data import make_iterator, read_all
from diffjax.evaluation import evaluate_samples
from diffjax.kinds import kind_of
from diffjax.restoring import restore, restore_params
from diffjax.training.loop import train
from diffjax.workdir import write_config

pytestmark = pytest.mark.usefixtures('fast_compilation')

NAMES = ('digits_vae', 'digits_gan')


def one_device(experiment):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    return replace(experiment, mesh=mesh)


@pytest.fixture(scope='module', params=NAMES)
def trained(request, tmp_path_factory, get_config):
    """(a workdir of the smoke config, trained on one device, and its experiment)."""
    workdir, config = tmp_path_factory.mktemp(request.param), get_config(request.param, 'smoke').to_dict()
    experiment = one_device(build_baseline(config))
    batches = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=0)
    write_config(workdir, config)
    assert train(experiment.trainer(), batches, workdir, announce=lambda text: None).step == 4
    return workdir, experiment


@pytest.fixture(scope='module')
def loaded(trained):
    """The run with noise on its parameters: networks of four steps hardly look at their labels."""
    rng = np.random.default_rng(0)

    def noisy(leaf):
        return jax.device_put(leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), leaf.sharding)

    run = diffjax.load(trained[0])
    return replace(run, params=jax.tree.map(noisy, run.params))


@pytest.mark.parametrize('name', NAMES)
def test_configs_are_plain_data(get_config, name):
    for arg in ('', 'smoke'):
        config = get_config(name, arg).to_dict()
        assert json.loads(json.dumps(config)) == config == get_config(name, arg).to_dict()
        assert isinstance(kind_of(config).build(config), Baseline)
    for wrong in ('smok', 'smoke=1'):
        with pytest.raises(ValueError, match=f'configs/{name}.py takes the argument smoke, got {wrong!r}'):
            get_config(name, wrong)


def test_samples_are_measured_as_those_of_diffusion(trained, tmp_path):
    """The figures are those of the images that are left, and they are left as they were drawn."""
    workdir, experiment = trained
    params, step = restore_params(experiment, workdir)
    figures = measure(experiment, params, tmp_path, step, seed=3)
    stored = np.load(tmp_path / 'samples.npz')
    labels = np.arange(40) % 10
    np.testing.assert_array_equal(stored['labels'], labels)
    np.testing.assert_array_equal(stored['arr_0'], diffjax.load(workdir).sample(labels, seed=3))
    train_images, test_images = read_all(experiment.source), read_all(experiment.test)
    expected = evaluate_samples(stored['arr_0'], labels, train_images, test_images, classifier={})
    for name in ('frechet_ratio', 'precision', 'recall', 'class_accuracy', 'memorised_fraction'):
        assert figures[name] == expected[name]
    written = json.loads((tmp_path / 'figures.json').read_text())
    assert (written['seed'], written['step'], written['evaluations_per_sample']) == (3, 4, 1)
    assert written['seconds_per_sample'] > 0
    report = (tmp_path / 'report.md').read_text()
    assert 'variational autoencoder' in report or 'its game relativistic' in report
    assert '| class accuracy | **' in report and '](samples.png)' in report


def test_what_is_loaded_is_the_average_that_was_trained(trained):
    workdir, experiment = trained
    state, step = restore(experiment, workdir)
    run = diffjax.load(workdir)
    assert run.step == step == 4
    jax.tree.map(np.testing.assert_array_equal, run.params, state.ema['ema'])
    raw = diffjax.load(workdir, overrides={'sampler': {'params': 'raw'}})
    jax.tree.map(np.testing.assert_array_equal, raw.params, state.params)
    assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(raw.params)))


def test_a_sample_depends_on_seed_place_and_label_alone(loaded):
    """Not on how many are drawn with it, in which batches, nor on how many devices."""
    labels = np.arange(30) % 10
    whole = loaded.draw(loaded.params, labels, seed=7)
    assert whole.shape == (30, 8, 8, 1) and whole.dtype == np.float32 and np.abs(whole).max() <= 1
    np.testing.assert_array_equal(loaded.draw(loaded.params, labels, seed=7), whole)
    assert np.abs(loaded.draw(loaded.params, labels, seed=8) - whole).max() > 0.1
    alone = drawing(one_device(replace(loaded.experiment, sampler=replace(loaded.experiment.sampler, batch_size=7))))
    params = jax.tree.map(np.asarray, loaded.params)
    np.testing.assert_allclose(alone(params, labels, seed=7), whole, atol=1e-5)
    changed = labels.copy()
    changed[4] = 9
    other = loaded.draw(loaded.params, changed, seed=7)
    np.testing.assert_allclose(np.delete(other, 4, 0), np.delete(whole, 4, 0), atol=1e-6)
    assert np.abs(other[4] - whole[4]).max() > 1e-2
    assert len(np.unique(whole.round(3), axis=0)) == 30


def test_labels_are_classes(loaded):
    images = loaded.sample([0, 9, 3])
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 1) and images.std() > 5
    for wrong in ([10], [-1], [0.5], []):  # there is no null label
        with pytest.raises(ValueError, match='labels are whole numbers from 0 to 9; got'):
            loaded.sample(wrong)


@pytest.mark.parametrize('name', NAMES)
def test_the_command_trains_samples_and_evaluates(command, tmp_path, name):
    workdir = f'--workdir={tmp_path}/run'
    code, out, err = command(f'--config=configs/{name}.py:smoke', workdir)
    assert code == 0 and 'class accuracy' in out and f'report: {tmp_path}/run/report.md' in out, err
    code, out, _ = command('--mode=sample', workdir, '--labels=7,3', '--num_samples=5', '--seed=3')
    assert code == 0 and '5 samples at step 4' in out
    stored = np.load(tmp_path / 'run' / 'samples' / 'samples-seed3.npz')
    np.testing.assert_array_equal(stored['arr_0'], diffjax.load(tmp_path / 'run').sample([7, 3, 7, 3, 7], seed=3))
    code, _, _ = command('--mode=sample', workdir, '--config.sampler.params=raw')
    assert code == 0 and (tmp_path / 'run' / 'samples' / 'samples-params=raw-seed0.png').exists()
    code, out, _ = command('--mode=evaluate', workdir, '--num_samples=12', '--seed=4')
    figures = json.loads((tmp_path / 'run' / 'figures.json').read_text())
    assert code == 0 and (figures['num_samples'], figures['seed'], figures['step']) == (12, 4, 4)
    code, _, err = command('--mode=sample', workdir, '--labels=10')
    assert code == 2 and 'labels are whole numbers from 0 to 9; got [10]' in err
    code, _, err = command('--mode=ema', workdir, '--sigma_rel=0.1')
    assert code == 2 and 'for networks that denoise' in err


def test_killed_while_it_draws_it_goes_on(trained, loaded, dying, caplog, tmp_path):
    """To the same bytes, and to the same figures but for the time."""
    experiment = replace(
        trained[1],
        sampler=replace(trained[1].sampler, batch_size=7),
        evaluation=replace(trained[1].evaluation, num_samples=20),
    )
    params, folders = jax.tree.map(np.asarray, loaded.params), [tmp_path / 'whole', tmp_path / 'killed']
    with dying():
        measure(experiment, params, folders[1], 4)
    assert len(list((folders[1] / 'samples.parts').iterdir())) == 1 and not caplog.records
    figures = []
    for folder in folders:
        folder.mkdir(exist_ok=True)
        figures.append(measure(experiment, params, folder, 4))
    assert [record.message.partition(',')[0] for record in caplog.records] == [
        'going on after 7 samples that were drawn before'
    ]
    assert figures[0].pop('seconds_per_sample') > 0 and figures[1].pop('seconds_per_sample') > 0
    assert figures[0] == figures[1]
    assert (folders[0] / 'samples.npz').read_bytes() == (folders[1] / 'samples.npz').read_bytes()
    assert not (folders[1] / 'samples.parts').exists()


def test_each_side_has_its_optimizer(get_config, changed, tmp_path):
    """A discriminator whose steps are nothing stays where it is, while the generator moves; and the other way round."""
    smoke = get_config('digits_gan', 'smoke').to_dict()
    nothing = {'name': 'sgd', 'learning_rate': 0.0}
    for key, still in (('task.discriminator_optimizer', 'discriminator'), ('optimizer', 'generator')):
        config = changed(smoke, key, nothing)
        if still == 'generator':
            config = changed(config, 'task.discriminator_optimizer', smoke['optimizer'])
        experiment = one_device(build_baseline(config))
        first = experiment.trainer().init(experiment.batch_spec)[0]().params
        batches = make_iterator(experiment.source, batch_size=16, seed=0)
        params = train(experiment.trainer(), batches, tmp_path / still, announce=lambda text: None).state.params
        for part in params:
            pairs = zip(jax.tree.leaves(first[part]), jax.tree.leaves(params[part]))
            moved = max(float(abs(a - b).max()) for a, b in pairs)
            assert (moved == 0) == (part == still)


def test_without_a_checkpoint_there_is_one_line(get_config, tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no checkpoint yet'):
        load_baseline(get_config('digits_vae', 'smoke').to_dict(), tmp_path)


@pytest.mark.parametrize(
    ('name', 'key', 'value', 'fragments'),
    [
        ('vae', 'task.name', 'variation', ['task.name is one of', "variational, adversarial; got 'variation'"]),
        ('vae', 'task.betta', 1.0, ["task 'variational': unknown key 'betta'", 'did you mean beta?']),
        ('vae', 'task.likelihood', 'laplace', ["one of 'gaussian', 'bernoulli'; got 'laplace'"]),
        ('vae', 'task.encoder', 'DiT', ["task.encoder: unknown name 'DiT'", 'PictureEncoder']),
        ('vae', 'task.encoder', 'PictureGenerator', ["task.encoder is a PictureEncoder, got 'PictureGenerator'"]),
        ('vae', 'task.encoder.hidden_size', 0, ['hidden_size is at least 1, got 0']),
        ('vae', 'network.name', 'MLP', ["network: unknown name 'MLP'", 'PictureGenerator']),
        ('vae', 'network', 'PictureEncoder:out_features=3', ['network is a PictureGenerator, got']),
        ('vae', 'network.depth', -1, ['depth is at least 0, got -1']),
        ('vae', 'training.init_from', 'weights/x', ['training.init_from', "got 'weights/x' and 0"]),
        ('vae', 'evaluation.num_likelihoods', 9, ['evaluation.num_likelihoods', "got '' and 9"]),
        ('vae', 'evaluation.features', 'inception', ['Inception needs its weights']),
        ('vae', 'sampler.solver', 'ddim', ["sampler: unknown key 'solver'", 'valid: params, batch_size']),
        ('vae', 'sampler.batch_size', 0, ['sampler.batch_size must be at least 1, got 0']),
        ('vae', 'sampler.params', 'emma', ["'raw' or one of ema; got 'emma'"]),
        ('vae', 'schedule', 'flow', ["unknown key 'schedule'"]),
        ('vae', 'mesh', None, ['lacks mesh']),
        ('gan', 'task.game', 'wgan', ["'relativistic'; got 'wgan'"]),
        ('gan', 'task.r1_weight', -1.0, ['r1_weight must be at least 0']),
        ('gan', 'task.discriminator_optimizer', 'adm', ["task.discriminator_optimizer: unknown name 'adm'"]),
        ('gan', 'task.encoder', 'PictureEncoder', ["unknown key 'encoder'"]),
    ],
)
def test_mistakes_are_told_in_one_line(get_config, changed, name, key, value, fragments):
    config = changed(get_config(f'digits_{name}', 'smoke').to_dict(), key, value)
    with pytest.raises(ValueError) as caught:
        kind_of(config).build(config)
    assert '\n' not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_diffusion_config_does_not_take_a_task(config):
    with pytest.raises(ValueError, match="unknown key 'task'"):
        build(config | {'task': {'name': 'variational'}})
