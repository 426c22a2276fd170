"""Diffusion in latents, whole: the first stage trained or found, its latents written or made, samples decoded."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import diffjax
from diffjax import weights
from diffjax.build import build
from diffjax.data import make_iterator, open_source
from diffjax.encoding import encode_dataset
from diffjax.first_stage import build_first_stage
from diffjax.latents import latents_name
from diffjax.restoring import restore_params
from diffjax.results import held_out_loss, measure
from diffjax.run import keep_samples, to_output
from diffjax.settings import ConfigError
from diffjax.stages import find, make_ready, open_latents, open_ready, settings_of
from diffjax.starting import imported_params
from diffjax.training.loop import train
from diffjax.weights.autoencoder import KL
from diffjax.weights.engine import expected_shapes
from diffjax.weights.store import import_source
from diffjax.workdir import check_same_run, write_config

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
JUDGED = {'discriminator': 'patch_discriminator:base_channels=8,depth=1'}


@pytest.fixture
def smoke(get_config):
    return get_config('ldm_digits', 'smoke').to_dict()


def trained(config, experiment, workdir):
    """Trains, and leaves what a finished run leaves."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_config(workdir, config)
    batches = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=0)
    result = train(experiment.trainer(), batches, workdir, announce=lambda text: None)
    (workdir / 'figures.json').write_text(json.dumps({'step': result.step}))
    return not result.stopped


@pytest.fixture(scope='module')
def first_stage(get_config, tmp_path_factory):
    """A workdir with a first stage that has been trained for four steps, and the digits' latents."""
    workdir = tmp_path_factory.mktemp('ldm')
    config = get_config('ldm_digits', 'smoke').to_dict()
    make_ready(config, workdir, trained, lambda text: None, progress=False)
    return workdir


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A folder as diffusers writes it, of an autoencoder of random weights, and the same imported."""
    folder = tmp_path_factory.mktemp('published')
    levels = {'block_out_channels': [8, 16], 'down_block_types': ['DownEncoderBlock2D'] * 2}
    config = {'_class_name': 'AutoencoderKL', 'in_channels': 1, 'out_channels': 1, 'norm_num_groups': 4, **levels}
    config |= {'up_block_types': ['UpDecoderBlock2D'] * 2, 'latent_channels': 2, 'layers_per_block': 1}
    config |= {'scaling_factor': 0.3611, 'shift_factor': 0.1159}  # Flux's
    options, rng = KL.to_options(config), np.random.default_rng(0)
    shapes = expected_shapes(KL, options)
    tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    (folder / 'theirs').mkdir()
    (folder / 'theirs' / 'config.json').write_text(json.dumps(config))
    save_file(tensors, folder / 'theirs' / 'diffusion_pytorch_model.safetensors')
    import_source(folder / 'theirs', folder / 'ours')
    return folder / 'ours'


def test_latents_of_a_published_autoencoder(smoke, published, tmp_path):
    """Its own constants standardise; what is learned in is on disk in the workdir, and decodes."""
    config = smoke | {'first_stage': {'workdir': str(published)}}
    assert make_ready(config, tmp_path, trained, lambda text: None, progress=False)
    assert (tmp_path / 'latents' / 'digits_latents' / '1.0.0').is_dir()
    latents = open_latents(config, tmp_path)
    experiment = build(config, latents=latents)
    assert latents.ready and experiment.sample_shape == (4, 4, 2)
    np.testing.assert_allclose([latents.shift, latents.scale], [0.1159, 0.3611])
    batch = experiment.source.read(range(4))
    batch['std'] = np.zeros_like(batch['std'])
    x0 = experiment.trainer().prepare(batch, jax.random.key(0))['x0']
    np.testing.assert_allclose(x0, (batch['mean'].astype(np.float32) - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    assert latents.decode(np.asarray(x0)).shape == (4, 8, 8, 1)


def test_training_starts_from_a_published_autoencoder_and_encodes_with_it(smoke, published, tmp_path):
    config = smoke['first_stage']['config']
    fields = {'base_channels': 8, 'num_groups': 4, 'pointwise': True, 'latent_scale': 0.3611, 'latent_shift': 0.1159}
    config = config | {'network': config['network'] | fields, 'task': config['task'] | JUDGED}
    config['training'] = config['training'] | {'init_from': str(published)}
    experiment = build_first_stage(config)
    params = imported_params(config, experiment, tmp_path)
    there = weights.load(published)
    jax.tree.map(np.testing.assert_array_equal, params['autoencoder'], there.params)
    assert set(params) == {'autoencoder', 'discriminator'}
    batches = make_iterator(experiment.source, batch_size=16, seed=0)
    assert train(experiment.trainer(), batches, tmp_path, params=params, announce=lambda text: None).step == 4
    wrong = config | {'network': config['network'] | {'base_channels': 16}}
    with pytest.raises(ConfigError, match=r'training\.init_from: .*base_channels'):
        imported_params(wrong, build_first_stage(wrong), tmp_path / 'other')


@pytest.mark.parametrize('name', ['ldm_digits', 'ldm_shapes'])
def test_configs_are_plain_data(get_config, name):
    for argument in ('', 'smoke'):
        config = get_config(name, argument).to_dict()
        assert json.loads(json.dumps(config)) == json.loads(json.dumps(get_config(name, argument).to_dict()))
    with pytest.raises(ValueError, match=f"configs/{name}.py takes the argument smoke, got 'smok'"):
        get_config(name, 'smok')


def test_the_shapes_run_small(get_config, tmp_path):
    config = get_config('ldm_shapes', 'smoke').to_dict()
    assert make_ready(config, tmp_path, trained, lambda text: None, progress=False)
    experiment = build(config, latents=open_latents(config, tmp_path))
    assert trained(config, experiment, tmp_path)
    assert diffjax.load(tmp_path).sample([0]).shape == (1, 8, 8, 1)


def test_before_the_first_stage_is_there_everything_is_checked(smoke, tmp_path):
    latents = open_latents(smoke, tmp_path)
    experiment = build(smoke, latents=latents)
    assert not latents.ready and experiment.sample_shape == (4, 4, 2) and experiment.image_shape == (8, 8, 1)
    wrong = smoke | {'first_stage': smoke['first_stage'] | {'encode': 'twice'}}
    with pytest.raises(ConfigError, match="encode is 'once' or 'each_step', got 'twice'"):
        open_latents(wrong, tmp_path)
    wrong['first_stage'] = {'workdir': '', 'tile': 8}
    with pytest.raises(ConfigError, match='has settings and no first stage'):
        open_latents(wrong, tmp_path)
    for none in ({}, {'workdir': ''}):
        assert open_latents(smoke | {'first_stage': none}, tmp_path) is None
    wrong['first_stage'] = smoke['first_stage'] | {'config': None, 'workdir': str(tmp_path)}
    with pytest.raises(ConfigError, match='holds neither a run nor imported weights'):
        open_latents(wrong, tmp_path)
    wrong['first_stage'] = smoke['first_stage'] | {'tile': 4, 'overlap': 4}
    with pytest.raises(ConfigError, match='below tile'):
        open_latents(wrong, tmp_path)


def test_latents_are_those_of_the_autoencoder_standardised(smoke, first_stage):
    """Against the posterior of each image, computed alone."""
    latents = open_latents(smoke, first_stage)
    experiment = build(smoke, latents=latents)
    assert latents.ready and experiment.source.name == 'digits_latents' and experiment.images.name == 'digits'
    found = find(settings_of(smoke), first_stage)
    images = experiment.images.read([3, 700, 1000])['image']
    code = found.network.apply({'params': found.params}, images / np.float32(127.5) - 1, method='encode')
    there = experiment.source.read([3, 700, 1000])
    np.testing.assert_allclose(there['mean'], code.mean, atol=2e-3)
    np.testing.assert_allclose(there['std'], code.std, atol=2e-3)
    batch = experiment.source.read(range(len(experiment.source)))
    x0 = experiment.trainer().prepare(batch, jax.random.key(0))['x0']
    np.testing.assert_allclose(np.mean(x0, (0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(np.std(x0, (0, 1, 2)), 1, atol=0.02)


def test_samples_are_decoded_whole_sliced_or_in_tiles(smoke, first_stage):
    latents = open_latents(smoke, first_stage)
    x0 = np.asarray(jax.random.normal(jax.random.key(0), (5, 4, 4, 2)))
    z = x0 / latents.scale + latents.shift
    expected = np.asarray(latents.network.apply({'params': latents.params}, z, method='decode'))
    expected = np.clip(np.round((expected + 1) * 127.5), 0, 255).astype(np.uint8)
    np.testing.assert_allclose(latents.decode(x0).astype(int), expected, atol=1)
    sliced = open_latents(smoke | {'first_stage': smoke['first_stage'] | {'batch_size': 2}}, first_stage)
    np.testing.assert_allclose(sliced.decode(x0).astype(int), expected, atol=1)
    tiled = open_latents(smoke | {'first_stage': smoke['first_stage'] | {'tile': 3, 'overlap': 2}}, first_stage)
    assert tiled.decode(x0).shape == (5, 8, 8, 1)
    assert np.abs(tiled.decode(x0).astype(int) - expected).max() > 1  # it was cut


@pytest.mark.parametrize('encode', ['once', 'each_step'])
def test_it_trains_samples_measures_and_loads(smoke, first_stage, tmp_path, encode):
    config = smoke | {
        'first_stage': {'workdir': str(first_stage / 'first_stage'), 'encode': encode, 'batch_size': 16},
    }
    assert make_ready(config, tmp_path, trained, lambda text: None, progress=False)
    experiment = build(config, latents=open_latents(config, tmp_path))
    assert experiment.source.kind == {'once': 'latent', 'each_step': 'image'}[encode]
    assert trained(config, experiment, tmp_path)
    params, step = restore_params(experiment, tmp_path)
    figures = measure(experiment, params, tmp_path, step, seed=0, progress=False)
    assert {'frechet_distance', 'precision', 'class_accuracy'} <= set(figures)
    assert len(held_out_loss(experiment, params)) == 10
    images = diffjax.load(tmp_path).sample([0, 1, 2])
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(np.load(tmp_path / 'samples.npz')['arr_0'][:3], images)


def test_encoding_each_step_learns_from_the_same_latents(smoke, first_stage, tmp_path):
    """Latents made for a batch have the moments of those on disk, and are those of the autoencoder."""
    config = smoke | {'first_stage': {'workdir': str(first_stage / 'first_stage'), 'encode': 'each_step'}}
    make_ready(config, tmp_path, trained, lambda text: None, progress=False)
    experiment = build(config, latents=open_latents(config, tmp_path))
    trainer, batch = experiment.trainer(), experiment.source.read(range(512))
    made = trainer.encode(trainer.frozen, trainer.prepare(batch, jax.random.key(0)), jax.random.key(1))['x0']
    np.testing.assert_allclose(np.mean(made, (0, 1, 2)), 0, atol=0.1)
    np.testing.assert_allclose(np.std(made, (0, 1, 2)), 1, atol=0.1)
    again = trainer.encode(trainer.frozen, trainer.prepare(batch, jax.random.key(0)), jax.random.key(2))['x0']
    assert np.abs(made - again).max() > 1e-4  # each time another draw
    few = {'x0': trainer.prepare(batch, jax.random.key(0))['x0'][:4]}
    alone = trainer.encode(trainer.frozen, few, jax.random.key(1))['x0']
    np.testing.assert_allclose(made[:4], alone, atol=1e-5)  # an example's draw does not depend on the others


def test_a_dataset_of_latents_alone(smoke, first_stage, tmp_path, get_config):
    """What --mode=encode has written is learned without its images; with a first stage samples are decoded."""
    first = build_first_stage(smoke['first_stage']['config'])
    params, _ = restore_params(first, first_stage / 'first_stage')
    encode_dataset(first.task.network, params['autoencoder'], first.dataset, first.encoding, tmp_path)
    dataset = smoke['dataset'] | {'name': 'digits_latents', 'data_dir': str(tmp_path / 'latents'), 'latent_scale': 0}
    alone = {key: value for key, value in smoke.items() if key != 'first_stage'} | {'dataset': dataset}
    alone['evaluation'] = alone['evaluation'] | {'classifier': 'none'}
    experiment = build(alone)
    assert experiment.sample_shape == (4, 4, 2) and experiment.image_shape is None
    x0 = experiment.trainer().prepare(experiment.source.read(range(1437)), jax.random.key(0))['x0']
    np.testing.assert_allclose(np.std(x0, (0, 1, 2)), 1, atol=0.02)
    decoded = alone | {'first_stage': {'workdir': str(first_stage / 'first_stage')}}
    experiment = build(decoded, latents=open_latents(decoded, tmp_path))
    assert experiment.image_shape == (8, 8, 1) and experiment.images is None
    np.testing.assert_allclose(experiment.standardisation[1], 1 / np.float32(experiment.source.moments['std']))
    published = open_source('digits', 'train')
    assert published.moments == {}


def test_the_command_runs_all_of_it_and_again_does_nothing(tmp_path):
    command = [sys.executable, '-m', 'diffjax.main', '--config=configs/ldm_digits.py:smoke', f'--workdir={tmp_path}']
    first, second = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert 'the first stage, in' in first.stdout and 'encoding digits into' in first.stdout
    assert 'is finished (4 steps)' in second.stdout and 'compiled' not in second.stdout
    encode = [sys.executable, '-m', 'diffjax.main', '--mode=encode', f'--workdir={tmp_path}/first_stage']
    again = subprocess.run(encode, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and '--config.dataset.name=digits_latents' in again.stdout, again.stderr
    refused = subprocess.run([*encode[:-1], f'--workdir={tmp_path}'], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and '--mode=encode is for autoencoders' in refused.stderr
    assert (tmp_path / 'samples.png').stat().st_size > 500


def test_codes_are_written_with_their_tokens(get_config, tmp_path):
    experiment = build_first_stage(get_config('autoencoder_shapes', 'bottleneck=vq,smoke').to_dict())
    x = np.zeros((1, *experiment.source.image_shape), np.float32)
    params = experiment.task.network.init(jax.random.key(0), x)['params']
    encode_dataset(experiment.task.network, params, experiment.dataset, experiment.encoding, tmp_path)
    latents = open_source('digits_latents', 'test', data_dir=tmp_path / 'latents', annotations=('tokens',))
    there, images = latents.read(range(5)), experiment.test.read(range(5))['image']
    code = experiment.task.network.apply({'params': params}, images / np.float32(127.5) - 1, method='encode')
    np.testing.assert_array_equal(there['tokens'], code.tokens)
    np.testing.assert_allclose(there['mean'], code.codes, atol=1e-3)
    assert not there['std'].any()


def test_an_unfinished_first_stage_is_not_touched(smoke, tmp_path):
    folder, config = tmp_path / 'ae', smoke['first_stage']['config']
    trained(config, build_first_stage(config), folder)
    (folder / 'figures.json').write_text(json.dumps({'step': 2}))  # measured half-way
    before = (folder / 'config.json').read_text()
    used = smoke | {'first_stage': smoke['first_stage'] | {'workdir': str(folder)}}
    for call in (open_latents, lambda c, w: make_ready(c, w, trained, print, progress=False)):
        with pytest.raises(ConfigError, match='is not finished: train it first'):
            call(used, tmp_path)
    assert (folder / 'config.json').read_text() == before


@pytest.fixture
def learned(smoke, first_stage, tmp_path):
    """(config, workdir) of a run that has learned in a copy of the latents."""
    shutil.copytree(first_stage, tmp_path, dirs_exist_ok=True)
    experiment = build(smoke, latents=open_latents(smoke, tmp_path))
    trained(smoke, experiment, tmp_path)
    return smoke, tmp_path


def test_samples_need_the_moments_and_not_the_latents(learned):
    config, workdir = learned
    images = diffjax.load(workdir).sample([0, 1])
    shutil.rmtree(workdir / 'first_stage' / 'latents')
    np.testing.assert_array_equal(diffjax.load(workdir).sample([0, 1]), images)
    with pytest.raises(ConfigError, match='its latents are not there'):
        open_ready(config, workdir, for_sampling=False)
    (workdir / 'latent_moments.json').unlink()
    with pytest.raises(ConfigError, match=r'it, or .*latent_moments\.json, is not there'):
        diffjax.load(workdir)


def test_killed_while_it_draws_it_goes_on(learned, command, dying, caplog, tmp_path):
    """What is kept are decoded images, tied to what decodes them; and latents where nothing does."""
    _, workdir = learned
    words = ['--mode=sample', f'--workdir={workdir}', '--num_samples=12', '--config.sampler.batch_size=8']
    with dying():
        command(*words, f'--out={tmp_path}/x')
    assert command(*words, f'--out={tmp_path}/x')[0] == 0 and 'going on after 8 samples' in caplog.text
    assert command(*words, f'--out={tmp_path}/y')[0] == 0
    assert (tmp_path / 'x.npz').read_bytes() == (tmp_path / 'y.npz').read_bytes()

    run = diffjax.load(workdir, overrides={'sampler': {'batch_size': 8}})
    made, labels = run.sampler(run.params, run.experiment.plan(), [1] * 8), np.ones(12, np.int32)
    whole = run.experiment.latents
    moved = jax.tree.map(lambda a: a * np.float32(1.001), whole.params)
    others = [None, replace(whole, params=moved), replace(whole, scale=whole.scale * 2), whole]
    for i, latents in enumerate(others):
        experiment = replace(run.experiment, latents=latents)
        kept = keep_samples(experiment, run.params, labels, 0, tmp_path / 'z')
        assert kept.num_samples == 0
        kept.keep(0, to_output(experiment, made))
        assert keep_samples(experiment, run.params, labels, 0, tmp_path / 'z').num_samples == 8, i


def test_latents_of_another_state_of_the_autoencoder_are_told(learned):
    config, workdir = learned
    raw = config | {'first_stage': config['first_stage'] | {'workdir': str(workdir / 'first_stage')}}
    stored = json.loads((workdir / 'first_stage' / 'config.json').read_text())
    stored['evaluation']['params'] = 'raw'  # another average of the same run
    write_config(workdir / 'first_stage', stored)
    with pytest.raises(ConfigError, match='learned in latents of another autoencoder'):
        open_latents(raw, workdir)
    with pytest.raises(ConfigError, match='holds latents of another autoencoder .* remove them'):
        open_latents(raw, workdir / 'other')


def test_what_only_sampling_uses_may_change(learned):
    config, workdir = learned
    free = {'workdir': 'elsewhere', 'tile': 3, 'overlap': 1, 'batch_size': 7}
    check_same_run(workdir, config | {'first_stage': config['first_stage'] | free})
    other = copy.deepcopy(config)
    other['first_stage']['config']['mesh'] = {'data': 2, 'fsdp': 4}
    other['first_stage']['config']['dataset']['data_dir'] = 'elsewhere'
    check_same_run(workdir, other)
    other['first_stage']['config']['network']['base_channels'] = 16
    with pytest.raises(ConfigError, match=r'first_stage\.config\.network\.base_channels is 8 there and 16 here'):
        check_same_run(workdir, other)
    with pytest.raises(ConfigError, match=r"first_stage\.encode is 'once' there"):
        check_same_run(workdir, config | {'first_stage': config['first_stage'] | {'encode': 'each_step'}})
    plain = {key: value for key, value in config.items() if key != 'first_stage'}
    write_config(workdir, plain)
    check_same_run(workdir, plain | {'first_stage': {'workdir': 'a decoder'}})


def test_a_first_stage_is_used_on_any_mesh(learned):
    config, workdir = learned
    stored = json.loads((workdir / 'first_stage' / 'config.json').read_text())
    stored['mesh'], stored['training']['batch_size'] = {'data': 64, 'fsdp': 2}, 17
    write_config(workdir / 'first_stage', stored)
    used = config | {'first_stage': {'workdir': str(workdir / 'first_stage')}}
    assert open_latents(used, workdir).ready


def test_names_of_latents():
    assert latents_name('cifar10:3.0.2') == 'cifar10_latents'
    assert latents_name('imagenet_resized/64x64:1.0.0') == 'imagenet_resized_64x64_latents'


@pytest.mark.parametrize('bottleneck', ['vq', 'fsq'])
def test_samples_of_codes_are_put_on_codes(get_config, bottleneck):
    network = build_first_stage(
        get_config('autoencoder_shapes', f'bottleneck={bottleneck},smoke').to_dict()
    ).task.network
    x = np.asarray(jax.random.uniform(jax.random.key(1), (2, 8, 8, 1), minval=-1))
    variables = network.init(jax.random.key(0), x)
    codes = network.apply(variables, x, method='encode').codes
    drawn = codes + 1e-4 * jax.random.normal(jax.random.key(2), codes.shape)
    np.testing.assert_allclose(network.apply(variables, drawn, method='nearest'), codes, atol=1e-6)
    far = network.apply(variables, 50 * drawn, method='nearest')
    tokens = network.apply(variables, far, method='nearest')
    np.testing.assert_allclose(tokens, far, atol=1e-6)  # codes stay where they are, the outermost too
