"""Every config: plain data that builds, trains and samples; and the published recipes in full size."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax.build import build
from diffjax.data import DatasetNotPrepared, make_iterator, prepare_dataset
from diffjax.loading import load
from diffjax.nets import count_parameters
from diffjax.restoring import sampling_params
from diffjax.results import measure
from diffjax.run import balanced_labels, make_sampler, to_output
from diffjax.training.averages import Power
from diffjax.training.loop import train
from diffjax.workdir import check_same_run, write_config

pytestmark = pytest.mark.usefixtures('fast_compilation')

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / 'configs').glob('*.py'))
OTHERS = {  # of another kind
    'autoencoder_kl': 'test_first_stage.py',
    'autoencoder_shapes': 'test_first_stage.py',
    'digits_gan': 'test_baselines.py',
    'digits_vae': 'test_baselines.py',
    'ldm_digits': 'test_stages.py',
    'ldm_shapes': 'test_stages.py',
    'recognizer_clips': 'test_recognition.py',
    'recognizer_shapes': 'test_recognition.py',
    'video_digits': 'test_video.py',
    'video_shapes': 'test_video.py',
}
NAMES = [name for name in NAMES if name not in OTHERS]
SMOKES = [(name, 'smoke') for name in NAMES] + [('dit_b', 'recipe=sit,smoke')]
SMOKES += [('digits_networks', f'network={name},smoke') for name in ('flux', 'lightning', 'mmdit', 'unet', 'uvit')]
FULL = [(name, '') for name in NAMES] + [('dit_b', 'model=S/8,recipe=sit'), ('dit_b', 'model=XL/4,smoke')]
FULL += [('dit_b', 'model=XL/2,recipe=lightning')]
FULL += [('edm2', 'model=XS'), ('edm2', 'digits')]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Programs for one device compile faster; that several devices do the same is asked elsewhere."""

    def mesh(data=-1, fsdp=1, tensor=1):
        assert (data, fsdp, tensor) == (-1, 1, 1)
        return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))

    monkeypatch.setattr('diffjax.build.make_mesh', mesh)


@pytest.fixture(scope='module')
def latents_dir(tmp_path_factory):
    """Sixteen invented latents as the dataset that `dit_b` wants."""
    folder, rng = tmp_path_factory.mktemp('latents'), np.random.default_rng(0)
    (folder / 'shards' / 'train').mkdir(parents=True)
    shape = (16, 32, 32, 4)
    arrays = {'mean': rng.standard_normal(shape), 'std': rng.uniform(0.1, 1, shape)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez(folder / 'shards' / 'train' / '0.npz', **arrays, label=rng.integers(0, 1000, 16))
    prepare_dataset('imagenet256_latents', data_dir=folder / 'tfds', manual_dir=folder / 'shards')
    return folder / 'tfds'


@pytest.mark.parametrize('name, argument', SMOKES + FULL)
def test_a_config_is_plain_data(get_config, name, argument):
    """What is written to config.json and read back is the same run."""
    config = get_config(name, argument).to_dict()
    text = json.dumps(config)

    def lists(value):
        if isinstance(value, dict):
            return {key: lists(entry) for key, entry in value.items()}
        return [lists(entry) for entry in value] if isinstance(value, tuple | list) else value

    assert json.loads(text) == lists(config)
    assert get_config(name, argument).to_dict() == config


@pytest.mark.parametrize('name', NAMES)
def test_a_wrong_argument_is_refused(get_config, name):
    for wrong in ('smok', 'smoke=1', 'model=B/3', 'recipe=ddpm'):
        with pytest.raises(ValueError, match=f'configs/{name}.py takes .*smoke.*got {wrong!r}'):
            get_config(name, wrong)


@pytest.mark.parametrize('name, argument', SMOKES)
def test_smoke_trains_and_samples(get_config, tmp_path, name, argument):
    """Two steps on the embedded digits, and from what they left two batches of samples."""
    config = get_config(name, argument).to_dict()
    assert config['dataset']['name'] == 'digits'
    config['training']['num_steps'], config['sampler']['batch_size'] = 2, 8
    experiment = build(config)
    batches = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=config['seed'])
    write_config(tmp_path, config)
    result = train(experiment.trainer(), batches, tmp_path, announce=lambda text: None)
    assert result.step == 2
    labels = balanced_labels(11, experiment.task.num_classes)
    x = make_sampler(experiment)(
        sampling_params(experiment, result.state), experiment.plan(), labels, guidance=experiment.guidance()
    )
    images = to_output(experiment, x)
    assert images.shape == (11, 8, 8, 1) and images.dtype == np.uint8 and np.isfinite(x).all()
    assert images.std() > 10  # noise, hardly touched yet: neither blank nor torn to the ends
    check_same_run(tmp_path, config)
    run = load(tmp_path)  # also where JSON has made lists of tuples
    jax.tree.map(np.testing.assert_array_equal, run.params, sampling_params(experiment, result.state))


@pytest.mark.parametrize('name, argument', FULL)
def test_full_size_builds_where_its_dataset_is(get_config, latents_dir, name, argument):
    config = get_config(name, argument).to_dict()
    try:
        build(config)
    except DatasetNotPrepared as error:
        assert config['dataset']['name'] != 'digits'
        assert 'python -m diffjax.data prepare' in str(error) and '\n' not in str(error)
    if config['dataset']['name'] == 'imagenet256_latents':
        config['dataset']['data_dir'] = str(latents_dir)
        assert build(config).sample_shape == (32, 32, 4)


@pytest.mark.parametrize('model, millions', [('S/2', 33.0), ('B/2', 130.5), ('L/2', 458.1), ('XL/2', 675.1)])
def test_dit_has_the_published_number_of_parameters(get_config, latents_dir, model, millions):
    """Peebles & Xie 2023, Table 4 and its code: eps and sigma, 1000 classes and the null label."""
    config = get_config('dit_b', f'model={model}').to_dict()
    config['dataset']['data_dir'] = str(latents_dir)
    experiment = build(config)
    _, shapes, _ = experiment.trainer().init(experiment.batch_spec)
    assert round(count_parameters(shapes.params) / 1e6, 1) == millions
    assert count_parameters(shapes.ema) == count_parameters(shapes.params)


def test_dit_recipe(get_config):
    """Peebles & Xie 2023, section 4, and the hyperparameters of ADM that it keeps."""
    config = get_config('dit_b').to_dict()
    assert (config['network']['depth'], config['network']['hidden_size']) == (12, 768)
    assert (config['network']['num_heads'], config['network']['patch_size']) == (12, 2)
    optimizer = config['optimizer']
    assert (optimizer['name'], optimizer['learning_rate'], optimizer['decay']) == ('adamw', 1e-4, 'constant')
    assert optimizer['weight_decay'] == 0.0 and 'warmup_steps' not in optimizer and 'clip_norm' not in optimizer
    assert config['training']['batch_size'] == 256 and config['training']['num_steps'] == 400_000
    assert config['training']['ema'] == {'ema': 0.9999}
    assert config['label_drop'] == 0.1 and config['learned_variance'] is True
    assert (config['schedule'], config['target'], config['times']) == ('linear', 'eps', 'discrete')
    assert config['dataset']['flip'] is False  # of latents: flips belong into the dataset
    assert config['dataset']['latent_scale'] == 0.18215
    assert config['sampler']['solver'] == 'ddpm:variance=learned' and config['sampler']['num_steps'] == 250

    experiment = build(get_config('dit_b', 'smoke').to_dict())
    betas = np.linspace(1e-4, 0.02, 1000)  # Ho et al. 2020
    objective = experiment.task.objective
    alpha = objective.schedule.alpha(np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - betas), rtol=1e-6)
    assert objective.times.num_timesteps == 1000 and objective.bound_scale == 0.001
    sit = get_config('dit_b', 'recipe=sit').to_dict()
    assert (sit['schedule'], sit['target'], sit['times']) == ('flow', 'velocity', 'uniform')
    assert sit['learned_variance'] is False and sit['optimizer'] == optimizer and sit['training'] == config['training']


def test_lightning_recipe(get_config):
    """Yao et al. 2025, section 4 and table 2: what it changes in DiT, on the way to 675 M parameters."""
    config = get_config('dit_b', 'model=XL/2,recipe=lightning').to_dict()
    sit = get_config('dit_b', 'model=XL/2,recipe=sit').to_dict()
    assert (config['schedule'], config['target'], config['times']) == ('flow', 'velocity', 'logit_normal')
    assert (config['optimizer']['learning_rate'], config['optimizer']['b2']) == (2e-4, 0.95)
    assert (config['training']['batch_size'], config['training']['num_steps']) == (1024, 80_000)
    network = config['network']
    assert (network['norm'], network['mlp'], network['positions']) == ('rms', 'swiglu', 'both')
    assert {key: value for key, value in network.items() if key in sit['network']} == sit['network']


def test_ddpm_recipe(get_config):
    """Ho et al. 2020, appendix B: 35.7 M parameters there, a bit more with labels."""
    config = get_config('cifar10_unet').to_dict()
    assert config['optimizer']['learning_rate'] == 2e-4 and config['optimizer']['name'] == 'adam'
    assert config['training']['batch_size'] == 128 and config['training']['num_steps'] == 800_000
    assert config['training']['ema'] == {'ema': 0.9999} and config['network']['dropout'] == 0.1
    assert config['dataset']['flip'] is True and config['sampler']['num_steps'] == 1000
    assert config['schedule'] == 'linear' and config['target'] == 'eps' and config['optimizer']['clip_norm'] == 1.0


def test_edm2_recipe(get_config):
    """Karras et al. 2024, table 6: sizes, learning rates, dropout and lengths in images; noise, decay and averages."""
    published = {'XS': (128, 0.012, 0.0, 2147.5), 'S': (192, 0.01, 0.0, 2147.5), 'M': (256, 0.009, 0.1, 2147.5)}
    published |= {'L': (320, 0.008, 0.1, 1879.0), 'XL': (384, 0.007, 0.1, 1342.2), 'XXL': (448, 0.0065, 0.1, 939.5)}
    for name, (channels, rate, dropout, million_images) in published.items():
        config = get_config('edm2', f'model={name}').to_dict()
        network, optimizer, training = (config[key] for key in ('network', 'optimizer', 'training'))
        assert (network['base_channels'], network['dropout']) == (channels, dropout)
        assert (optimizer['learning_rate'], optimizer['b2'], optimizer['reference_steps']) == (rate, 0.99, 70_000)
        assert training['batch_size'] == 2048
        np.testing.assert_allclose(training['num_steps'] * 2048 / 1e6, million_images, atol=0.1)
        np.testing.assert_allclose(optimizer['warmup_steps'] * 2048, 1e7, rtol=1e-3)
    assert training['ema'] == {'narrow': 'power:sigma_rel=0.05', 'wide': 'power:sigma_rel=0.10'}
    experiment = build(get_config('edm2', 'smoke').to_dict())
    assert experiment.training.ema == {'narrow': Power(sigma_rel=0.05), 'wide': Power(sigma_rel=0.1)}
    objective = experiment.task.objective
    assert (objective.times.mean, objective.times.std) == (-0.4, 1.0)
    plan = experiment.plan()
    assert plan.num_evaluations == 2 * experiment.sampler.num_steps - 1  # the last step is Euler's
    np.testing.assert_allclose(objective.schedule.sigma(plan.t[[0, -1]]), [80, 0.002], rtol=1e-6)


def test_latents_from_end_to_end(get_config, latents_dir, tmp_path):
    """The published recipe on invented latents, its network shrunk, and nothing held out."""
    config = get_config('dit_b').to_dict()
    config['dataset']['data_dir'] = str(latents_dir)
    config['network'] |= {'hidden_size': 32, 'depth': 2, 'num_heads': 2, 'patch_size': 8}
    config['training'] |= {'num_steps': 2, 'batch_size': 24}  # more than there are
    config['sampler'] |= {'num_steps': 3, 'batch_size': 8}
    config['evaluation']['num_samples'] = 8
    experiment = build(config)
    batches = make_iterator(experiment.source, batch_size=24, seed=0)
    result = train(experiment.trainer(), batches, tmp_path, announce=lambda text: None)
    write_config(tmp_path, config)
    measure(experiment, sampling_params(experiment, result.state), tmp_path, 2, seed=0, progress=False)
    stored = np.load(tmp_path / 'samples.npz')
    assert stored['latents'].shape == (8, 32, 32, 4) and stored['latents'].dtype == np.float32
    assert np.isfinite(stored['latents']).all()
    latents = load(tmp_path).sample([0, 999], num_steps=2)
    assert latents.shape == (2, 32, 32, 4) and np.isfinite(latents).all()
    assert 'samples.png' in (tmp_path / 'report.md').read_text()
