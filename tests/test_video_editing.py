"""Clips made from clips, and longer ones than were learned: by command, by config and in a notebook.

One tiny network on clips of 4 frames, never trained: its parameters are noise, so that what it makes depends on all
that it is told.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.build import build, build_plan
from diffjax.core.editing import Known, Windows, sample_known
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.sampling import pad, sample, sample_keys, starting_noise
from diffjax.core.transforms import Transforms, transformed
from diffjax.data import open_source
from diffjax.data.moving_digits import moving_digits_dataset_builder
from diffjax.evaluation.seams import seam_figures
from diffjax.results import save_samples
from diffjax.run import Sampler, labels_to_draw
from diffjax.settings import ConfigError
from diffjax.training.checkpoints import Checkpoints
from diffjax.workdir import write_config

pytestmark = pytest.mark.usefixtures('fast_compilation')


@pytest.fixture(scope='module', autouse=True)
def one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('diffjax.build.make_mesh', lambda data=-1, fsdp=1, sequence=1: mesh)
        yield mesh


@pytest.fixture(scope='module')
def tiny(get_config, tmp_path_factory):
    """The config; 16 clips to learn from and 8 held-out ones."""
    folder = tmp_path_factory.mktemp('videos')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_digits_dataset_builder, 'NUM_EXAMPLES', {'train': 16, 'test': 8})
        open_source('moving_digits', 'train', data_dir=folder)
    config = get_config('video_digits', 'network=dit,smoke').to_dict()
    config['dataset'] |= {'data_dir': str(folder), 'num_frames': 4, 'split': 'train', 'test_split': 'test'}
    config['network'] |= {'patch_size': 8, 'hidden_size': 8, 'num_heads': 1}
    config['sampler'] |= {'num_steps': 4, 'batch_size': 8}
    config['evaluation'] |= {'num_samples': 8, 'noise_levels': 1, 'clip_features': ''}
    return config


@pytest.fixture(scope='module')
def workdir(tiny, one_device, tmp_path_factory):
    """A run at step 4, all of whose parameters are noise."""
    folder, experiment, rng = tmp_path_factory.mktemp('runs') / 'tiny', build(tiny), np.random.default_rng(0)
    _, shapes, shardings = experiment.trainer().init(experiment.batch_spec)

    def noise(shape):
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return (0.2 * rng.standard_normal(shape.shape)).astype(shape.dtype)

    state = jax.tree.map(lambda s, where: jax.device_put(noise(s), where), shapes, shardings)
    checkpoints = Checkpoints(folder / 'checkpoints')
    checkpoints.save(4, state, SimpleNamespace(get_state=dict), {})
    checkpoints.close()
    write_config(folder, tiny)
    return folder


@pytest.fixture(scope='module')
def run(workdir):
    return diffjax.load(workdir)


@pytest.fixture(scope='module')
def held_out(tiny):
    """(clips [8, 4, 32, 32, 1], labels [8]), in the dataset's order."""
    arrays = open_source('moving_digits', 'test', data_dir=tiny['dataset']['data_dir']).arrays
    return arrays['video'][:, :4], arrays['label']


def box(num_frames, *where):
    """Booleans [T, 32, 32], False in a box."""
    mask = np.ones((num_frames, 32, 32), bool)
    mask[where] = False
    return mask


def frames(num_frames, *known):
    return np.broadcast_to(np.isin(np.arange(num_frames), known)[:, None, None], (num_frames, 32, 32))


# By command -----------------------------------------------------------------------------------------------------------

EDITS = {
    'image to video': ('first_frames', 'dpmpp_2m', 0, frames(4, 0)),
    'interpolation': ('first_and_last', 'ddpm', 0, frames(4, 0, 3)),
    'inpainting': (
        'region:start=0.5,end=1,top=0.5,bottom=1,left=0,right=0.25',
        'repaint:jump=2,repeats=2',
        0,
        box(4, np.s_[2:], np.s_[16:], np.s_[:8]),
    ),
    'continuation': ('first_frames:num_known=3', 'heun:coordinate=t', 7, frames(7, 0, 1, 2)),
}


@pytest.mark.parametrize('name', EDITS)
def test_what_is_known_is_in_the_bytes_that_are_written(command, workdir, held_out, tmp_path, name):
    known, solver, num_frames, where = EDITS[name]
    words = [f'--config.sampler.known={known}', f'--config.sampler.solver={solver}', f'--out={tmp_path}/x']
    words += [f'--config.sampler.num_frames={num_frames}'] if num_frames else []
    code, out, err = command('--mode=sample', f'--workdir={workdir}', '--num_samples=3', *words)
    assert code == 0 and '3 samples at step 4' in out, err
    archive = np.load(tmp_path / 'x.npz')
    made, (clips, labels) = archive['arr_0'], held_out
    expected = np.zeros((3, *where.shape, 1), np.uint8)
    expected[:, : clips.shape[1]] = clips[:3]
    assert made.shape == expected.shape and made.dtype == np.uint8
    np.testing.assert_array_equal(made[:, where], expected[:, where])
    assert (made[:, ~where] != archive['given'][:, ~where]).mean() > 0.5
    np.testing.assert_array_equal(archive['labels'], labels[:3])
    np.testing.assert_array_equal(archive['known'][..., 0], where)
    np.testing.assert_array_equal(archive['given'][:, where], expected[:, where])
    assert (tmp_path / 'x.png').stat().st_size > 500 and (tmp_path / 'x.gif').stat().st_size > 500


def test_killed_while_it_draws_it_goes_on(command, workdir, held_out, dying, caplog, tmp_path):
    """Of clips in windows; those that were made from other clips do not count."""
    words = ['--mode=sample', f'--workdir={workdir}', '--num_samples=12', '--config.sampler.num_frames=7']
    words += ['--config.sampler.known=first_frames', '--config.sampler.batch_size=8']

    def archive(name, *more):
        assert command(*words, f'--out={tmp_path}/{name}', *more)[0] == 0
        return (tmp_path / f'{name}.npz').read_bytes()

    for name in ('a', 'b'):
        with dying():
            command(*words, f'--out={tmp_path}/{name}')
    assert archive('a') == archive('whole') and 'going on after 8 samples' in caplog.text
    caplog.clear()
    np.savez(tmp_path / 'clips.npz', arr_0=held_out[0][::-1])
    other = f'--config.sampler.known_from={tmp_path}/clips.npz', '--labels=3'
    with dying():
        command(*words, f'--out={tmp_path}/b', *other)
    np.savez(tmp_path / 'clips.npz', arr_0=held_out[0])
    archive('b', *other)
    assert not caplog.records


def test_clips_may_come_from_files(command, workdir, held_out, tmp_path):
    """An archive's own labels are drawn, one sample of each clip; a picture moves, as the class that is asked for."""
    clips, labels = held_out
    np.savez_compressed(tmp_path / 'clips.npz', arr_0=clips[[5, 2, 7]], labels=labels[[5, 2, 7]])
    Image.fromarray(clips[6, 1, :, :, 0]).save(tmp_path / 'picture.png')
    mask = np.random.default_rng(0).random((32, 32)) < 0.5
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    here = ['--mode=sample', f'--workdir={workdir}', f'--out={tmp_path}/x']
    given = f'--config.sampler.known_from={tmp_path}/clips.npz'
    code, _, err = command(*here, given, f'--config.sampler.known={tmp_path}/mask.png')
    made = np.load(tmp_path / 'x.npz')
    assert code == 0 and made['arr_0'].shape == (3, 4, 32, 32, 1), err
    np.testing.assert_array_equal(made['arr_0'][:, :, mask], clips[[5, 2, 7]][:, :, mask])
    np.testing.assert_array_equal(made['labels'], labels[[5, 2, 7]])
    given = f'--config.sampler.known_from={tmp_path}/picture.png'
    code, _, err = command(*here, given, '--config.sampler.known=first_frames', '--labels=4,9,1')
    made = np.load(tmp_path / 'x.npz')
    assert code == 0, err
    assert made['labels'].tolist() == [4, 9, 1]
    np.testing.assert_array_equal(made['arr_0'][:, 0], np.stack([clips[6, 1]] * 3))


def test_long_clips_are_measured(command, workdir, held_out):
    """Figures, report and pictures of samples that were continued in windows."""
    words = ['--config.sampler.known=first_frames:num_known=2', '--config.sampler.num_frames=8']
    code, out, err = command('--mode=evaluate', f'--workdir={workdir}', *words)
    assert code == 0 and 'where windows join' in out, err
    figures, report = json.loads((workdir / 'figures.json').read_text()), (workdir / 'report.md').read_text()
    archive, (clips, labels) = np.load(workdir / 'samples.npz'), held_out
    np.testing.assert_array_equal(archive['arr_0'][:, :2], clips[:, :2])
    np.testing.assert_array_equal(archive['labels'], labels)
    assert archive['arr_0'].shape == (8, 8, 32, 32, 1)
    assert (figures['known_share'], figures['known_kept']) == (2 / 8, 1.0)
    expected = seam_figures(archive['arr_0'], [1, 3, 5])  # windows of frames 0-3, 2-5 and 4-7
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert 'something was known, first_frames:num_known=2 of moving_digits test; figures count it' in report
    assert 'Clips of 8 frames in windows of 4, one every 2.' in report and 'seam' in report


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['known=first_frame'], "sampler.known: unknown name 'first_frame' (did you mean first_frames?)"),
        (['known=first_frames', 'known_from=nowhere.npz'], 'sampler.known_from: nowhere.npz is no NPZ archive'),
        (['num_frames=many'], "sampler.num_frames is a whole number, got 'many'"),
        (['known_fron=x.npz'], 'did you mean known_from?'),
    ],
)
def test_mistakes_on_the_command_line(command, workdir, words, message):
    code, out, err = command('--mode=sample', f'--workdir={workdir}', *[f'--config.sampler.{word}' for word in words])
    (line,) = err.strip().splitlines()
    assert code == 2 and message in line and 'samples at step' not in out


# In a notebook --------------------------------------------------------------------------------------------------------


def test_masks_clips_and_solvers_go_through_one_program(run, held_out):
    """And whatever the mask, and whatever the solver, the bytes are kept, in several batches too."""
    clips, labels = held_out[0], np.arange(11) % 10
    sampler = Sampler(run.experiment.task, run.experiment.sample_shape, run.experiment.mesh, 8)
    here, of = replace(run, sampler=sampler), np.arange(11) % 8
    rng, drawn = np.random.default_rng(1), []
    for solver in ('ddim', 'ddpm', 'repaint:jump=2,repeats=3', 'unipc'):
        mask = rng.random((4, 32, 32)) < 0.3
        drawn.append(here.sample(labels, known=mask, solver=solver))
        np.testing.assert_array_equal(drawn[-1][:, mask], clips[of][:, mask])
    inverted = 255 - clips[:3]
    drawn.append(here.sample(labels, known='first_frames', clips=inverted, solver='ddim', num_steps=7))
    np.testing.assert_array_equal(drawn[-1][:, 0], inverted[np.arange(11) % 3, 0])
    still = here.sample(labels, known='cinemagraph', solver='dpmpp_2m_sde')
    outside = box(4, np.s_[1:], np.s_[8:24], np.s_[8:24])
    np.testing.assert_array_equal(still[:, outside], np.repeat(clips[of][:, :1], 4, axis=1)[:, outside])
    assert sampler.num_traces == 1
    assert len({each.tobytes() for each in drawn}) == len(drawn)
    other = here.sample(labels[::-1], known='first_frames', clips=inverted, solver='ddim', num_steps=7)
    assert (other[:, 1:] != drawn[-1][:, 1:]).any()  # labels are told beside clips


def test_solvers_that_add_noise_get_fresh_noise_and_others_one_path(run, held_out):
    """Against `sample_known`, told by hand which of the two it is."""
    task, keys = run.experiment.task, sample_keys(jax.random.key(0), 8)
    mask, labels = np.ascontiguousarray(frames(4, 0)[..., None]), np.arange(8)
    known = Known(held_out[0], mask)

    @jax.jit
    def by_hand(plan, fresh):
        x0 = held_out[0].astype(np.float32) / 127.5 - 1
        denoiser, kept = task.denoiser(run.params), Known(x0, jnp.asarray(mask))
        return sample_known(denoiser, plan, task.objective.schedule, kept, labels, keys, fresh=fresh)

    for solver, fresh in (('ddim', False), ('dpmpp_2m', False), ('ddpm', True), ('ddim:eta=1', True)):
        plan = build_plan(replace(run.experiment.sampler, solver=solver), task)
        got = run.sampler(run.params, plan, labels, known=known)
        right, wrong = (by_hand(pad(plan, 64, 8, 2), np.bool_(f)) for f in (fresh, not fresh))
        np.testing.assert_allclose(got, right, atol=2e-4)
        assert np.abs(got - wrong).max() > 0.1


def test_windows_that_do_not_overlap_are_clips_of_their_own(run):
    """Eight frames in two windows: the samples of both halves of the noise, guided and thresholded alike."""
    task, keys = run.experiment.task, sample_keys(jax.random.key(0), 8)
    settings = replace(run.experiment.sampler, solver='dpmpp_2m')  # noise on the way is drawn for whole clips
    plan, labels = build_plan(settings, task), np.arange(8, dtype=np.int32)
    guidance, transforms = Guidance(np.float32(3)), Transforms(threshold=np.float32(0.8))
    how = {'guidance': guidance, 'transforms': transforms}
    got = run.sampler(run.params, plan, labels, windows=Windows(8, 4, 4), **how)

    @jax.jit
    def short(x):
        guided = classifier_free(task.denoiser(run.params), guidance, jnp.int32(10))
        denoiser = transformed(guided, task.objective.schedule, transforms)
        return sample(denoiser, plan, x, labels, keys)[0]

    x = starting_noise(plan, keys, (8, 32, 32, 1))
    expected = np.concatenate([short(x[:, :4]), short(x[:, 4:])], axis=1)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    overlapping = run.sampler(run.params, plan, labels, windows=Windows(8, 4, 2), **how)
    assert np.abs(overlapping - expected).max() > 0.05


def test_eight_devices_make_what_one_makes(run, held_out):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8, 1), ('data', 'fsdp'))
    experiment, labels = run.experiment, np.arange(5)
    plan, windows = build_plan(experiment.sampler, experiment.task), Windows(8, 4, 3)
    known = Known(np.repeat(held_out[0][:5], 2, axis=1), np.ascontiguousarray(frames(8, 0, 7)[..., None]))
    drawn = [
        Sampler(experiment.task, experiment.sample_shape, each, 8)(
            jax.tree.map(np.asarray, run.params), plan, labels, known=known, windows=windows
        )
        for each in (experiment.mesh, mesh)
    ]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=2e-4)
    np.testing.assert_array_equal(np.rint((drawn[1][:, [0, 7]] + 1) * 127.5), known.x0[:, [0, 7]])


def test_labels_are_those_of_the_clips(tiny, changed, held_out):
    for known, expected in (('', np.arange(11) % 10), ('first_frames', held_out[1][np.arange(11) % 8])):
        experiment = build(changed(tiny, 'sampler.known', known))
        np.testing.assert_array_equal(labels_to_draw(experiment, 11), expected)


# What does not fit ----------------------------------------------------------------------------------------------------

REFUSED = [
    ({'known': 'first_frames:num_known=4'}, r"sampler.known 'first_frames': num_known=4 leaves none of 4 frames"),
    ({'known': 'first_frames:num_known=5', 'num_frames': 8}, 'frame 5 of 8 is to be known, and the clips have 4'),
    (
        {'known': 'region:box=1'},
        "sampler.known 'region': unknown key 'box'; valid: start, end, top, bottom, left, right",
    ),
    ({'known': 'region', 'num_frames': 8}, 'frame 8 of 8 is to be known, and the clips have 4 frames'),
    ({'known': 'none.png'}, 'sampler.known: none.png is no picture that can be read'),
    ({'known': 'FOLDER/small.png'}, r'sampler.known: the mask is of shape \[1, 5, 6\], .* want \[4, 32, 32\]'),
    ({'known': 'first_frames', 'known_from': 'FOLDER/small.png'}, 'known_from: .* has 5 x 6 pixels of 1 .* 32 x 32 p'),
    ({'known': 'first_frames', 'known_from': 'FOLDER/colour.png'}, 'sampler.known_from: .* is in colour, and grey'),
    ({'known': 'first_and_last', 'known_from': 'FOLDER/right.png'}, 'a first and a last frame are wanted, .* have 1'),
    ({'known_from': 'clips.npz'}, "sampler.known_from = 'clips.npz' says nothing without a sampler.known"),
    ({'num_frames': 3}, 'sampler.num_frames = 3 is less than the 4 frames that were learned'),
    ({'num_frames': 8, 'window_stride': 5}, 'sampler.window_stride = 5 leaves frames between windows of 4'),
]


@pytest.mark.parametrize(('values', 'message'), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_refused(tiny, tmp_path, values, message):
    Image.new('L', (6, 5)).save(tmp_path / 'small.png')
    Image.new('L', (32, 32)).save(tmp_path / 'right.png')
    Image.new('RGB', (32, 32), (9, 8, 7)).save(tmp_path / 'colour.png')
    given = {k: v.replace('FOLDER', str(tmp_path)) if isinstance(v, str) else v for k, v in values.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        build({**tiny, 'sampler': {**tiny['sampler'], **given}})
    assert '\n' not in str(caught.value)


def test_without_held_out_clips_a_file_is_needed(tiny, changed):
    config = changed(changed(tiny, 'dataset.test_split', ''), 'sampler.known', 'first_frames')
    with pytest.raises(ConfigError, match='dataset.test_split names none: give a file as sampler.known_from'):
        build(config)


def test_refused_in_a_notebook(run, held_out):
    for options, message in (
        ({'clips': held_out[0]}, 'say what, such as known="first_frames"'),
        (
            {'known': 'first_frames', 'clips': held_out[0][:, :, :8]},
            r'clips are uint8 \[N, T, 32, 32, 1\], got uint8 \[',
        ),
        ({'known': 'first_frames', 'clips': held_out[0] / 255}, 'got float64'),
        ({'known': np.ones((32, 32))}, r'sampler.known: a mask is booleans \[H, W\] or \[T, H, W\], got float64'),
        ({'known': np.ones((3, 32, 32), bool)}, 'sampler.known: the mask is of shape'),
    ):
        with pytest.raises(ConfigError, match=message):
            run.sample([1], **options)


# Pictures -------------------------------------------------------------------------------------------------------------


def test_pictures_show_what_was_given_beside_what_was_made(tmp_path):
    rng = np.random.default_rng(0)
    made, given = rng.integers(0, 256, (2, 14, 4, 6, 5, 3), np.uint8)
    mask = np.broadcast_to(np.arange(4)[:, None, None, None] < 2, (4, 6, 5, 1))
    save_samples(tmp_path / 'a', made, np.repeat([3, 1], 7), 8.0, Known(given, mask))
    sheet, scale = np.asarray(Image.open(tmp_path / 'a.png')), 50
    shown = np.where(mask, given, 128)
    for row, expected in enumerate((shown[7], made[7], shown[0], made[0])):  # of classes 1 and 3
        for k in range(4):
            left, top = sheet.shape[1] - 8 - (4 - k) * (5 * scale + 2) + 2, 8 + row * (6 * scale + 2)
            tile = sheet[top : top + 6 * scale : scale, left : left + 5 * scale : scale]
            np.testing.assert_array_equal(tile, expected[k])
    assert len(sheet) == 2 * 8 + 4 * (6 * scale + 2) - 2
    np.testing.assert_array_equal(np.load(tmp_path / 'a.npz')['given'], given)
    one = [Known(given[..., :1].repeat(3, -1), mask), made[..., :1].repeat(3, -1)]
    save_samples(tmp_path / 'b', one[1], np.arange(14), 8.0, one[0])
    with Image.open(tmp_path / 'b.gif') as gif:
        gif.seek(3)
        picture, scale = np.asarray(gif.convert('RGB')).astype(int), 4
        assert gif.n_frames == 4
    left = picture.shape[1] - 8 - 4 * (11 * scale + 2) + 2  # the first of four pairs, one pixel between the two
    tile = picture[8 : 8 + 6 * scale : scale, left : left + 11 * scale : scale]
    assert np.abs(tile[:, :5] - 128).max() <= 8  # frame 3 is not known; a GIF has 256 colours
    assert np.abs(tile[:, 6:] - one[1][0, 3]).max() <= 8
