"""Autoencoders from a config: what is built, refused, trained, measured and written."""

import io
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax.build import build
from diffjax.data import make_iterator
from diffjax.evaluation.compression import jpeg_psnr, pca_psnr, psnr
from diffjax.first_stage import FirstStage, build_first_stage, measure, reconstructions
from diffjax.nets import Autoencoder
from diffjax.restoring import restore_params
from diffjax.training.loop import train
from diffjax.training.sharding import make_mesh

pytestmark = pytest.mark.usefixtures('fast_compilation')

BOTTLENECKS = ('kl', 'vq', 'fsq')


@pytest.fixture
def smoke(get_config):
    return get_config('autoencoder_shapes', 'smoke').to_dict()


def one_device(experiment):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    return replace(experiment, mesh=mesh)


def iterator_of(experiment):
    return make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=0)


@pytest.mark.parametrize('bottleneck', BOTTLENECKS)
def test_configs_are_plain_data(get_config, bottleneck):
    for arg in (f'bottleneck={bottleneck}', f'bottleneck={bottleneck},smoke'):
        config = get_config('autoencoder_shapes', arg).to_dict()
        assert json.loads(json.dumps(config)) == json.loads(json.dumps(get_config('autoencoder_shapes', arg).to_dict()))
        assert config['network']['bottleneck'] == bottleneck
    for wrong in ('smok', 'smoke=1', 'bottleneck=vae'):
        with pytest.raises(ValueError, match=f'configs/autoencoder_shapes.py takes .*got {wrong!r}'):
            get_config('autoencoder_shapes', wrong)


@pytest.mark.parametrize('factor, channels, positions', [(4, 8, 64), (8, 4, 32), (16, 16, 16)])
def test_the_published_layouts(get_config, factor, channels, positions):
    """Stable Diffusion's parameters (83.7 M at factor 8), and latents of a 256 x 256 image."""
    config = get_config('autoencoder_kl', f'factor={factor},channels={channels}').to_dict()
    fields = {key: value for key, value in config['network'].items() if key != 'name'}
    network, x = Autoencoder(**fields, out_channels=3), np.zeros((1, 256, 256, 3), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    code = jax.eval_shape(lambda p: network.apply(p, x, method='encode'), shapes)
    assert code.mean.shape == (1, positions, positions, channels)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    if factor == 8:
        assert count == 83_653_863  # AutoencoderKL of Stable Diffusion 1.5
    for wrong in ('factor=2', 'channels=3', 'smok'):
        with pytest.raises(ValueError, match=f'configs/autoencoder_kl.py takes .*got {wrong!r}'):
            get_config('autoencoder_kl', wrong)


@pytest.mark.parametrize('factor', [4, 16])
def test_the_published_recipe_runs_small(get_config, tmp_path, factor):
    experiment = one_device(build_first_stage(get_config('autoencoder_kl', f'factor={factor},smoke').to_dict()))
    assert experiment.source.image_shape == (2 * factor, 2 * factor, 1)
    result = train(experiment.trainer(), iterator_of(experiment), tmp_path, announce=lambda text: None)
    figures = measure(experiment, restore_params(experiment, tmp_path)[0], tmp_path, result.step)
    assert result.step == 4 and np.isfinite(figures['psnr'])


@pytest.mark.parametrize('bottleneck', BOTTLENECKS)
def test_smoke_trains_measures_and_reports(get_config, tmp_path, bottleneck):
    config = get_config('autoencoder_shapes', f'bottleneck={bottleneck},smoke').to_dict()
    experiment = one_device(build_first_stage(config))
    result = train(experiment.trainer(), iterator_of(experiment), tmp_path, announce=lambda text: None)
    assert result.step == 4
    params, step = restore_params(experiment, tmp_path)
    figures = measure(experiment, params, tmp_path, step)
    assert json.loads((tmp_path / 'figures.json').read_text())['psnr'] == figures['psnr'] and figures['step'] == 4
    assert (tmp_path / 'reconstructions.png').stat().st_size > 500
    assert 'an autoencoder' in (tmp_path / 'report.md').read_text()

    images = experiment.test.read(range(24))['image']
    found = reconstructions(experiment, params, images, progress=False)
    z = found['latents']
    again = (np.asarray(jax.jit(experiment.task.decode)(params, z)) + 1) * 127.5
    assert np.abs(np.clip(np.round(again), 0, 255) - found['images']).max() <= 1  # a byte either way, of rounding
    if bottleneck == 'kl':
        mean = np.asarray(jax.jit(experiment.task.encode)(params, np.float32(images / 127.5 - 1)[:16]).mean)  # a batch
        ends = mean.min((0, 1, 2)), mean.max((0, 1, 2))
        assert np.abs(mean - z[:16]).max() <= 0.51 * ((ends[1] - ends[0]) / 255).max()
        assert max(len(np.unique(z[:16, ..., c])) for c in range(16)) <= 256
    errors = (images.astype(float) - found['images']) ** 2
    assert figures['psnr'] == pytest.approx(20 * np.log10(255) - 10 * np.log10(errors.mean()), abs=1e-9)
    if bottleneck == 'kl':
        assert figures['bytes_per_image'] == 4 * 4 * 16 and 'codes_used' not in figures
    else:
        codes = {'vq': 512, 'fsq': 1000}[bottleneck]
        assert figures['bytes_per_image'] == pytest.approx(4 * 4 * np.log2(codes) / 8)
        assert figures['codes_used'] == len(np.unique(found['tokens'])) / codes
        assert 1 <= figures['perplexity'] <= codes


def test_each_part_has_its_optimizer(smoke, tmp_path, changed):
    """A discriminator whose steps are nothing stays where it is, while the autoencoder moves."""
    config = changed(smoke, 'task.discriminator_optimizer', 'sgd:learning_rate=0.0')
    experiment = one_device(build_first_stage(config))
    first = experiment.trainer().init(experiment.batch_spec)[0]().params
    params = train(experiment.trainer(), iterator_of(experiment), tmp_path, announce=lambda text: None).state.params
    moved = {
        name: max(float(abs(a - b).max()) for a, b in zip(jax.tree.leaves(first[name]), jax.tree.leaves(params[name])))
        for name in params
    }
    assert moved['discriminator'] == 0 < moved['autoencoder']


def test_eight_devices_build_the_same(smoke):
    experiment = build_first_stage(smoke)
    assert isinstance(experiment, FirstStage) and experiment.mesh.shape == make_mesh().shape


@pytest.mark.parametrize(
    ('key', 'value', 'fragments'),
    [
        ('task.name', 'denoising', ["task: unknown name 'denoising'", 'Autoencoding']),
        ('task.kl_wait', 1, ["unknown key 'kl_wait'", 'did you mean kl_weight?']),
        ('task.reconstruction', 'l3', ["'l1' or 'l2', got 'l3'"]),
        ('task.discriminator', 'gan', ["task.discriminator: unknown name 'gan'", 'PatchDiscriminator']),
        ('task.discriminator', 'patch_discriminator:depth=3', ['32x32 at least, got 8x8: lower its depth']),
        (
            'task.perceptual',
            'vgg',
            ["'none', 'recognizer', 'recognizer:weights=PATH' or 'lpips:weights=PATH', got 'vgg'"],
        ),
        ('task.perceptual', 'recognizer:wait=1', ["got 'recognizer:wait=1'"]),
        ('task.perceptual', 'recognizer:weights=/nowhere', ['/nowhere']),
        ('task.perceptual', 'lpips:weights=/nowhere', ['/nowhere']),
        ('network.levels', (3,), ['levels']),
        ('network.name', 'DiT', ["network: unknown name 'DiT'", 'Autoencoder']),
        ('network.bottleneck', 'vq', ['codebook_size of at least 2, got 0']),
        ('evaluation.params', 'emma', ["'raw' or one of ema; got 'emma'"]),
        ('evaluation.num_samples', 0, ['at least 1', 'got 0']),
        ('sampler', {}, ["unknown key 'sampler'"]),
        ('task', None, ['lacks task']),
    ],
)
def test_mistakes_are_told_in_one_line(smoke, changed, key, value, fragments):
    if key == 'network.levels':
        smoke = changed(smoke, 'network.bottleneck', 'fsq')
    with pytest.raises(ValueError) as caught:
        build_first_stage(changed(smoke, key, value))
    assert '\n' not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_diffusion_config_does_not_take_a_task(config):
    with pytest.raises(ValueError, match="unknown key 'task'"):
        build(config | {'task': {'name': 'autoencoding'}})


# Figures --------------------------------------------------------------------------------------------------------------


def test_running_means_of_codes_do_not_start_from_imported_ones(get_config):
    config = get_config('autoencoder_shapes', 'bottleneck=vq,smoke').to_dict()
    config['training']['init_from'] = 'weights/x'
    with pytest.raises(ValueError, match=r'training\.init_from needs task\.codebook_decay = 0'):
        build_first_stage(config)
    config['task']['codebook_decay'] = 0.0
    build_first_stage(config)


def test_psnr_in_decibels():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a + 255) == pytest.approx(0)
    assert psnr(a, a + 1) == pytest.approx(48.13, abs=0.01)  # of one step in 255, as textbooks have it


def test_jpeg_is_the_best_that_fits():
    """Every quality tried."""
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.standard_normal((3, 32, 32, 3)), axis=1).cumsum(axis=2)
    images = np.clip(128 + 8 * smooth, 0, 255).astype(np.uint8)
    fitting = []
    for quality in range(1, 96):
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files):
            Image.fromarray(image).save(file, 'JPEG', quality=quality, optimize=True)
        if np.mean([file.tell() for file in files]) <= 900:
            again = np.stack([np.asarray(Image.open(file)) for file in files])
            fitting.append(psnr(images, again))
    assert len(fitting) > 5
    assert jpeg_psnr(images, 900) == pytest.approx(fitting[-1])
    assert jpeg_psnr(images, 10) is None


def test_principal_components_are_those_of_the_whole_decomposition():
    """Against NumPy's SVD of everything, without rounding to bytes, which costs a little."""
    rng = np.random.default_rng(0)
    scenes = rng.normal(size=(400, 12)) * np.arange(12, 0, -1) @ rng.normal(size=(12, 64)) * 3 + 128
    images = np.clip(np.round(scenes + rng.normal(size=scenes.shape)), 0, 255).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = images[:300], images[300:]
    x, y = (a.reshape(len(a), -1).astype(float) for a in (train, test))
    for number in (4, 9):
        components = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:number]
        whole = psnr(y, np.clip(np.round((y - x.mean(0)) @ components.T @ components + x.mean(0)), 0, 255))
        assert whole - 0.3 < pca_psnr(train, test, number) < whole + 0.1
    assert pca_psnr(train, test, 65) is pca_psnr(None, test, 4) is None
