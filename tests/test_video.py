"""Clips through the whole program: trained, drawn, measured, reported, loaded; and what only clips have."""

import json

import imageio_ffmpeg
import jax
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.build import build
from diffjax.data import open_source
from diffjax.data.moving_digits import moving_digits_dataset_builder
from diffjax.data.moving_shapes import moving_shapes_dataset_builder
from diffjax.evaluation import clips, frechet_distance
from diffjax.evaluation.features import pixels
from diffjax.kinds import kind_of
from diffjax.results import save_samples
from diffjax.run import make_sampler
from diffjax.settings import ConfigError, DatasetSettings
from diffjax.training.sharding import make_mesh

pytestmark = pytest.mark.usefixtures('fast_compilation')
DIT = {'name': 'DiT', 'patch_size': 8, 'hidden_size': 8, 'depth': 1, 'num_heads': 1}
NAMES = ('video_digits', 'video_shapes')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Both datasets, small."""
    folder = tmp_path_factory.mktemp('videos')
    with pytest.MonkeyPatch.context() as patch:
        for builder in (moving_digits_dataset_builder, moving_shapes_dataset_builder):
            patch.setattr(builder, 'NUM_EXAMPLES', {'train': 64, 'test': 16})
        for name in ('moving_digits', 'moving_shapes'):
            open_source(name, 'train', data_dir=folder)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    def mesh(data=-1, fsdp=1, sequence=1):
        assert (data, fsdp, sequence) == (-1, 1, 1)
        return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))

    monkeypatch.setattr('diffjax.build.make_mesh', mesh)


@pytest.fixture
def smoke(get_config, changed, data_dir):
    """(name) -> the config under `smoke`, on the small datasets."""
    return lambda name: changed(get_config(name, 'smoke').to_dict(), 'dataset.data_dir', str(data_dir))


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
    return tmp_path_factory.mktemp('runs')


@pytest.mark.parametrize('name', NAMES)
def test_configs_are_plain_data(get_config, name):
    for argument in ('', 'smoke'):
        config = get_config(name, argument).to_dict()
        assert json.loads(json.dumps(config)) == json.loads(json.dumps(get_config(name, argument).to_dict()))
    with pytest.raises(ValueError, match=f"configs/{name}.py takes the argument.* smoke, got 'smok'"):
        get_config(name, 'smok')


@pytest.mark.parametrize('name', NAMES)
def test_a_config_runs_small(command, get_config, data_dir, workdirs, name):
    """The command trains, draws, measures and reports; what it leaves is loaded, and drawn from again."""
    workdir, given = workdirs / name, f'--config.dataset.data_dir={data_dir}'
    code, out, err = command(f'--config=configs/{name}.py:smoke', f'--workdir={workdir}', given)
    assert code == 0, err
    assert 'drawing and measuring 16 samples' in out and 'Frechet distance' in out
    config = get_config(name, 'smoke')
    frames, channels = (16, 1) if name == 'video_digits' else (8, 3)
    archive = np.load(workdir / 'samples.npz')
    assert archive['arr_0'].shape == (16, frames, 32, 32, channels) and archive['arr_0'].dtype == np.uint8
    assert archive['arr_0'].std() > 10
    figures, report = json.loads((workdir / 'figures.json').read_text()), (workdir / 'report.md').read_text()
    name_of_data, test = config.dataset.name, config.dataset.test_split
    source = open_source(name_of_data, test, data_dir=data_dir)
    real, i = source.arrays['video'][:, :frames], np.arange(16)
    drawn = archive['arr_0'][i, i % frames]
    assert figures['frechet_distance'] == pytest.approx(frechet_distance(pixels(drawn), pixels(real[i, i % frames])))
    assert f'{name_of_data} {test} (16 clips, one frame of each)' in report
    for picture in ('samples.png', 'samples.gif', 'loss.png', 'loss_by_noise_level.png'):
        assert f']({picture})' in report and (workdir / picture).stat().st_size > 500
    with Image.open(workdir / 'samples.gif') as gif:
        assert gif.n_frames == frames and gif.info['duration'] == 120  # GIF counts hundredths of a second
    run = diffjax.load(workdir)
    again = run.sample(archive['labels'])
    assert np.abs(again.astype(int) - archive['arr_0']).max() <= 1
    code, out, err = command('--mode=sample', f'--workdir={workdir}', '--labels=3,1', '--num_samples=16', '--seed=7')
    assert code == 0 and '16 samples at step 4' in out, err
    assert len(list((workdir / 'samples').glob('*.gif'))) == 1


def test_a_config_runs_under_its_own_command_twice(command, data_dir, workdirs):
    workdir, given = workdirs / 'video_digits', f'--config.dataset.data_dir={data_dir}'
    code, out, _ = command('--config=configs/video_digits.py:smoke', f'--workdir={workdir}', given)
    assert code == 0 and 'is finished (4 steps)' in out


@pytest.mark.parametrize(
    'name, argument', [('video_digits', ''), ('video_digits', 'network=dit'), ('video_shapes', '')]
)
def test_full_size_builds(get_config, changed, data_dir, name, argument):
    experiment = build(changed(get_config(name, argument).to_dict(), 'dataset.data_dir', str(data_dir)))
    assert experiment.sample_shape == ((8, 32, 32, 3) if name == 'video_shapes' else (16, 32, 32, 1))
    small = changed(get_config(name, f'{argument},smoke'.strip(',')).to_dict(), 'dataset.data_dir', str(data_dir))
    assert build(small).sample_shape == experiment.sample_shape


def test_frames_are_split_over_the_axis_that_the_config_names(smoke, monkeypatch):
    """Eight devices draw what one draws, one frame each."""
    config, drawn = smoke('video_shapes'), []
    for sequence in (1, 8):
        if sequence == 8:
            monkeypatch.setattr('diffjax.build.make_mesh', make_mesh)
            config['mesh'] = {'data': 1, 'fsdp': 1, 'sequence': 8}
        experiment = build(config)
        _, shapes, _ = experiment.trainer().init(experiment.batch_spec)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape).astype(np.float32), shapes.params)  # noqa: B023
        options = experiment.sampling_options()
        sampler = make_sampler(experiment, at_most=2)
        assert sampler.batch_size == 2
        drawn.append(sampler(params, experiment.plan(), [3, 1], **options))
        text = jax.jit(experiment.task.model.apply).lower(params, drawn[0], np.zeros(2), np.array([1, 2])).as_text()
        assert ('sharding_constraint' in text.lower()) == (sequence == 8)
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-3)
    assert np.abs(drawn[0] - sampler(params, experiment.plan(), [3, 1], **options | {'frame_rate': 4.0})).max() > 1e-3


# What is told of clips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, key, value, message',
    [
        (
            'video_digits',
            'dataset.num_frames',
            17,
            'num_frames = 17 .* the 16 frames of moving_digits; up to 16',
        ),
        ('video_shapes', 'dataset.num_frames', 9, 'strides up to 2 does not fit into the 16 frames .*; up to 8 do'),
        ('video_digits', 'dataset.frame_strides', (0,), r'frame_strides are whole numbers from 1 on.*got \(0,\)'),
        ('video_digits', 'dataset.frame_strides', (), 'frame_strides are whole numbers from 1 on'),
        ('video_digits', 'dataset.image_fraction', 0.3, 'image_fraction = 0.3 of 8 .* is 2.4 of them; 0.25 or 0.375'),
        ('video_digits', 'dataset.image_fraction', 1.0, r'image_fraction lies in \[0, 1\), got 1.0'),
        ('video_digits', 'dataset.resolution', 16, 'dataset.resolution crops images'),
        ('video_digits', 'sampler.frame_rate', 8.0, 'frame_rate = 8 needs a network that is told it'),
        ('video_shapes', 'sampler.frame_rate', 6.0, 'frame_rate = 6 is none of .* moving_shapes: 8, 4'),
        (
            'video_digits',
            'network',
            DIT,
            r'DiT .*\[B, H, W, C\]',
        ),
        ('digits', 'dataset.num_frames', 4, 'num_frames, .* are for clips, and digits has images'),
        ('digits', 'sampler.frame_rate', 8.0, 'sampler.frame_rate are for clips, and digits has images'),
    ],
)
def test_what_does_not_fit_is_refused(smoke, changed, get_config, name, key, value, message):
    config = get_config(name, 'smoke').to_dict() if name == 'digits' else smoke(name)
    with pytest.raises(ValueError, match=message) as caught:
        build(changed(config, key, value))
    assert '\n' not in str(caught.value)


def test_microbatches_have_whole_numbers_of_images(smoke, changed):
    config = changed(smoke('video_digits'), 'dataset.image_fraction', 0.25)
    assert build(config).task.image_fraction == 0.25
    with pytest.raises(ConfigError, match=r'0\.25 of 2 examples \(a microbatch\) is 0\.5 of them; 0 or 0\.5'):
        build(changed(config, 'training.num_microbatches', 4))


def test_other_kinds_of_experiments_want_images(get_config, changed, data_dir):
    for name in ('digits_vae', 'recognizer_shapes'):
        config = changed(get_config(name, 'smoke').to_dict(), 'dataset.name', 'moving_digits')
        config['dataset'] |= {'data_dir': str(data_dir), 'split': 'train', 'test_split': 'test'}
        with pytest.raises(ConfigError, match='images, and moving_digits has videos'):
            kind_of(config).build(config)


def test_frames_default_to_all_that_fit():
    settings = DatasetSettings(name='x', frame_strides=(1, 3))
    assert [settings.frames_of(whole) for whole in (16, 15, 4, 3, 1)] == [6, 5, 2, 1, 1]


def test_samples_are_compared_with_clips_of_their_rate(smoke, changed):
    config = smoke('video_shapes')
    for rate, stride in ((0.0, 1), (8.0, 1), (4.0, 2)):
        experiment = build(changed(config, 'sampler.frame_rate', rate))
        assert experiment.sample_shape == experiment.image_shape == (8, 32, 32, 3)
        assert experiment.source.image_shape == (16, 32, 32, 3) and experiment.frame_rate == 8 / stride
        whole = experiment.test.arrays['video']
        np.testing.assert_array_equal(experiment.test_images.arrays['video'], whole[:, : 8 * stride : stride])
        assert experiment.sampling_options()['frame_rate'] == 8 / stride


# Pictures -------------------------------------------------------------------------------------------------------------

CLIPS = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 5, 3), dtype=np.uint8)
LABELS = np.repeat([4, 0, 7], 10)


def test_one_frame_of_each_clip():
    frames = clips.one_frame_each(CLIPS, start=2)
    assert frames.shape == (30, 6, 5, 3)
    for i in (0, 1, 2, 29):
        np.testing.assert_array_equal(frames[i], CLIPS[i, (2 + i) % 4])


def test_a_contact_sheet_has_a_clip_of_each_class_in_a_row(tmp_path):
    picture = np.asarray(clips.contact_sheet(CLIPS, LABELS, tmp_path / 'sheet.png'))
    scale = round(1000 / (4 * 5))
    right = picture.shape[1] - 8
    for row, first in enumerate((10, 0, 20)):  # of classes 0, 4 and 7
        for k in range(4):
            left, top = right - (4 - k) * (5 * scale + 2) + 2, 8 + row * (6 * scale + 2)
            tile = picture[top : top + 6 * scale : scale, left : left + 5 * scale : scale]
            np.testing.assert_array_equal(tile, CLIPS[first, k])
    unlabelled = clips.contact_sheet(CLIPS, np.zeros(30, int), tmp_path / 'other.png')
    assert unlabelled.size[1] == 2 * 8 + 12 * (6 * scale + 2) - 2  # twelve rows


def test_a_gif_shows_the_frames_in_their_order(tmp_path):
    """Grey pictures have fewer colours than its palette, and come back exactly."""
    grey = np.repeat(CLIPS[..., :1], 3, -1)
    pictures = clips.side_by_side(grey, LABELS)
    clips.write_gif(pictures, tmp_path / 'x.gif', 10.0)
    with Image.open(tmp_path / 'x.gif') as gif:
        assert (gif.n_frames, gif.info['duration'], gif.info['loop']) == (4, 100, 0)
        for k in range(4):
            gif.seek(k)
            error = np.asarray(gif.convert('RGB')).astype(int) - np.asarray(pictures[k])
            assert np.abs(error).max() <= 8


def test_an_mp4_where_it_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, 'can_write_mp4', lambda: False)
    save_samples(tmp_path / 'a', CLIPS, LABELS)
    assert {path.name for path in tmp_path.iterdir()} == {'a.npz', 'a.png', 'a.gif'}
    with pytest.raises(ValueError, match=r"pip install 'diffjax\[video\]'"):
        clips.write_mp4(clips.side_by_side(CLIPS, LABELS), tmp_path / 'a.mp4')
    monkeypatch.undo()
    smooth = np.broadcast_to(np.linspace(0, 250, 6)[:, None, None, None, None], (6, 4, 33, 31, 1)).astype(np.uint8)
    save_samples(tmp_path / 'b', smooth.repeat(2, 0), np.arange(12), 5.0)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / 'b.mp4'))
    facts = next(reader)
    assert facts['fps'] == 5 and facts['duration'] == pytest.approx(4 / 5)
    width, height = facts['size']
    pictures = clips.side_by_side(smooth.repeat(2, 0), np.arange(12))
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    assert len(frames) == 4
    error = frames[0][: pictures[0].size[1], : pictures[0].size[0]].astype(int) - np.asarray(pictures[0])
    assert np.abs(error).mean() < 2  # it is a lossy format
