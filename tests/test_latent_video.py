"""Clips through a causal autoencoder: learned, encoded, drawn and decoded; and what does not fit told in one line."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.build import build
from diffjax.data import open_source
from diffjax.data.moving_digits import moving_digits_dataset_builder
from diffjax.evaluation.compression import pca_psnr
from diffjax.first_stage import _for_pca, _picture, build_first_stage
from diffjax.settings import ConfigError
from diffjax.stages import find, make_ready, open_latents, settings_of

pytestmark = pytest.mark.usefixtures('fast_compilation')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('videos')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_digits_dataset_builder, 'NUM_EXAMPLES', {'train': 64, 'test': 16})
        open_source('moving_digits', 'train', data_dir=folder)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    def mesh(data=-1, fsdp=1, sequence=1):
        assert (data, fsdp, sequence) == (-1, 1, 1)
        return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))

    for module in ('build', 'first_stage', 'stages'):
        monkeypatch.setattr(f'diffjax.{module}.make_mesh', mesh)


@pytest.fixture
def smoke(get_config, data_dir):
    return on(data_dir, get_config('video_digits', 'latent,smoke').to_dict())


def on(data_dir, config):
    """On the small dataset, without figures of motion."""
    config['evaluation']['clip_features'] = ''
    for dataset in (config['dataset'], config['first_stage']['config']['dataset']):
        dataset['data_dir'] = str(data_dir)
    return config


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
    return tmp_path_factory.mktemp('runs')


def test_the_command_trains_both_stages_and_draws_clips(command, data_dir, workdirs, smoke):
    """Each batch encoded; samples are clips of 13 frames, in motion, and drawn again by what is loaded."""
    workdir = workdirs / 'latent'
    given = [f'--config.{key}dataset.data_dir={data_dir}' for key in ('', 'first_stage.config.')]
    given.append('--config.evaluation.clip_features=')
    code, out, err = command('--config=configs/video_digits.py:latent,smoke', f'--workdir={workdir}', *given)
    assert code == 0, err
    assert 'the first stage, in' in out and 'encoding' not in out and 'drawing and measuring 16 samples' in out
    archive = np.load(workdir / 'samples.npz')
    assert archive['arr_0'].shape == (16, 13, 32, 32, 1) and archive['arr_0'].dtype == np.uint8
    with Image.open(workdir / 'samples.gif') as gif:
        assert gif.n_frames == 13 and gif.info['duration'] == 120
    assert (workdir / 'samples.png').stat().st_size > 500
    report = (workdir / 'report.md').read_text()
    assert 'moving_digits test[:16] (16 clips, one frame of each)' in report and '](samples.gif)' in report
    run = diffjax.load(workdir)
    assert run.experiment.source.kind == 'video' and run.experiment.sample_shape == (7, 4, 4, 16)
    assert np.abs(run.sample(archive['labels']).astype(int) - archive['arr_0']).max() <= 1

    first = json.loads((workdir / 'first_stage' / 'figures.json').read_text())
    assert first['num_samples'] == 16 and first['step'] == 4 and first['psnr_jpeg'] is first['psnr_pca'] is None
    assert first['bytes_per_clip'] == 7 * 4 * 4 * 16 and first['values_per_latent_value'] == 13 * 64 / (7 * 16)
    report = (workdir / 'first_stage' / 'report.md').read_text()
    assert 'on 64 clips with' in report and 'PSNR is pooled over 16 clips' in report
    assert 'JPEG' not in report and 'PCA' not in report and 'factor in time' in report

    latents, experiment = run.experiment.latents, run.experiment
    clips = experiment.test.arrays['video'][:8]
    x0 = np.float32(clips[:, 2:15] / 127.5 - 1)
    code = jax.jit(lambda x: latents.network.apply({'params': latents.params}, x, method='encode'))(x0)
    moments = json.loads((workdir / 'latent_moments.json').read_text())
    z = (np.asarray(code.mean) - moments['mean']) / moments['std']
    made = jax.jit(latents.encode)(latents.params, {'x0': x0, 'frame_rate': np.full(8, 8.0)}, jax.random.key(0))
    spread = np.asarray(code.std) / moments['std']
    assert set(made) == {'x0', 'frame_rate'} and made['x0'].shape == (8, 7, 4, 4, 16)
    assert abs(((made['x0'] - z) / spread).std() - 1) < 0.05  # drawn from the posterior

    again = jax.jit(lambda z: latents.network.apply({'params': latents.params}, z, method='decode'))(code.mean)
    expected = np.clip(np.round((np.asarray(again) + 1) * 127.5), 0, 255)
    sliced, tiled = (
        replace(latents, settings=replace(latents.settings, **settings)).decode(np.float32(z))
        for settings in ({'batch_size': 3}, {'batch_size': 8, 'tile': 3})
    )
    assert sliced.dtype == np.uint8 and np.abs(sliced - expected).max() <= 1
    assert tiled.shape == expected.shape and np.abs(tiled - expected).max() > 1  # it was cut


def test_latents_of_clips_are_written_once(data_dir, workdirs, smoke, tmp_path):
    """Those of the first 13 frames, with what is known of a clip but the clip; another cut of it is told apart."""
    smoke['dataset'] |= {'split': 'train', 'test_split': 'test'}
    smoke['first_stage'] = {'workdir': str(workdirs / 'latent' / 'first_stage'), 'encode': 'once', 'batch_size': 4}
    blank = build(smoke, latents=open_latents(smoke, tmp_path))
    assert (blank.sample_shape, blank.image_shape, blank.frame_rate) == ((7, 4, 4, 16), (13, 32, 32, 1), 8.0)
    assert make_ready(smoke, tmp_path, None, lambda text: None, progress=False)
    experiment = build(smoke, latents=open_latents(smoke, tmp_path))
    assert experiment.latents.ready and experiment.source.kind == 'latent' and experiment.source.frame_rate == 8.0
    assert experiment.sample_shape == (7, 4, 4, 16) and experiment.images.image_shape == (13, 32, 32, 1)
    known = set(experiment.source.features)
    assert {'mean', 'std', 'label', 'digit', 'position'} <= known and 'video' not in known

    found, there = find(settings_of(smoke), tmp_path), experiment.source.read(range(64))
    clips = open_source('moving_digits', 'train', data_dir=data_dir).read(range(64))
    x = np.float32(clips['video'][:8, :13] / 127.5 - 1)
    code = jax.jit(lambda x: found.network.apply({'params': found.params}, x, method='encode'))(x)
    np.testing.assert_allclose(there['mean'][:8], code.mean, atol=2e-3)
    np.testing.assert_allclose(there['std'][:8], code.std, atol=2e-3)
    np.testing.assert_array_equal(there['label'], clips['label'])
    x0 = experiment.trainer().prepare(there, jax.random.key(0))['x0']
    np.testing.assert_allclose(np.mean(x0, (0, 1, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(np.std(x0, (0, 1, 2, 3)), 1, atol=0.05)

    with pytest.raises(ConfigError, match=r'holds latents \[7, .* of 8 frames a second, .* asks for \[3, .* of 8 fr'):
        open_latents(changed_dataset(smoke, num_frames=5), tmp_path)
    with pytest.raises(ConfigError, match=r'of 8 frames a second, .* asks for .* of 4 frames a second: remove them'):
        open_latents(changed_dataset(smoke, num_frames=7, frame_strides=(2,)), tmp_path)
    with pytest.raises(ConfigError, match=r'frame_strides = \(1, 2\): latents on disk are those of one frame rate'):
        build(changed_dataset(smoke, frame_strides=(1, 2), num_frames=7), latents=experiment.latents)
    told = smoke | {'network': smoke['network'] | {'frame_rate_frequencies': 8}}
    with pytest.raises(ConfigError, match="frame_rate_frequencies: latents on disk .* say none; .*'each_step'"):
        build(told, latents=experiment.latents)


def changed_dataset(config, **changes):
    return config | {'dataset': config['dataset'] | changes}


def test_rates_are_learned_where_each_batch_is_encoded(smoke, tmp_path):
    """Two of them, each clip with its own."""
    config = changed_dataset(smoke, num_frames=5, frame_strides=(1, 3))
    config['network'] = config['network'] | {'frame_rate_frequencies': 8}
    for rate, stride in ((0.0, 1), (8 / 3, 3)):
        config['sampler'] = config['sampler'] | {'frame_rate': rate}
        experiment = build(config, latents=open_latents(config, tmp_path))
        assert experiment.sample_shape == (3, 4, 4, 16) and experiment.image_shape == (5, 32, 32, 1)
        assert experiment.frame_rate == 8 / stride
        batch = jax.eval_shape(experiment.trainer().prepare, experiment.batch_spec, jax.random.key(0))
        assert batch['x0'].shape == (1, 5, 32, 32, 1) and batch['frame_rate'].shape == (1,)


def test_full_size_builds(get_config, data_dir, tmp_path):
    config = on(data_dir, get_config('video_digits', 'latent').to_dict())
    experiment = build(config, latents=open_latents(config, tmp_path))
    assert experiment.sample_shape == (7, 4, 4, 16) and experiment.image_shape == (13, 32, 32, 1)
    assert json.loads(json.dumps(config))['first_stage']['config']['dataset'] == config['dataset'] | {
        'frame_strides': [1]
    }


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('dataset.num_frames', 0, r'1 more than a multiple of 2 frames, .* have 16; dataset.num_frames = 15 would'),
        ('dataset.num_frames', 12, r'those of the dataset have 12; dataset.num_frames = 11 would fit'),
        ('network.patch_size', 32, r'whose sides are multiples of 64, and those of the dataset are \[13, 32, 32, 1\]'),
        ('network.frames', 1, r'temporal_downsampling needs frames > 1'),
        ('dataset.image_fraction', 0.25, r'dataset.image_fraction is for what denoises: here it is 0, got 0.25'),
        ('dataset.name', 'digits', r'num_frames, .* are for clips, and digits has images'),
        ('dataset.frame_strides', (1, 2), r'num_frames = 13 with frame_strides up to 2 does not fit'),
        ('task.discriminator', 'patch_discriminator:depth=4', r'of depth 4 needs pictures of 64x64 at least'),
    ],
)
def test_what_a_first_stage_does_not_take(smoke, changed, key, value, message):
    first = smoke['first_stage']['config']
    with pytest.raises(ValueError, match=message) as caught:
        build_first_stage(changed(first, key, value))
    assert '\n' not in str(caught.value)


def test_images_and_clips_have_their_own_networks(smoke, changed, get_config):
    first = smoke['first_stage']['config']
    plain = changed(changed(first, 'network.temporal_downsampling', ()), 'network.frames', 1)
    with pytest.raises(ConfigError, match=r'with frames=1 takes images, and the dataset has clips \[13, .*frames=3$'):
        build_first_stage(plain)
    images = get_config('autoencoder_shapes', 'smoke').to_dict()
    with pytest.raises(ConfigError, match=r'with frames=3 takes clips, and .* has images \[8, 8, 1\], .*frames=1$'):
        build_first_stage(changed(images, 'network.frames', 3))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'num_frames': 0}, r'1 more than a multiple of 2 frames, .* have 16; dataset.num_frames = 15 would fit'),
        ({'image_fraction': 0.25}, r'image_fraction = 0.25: a frame of latents stands for several frames'),
        ({'name': 'digits', 'num_frames': 0, 'data_dir': ''}, r'with frames=3 takes clips, and the dataset has images'),
    ],
)
@pytest.mark.parametrize('encode', ['once', 'each_step'])
def test_what_learning_in_latents_does_not_take(smoke, tmp_path, changes, message, encode):
    config = changed_dataset(smoke, **changes)
    config['first_stage'] = config['first_stage'] | {'encode': encode}
    with pytest.raises(ConfigError, match=message) as caught:
        build(config, latents=open_latents(config, tmp_path))
    assert '\n' not in str(caught.value)


# Figures and pictures -------------------------------------------------------------------------------------------------


def test_pca_is_fitted_to_whole_clips_while_they_are_enough(data_dir):
    source = open_source('moving_digits', 'train', data_dir=data_dir).clipped(5)
    clips = source.arrays['video']
    np.testing.assert_array_equal(_for_pca(source, 16), clips)
    assert _for_pca(source, 17) is None  # 64 are less than four for each
    x = clips.reshape(64, -1).astype(float)
    components = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:16]
    again = np.clip(np.round((x - x.mean(0)) @ components.T @ components + x.mean(0)), 0, 255)
    exact = 20 * np.log10(255) - 10 * np.log10(((again - x) ** 2).mean())
    assert exact - 0.3 < pca_psnr(clips, clips, 16) < exact + 0.1


@pytest.mark.parametrize('shape, columns', [((12, 4, 5, 1), 10), ((6, 3, 4, 5, 1), 3)])
def test_the_picture_has_rows_of_three(tmp_path, shape, columns):
    """Pictures, reconstructions, differences: the first ten images, or the frames of each of the first four clips."""
    rng = np.random.default_rng(0)
    images, again = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
    _picture(images, again, tmp_path / 'x.png')
    picture = np.asarray(Image.open(tmp_path / 'x.png'))[..., 0]
    errors = np.minimum(np.abs(images.astype(int) - again) * 4, 255)
    scale = round(48 / 5)
    groups = 1 if len(shape) == 4 else 4
    for group in range(groups):
        for row, values in enumerate((images, again, errors)):
            for column in range(columns):
                top, left = 8 + (3 * group + row) * (4 * scale + 2), 8 + column * (5 * scale + 2)
                tile = picture[top : top + 4 * scale : scale, left : left + 5 * scale : scale]
                frame = values[column] if groups == 1 else values[group, column]
                np.testing.assert_array_equal(tile, frame[..., 0])
    assert picture.shape == (14 + groups * 3 * (4 * scale + 2), 14 + columns * (5 * scale + 2))
