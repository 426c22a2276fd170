"""The command line: every mistake in one line, and samples and figures of a trained run."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax.training.loop import NonFiniteError

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
DIGITS = f'--config={ROOT}/configs/digits.py:smoke'


MISTAKES = [
    ([DIGITS], ['--workdir is needed']),
    (['--workdir=W'], ['--config is needed, such as --config=configs/digits.py']),
    (['--config=configs/digitz.py', '--workdir=W'], ['--config=configs/digitz.py: there is no such file']),
    (['--config=configs/digits.py:smok', '--workdir=W'], ['takes the argument smoke', "got 'smok'"]),
    (['--config=configs/dit_b.py:model=Q/2', '--workdir=W'], ['model=S|B|L|XL', "got 'model=Q/2'"]),
    ([DIGITS, '--workdir=W', '--config.sead=1'], ["unknown key 'sead'", 'did you mean seed?', 'valid in config: ']),
    (
        [DIGITS, '--workdir=W', '--config.training.batchsize=32'],
        [
            "training: unknown key 'batchsize'",
            'did you mean batch_size?',
            'valid: num_steps, batch_size',
        ],
    ),
    ([DIGITS, '--workdir=W', '--config.seed.x=1'], ["unknown key 'x'", 'nothing, it is a value']),
    ([DIGITS, '--workdir=W', '--config.training.num_steps=many'], ['num_steps', 'many']),
    ([DIGITS, '--workdr=W'], ["Unknown command line flag 'workdr'", 'workdir']),
    ([DIGITS, '--workdir=W', '--mode=dance'], ['dance', 'train', 'sample', 'evaluate']),
    ([DIGITS, '--workdir=W', 'extra'], ['stray words on the command line: extra']),
    ([DIGITS, '--workdir=W', '--config.schedule=cosin'], ["schedule: unknown name 'cosin'", 'did you mean Cosine?']),
    ([DIGITS, '--workdir=W', '--config.sampler.solver=ddim:etta=1'], ["unknown key 'etta'", 'valid: eta']),
    (
        [DIGITS, '--workdir=W', '--config.network.hiden_size=8'],
        ["unknown key 'hiden_size'", 'did you mean hidden_size?'],
    ),
    ([DIGITS, '--workdir=W', '--config.network.qk_norm=l2'], ["qk_norm='l2' is not known"]),  # not named in the file
    ([DIGITS, '--workdir=W', '--config.network.num_heads.x=1'], ["unknown key 'x'"]),
    ([DIGITS, '--workdir=W', '--config.network.name=ResNet'], ["network: unknown name 'ResNet'", 'valid: DiT, ']),
    ([DIGITS, '--workdir=W', '--config.network.patch_size=3'], ['multiples of patch_size=3, got 8x8']),
    ([DIGITS, '--workdir=W', '--config.training.batch_size=20'], ['8 devices', '16 or 24 would']),
    ([DIGITS, '--workdir=W', '--config.mesh.fsdp=3'], ['mesh.fsdp = 3 does not cover the 8 devices here']),
    ([DIGITS, '--workdir=W', '--config.dataset.split=all'], ["no split 'all'", "['test', 'train']"]),
    (
        ['--config=configs/dit_b.py', '--workdir=W'],
        [
            "The dataset 'imagenet256_latents' is not prepared",
            'python -m diffjax.data prepare imagenet256_latents --manual_dir=DIR',
            '--config=configs/dit_b.py:smoke',
        ],
    ),
    (
        ['--config=configs/cifar10_unet.py', '--workdir=W'],
        ["'cifar10' is not prepared", 'diffjax.data prepare cifar10', '--config=configs/cifar10_unet.py:smoke'],
    ),
    (['--mode=sample', '--workdir=W'], ['W holds no run: there is no config.json in it']),
    ([DIGITS, '--mode=sample', '--workdir=W'], ['W holds no checkpoint yet: train it first']),
    ([DIGITS, '--mode=evaluate', '--workdir=W'], ['W holds no checkpoint yet: train it first']),
    ([DIGITS, '--mode=ema', '--workdir=W'], ['--sigma_rel is one relative width or several with commas', "got ''"]),
    (
        [DIGITS, '--mode=ema', '--workdir=W', '--sigma_rel=0.08'],
        ['W holds no snapshots of averages', 'power:sigma_rel=0.05 and power:sigma_rel=0.10'],
    ),
    (
        [DIGITS, '--workdir=W', '--config.sampler.params=ema/0.08'],
        ['sampler.params=ema/0.08 is made by --mode=ema after training'],
    ),
    (
        [DIGITS.replace('digits.py', 'edm2.py'), '--workdir=W', '--config.training.ema.wide=power:sigma_rel=0.4'],
        ["training.ema.wide 'power': sigma_rel lies in (0, 0.2887]", 'got 0.4'],
    ),
    (
        [DIGITS.replace('digits.py', 'edm2.py'), '--workdir=W', '--config.training.ema.wide=powr'],
        ["training.ema.wide: unknown name 'powr'", 'did you mean Power?'],
    ),
]


@pytest.mark.parametrize('words, fragments', MISTAKES, ids=[' '.join(words[:4]) for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(command, no_training, tmp_path, words, fragments):
    workdir = tmp_path / 'run'
    code, out, err = command(*[word.replace('=W', f'={workdir}') for word in words])
    assert code == 2 and 'compiled' not in out
    (line,) = err.strip().splitlines()
    assert line.startswith('error: ')
    for fragment in fragments:
        assert fragment.replace('W holds', f'{workdir} holds') in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    'option, fragments',
    [
        ('network.depth=3', ['network.depth is 2 there and 3 here']),
        ('network.hidden_size=64', ['network.hidden_size is 32 there and 64 here']),
        ('seed=1', ['seed is 0 there and 1 here']),
        ('schedule=cosine', ["schedule is 'flow' there and 'cosine' here"]),
        ('training.ema.ema=0.5', ['training.ema.ema is 0.999 there and 0.5 here']),
    ],
)
def test_a_workdir_of_another_run_is_left_alone(command, no_training, trained, option, fragments, snapshot):
    before = snapshot(trained)
    for mode in ('train', 'sample', 'evaluate'):
        code, _, err = command(DIGITS, f'--workdir={trained}', f'--config.{option}', f'--mode={mode}')
        (line,) = err.strip().splitlines()
        assert code == 2 and line.startswith(f'error: {trained} holds another run: ')
        assert all(fragment in line for fragment in fragments)
    assert snapshot(trained) == before


def test_mistakes_in_sampling(command, trained, snapshot):
    before = snapshot(trained)
    for words, fragment in (
        (['--labels=3,x'], "--labels are whole numbers with commas between them, got '3,x'"),
        (['--labels=3,12'], 'labels are whole numbers from 0 to 9; got [3, 12]'),
        (['--num_samples=0'], 'num_samples'),
        (['--config.sampler.solver=hein'], "unknown name 'hein'"),
        (['--config.sampler.guidence=2'], 'did you mean guidance?'),
        (['--config.sampler.params=emma'], "sampler.params is 'raw' or one of ema"),
    ):
        code, _, err = command('--mode=sample', f'--workdir={trained}', *words)
        (line,) = err.strip().splitlines()
        assert code == 2 and fragment in line
    assert snapshot(trained) == before


def test_what_is_not_the_users_mistake_keeps_its_traceback(command, monkeypatch, trained):
    """A ValueError of a library called by diffjax is no message of ours. JAX hides its own frames from tracebacks."""
    names = {'__name__': 'diffjax.results', 'add': jax.vmap(jax.numpy.add), 'np': np}
    exec('def finished(workdir, num_steps):\n    return add(np.zeros(3), np.zeros(4))', names)
    monkeypatch.setattr('diffjax.results.finished', names['finished'])
    with pytest.raises(ValueError, match='inconsistent sizes'):
        command(DIGITS, f'--workdir={trained}')


def test_nan_is_told_in_one_line(command, monkeypatch, tmp_path):
    names = {'__name__': 'diffjax.training.loop', 'NonFiniteError': NonFiniteError}
    exec("def train(*args, **kwargs):\n    raise NonFiniteError('loss became NaN or infinite at step 7; ...')", names)
    monkeypatch.setattr('diffjax.training.loop.train', names['train'])
    code, _, err = command(DIGITS, f'--workdir={tmp_path}/run')
    assert (code, err) == (2, 'error: loss became NaN or infinite at step 7; ...\n')


def test_sample_writes_png_and_npz(command, trained, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained, workdir)
    words = ['--mode=sample', f'--workdir={workdir}', '--labels=7,3', '--num_samples=5', '--seed=3']
    assert command(*words, '--config.sampler.solver=ddim:eta=0.5', '--config.sampler.num_steps=4')[0] == 0
    (archive,) = (workdir / 'samples').glob('*.npz')
    (picture,) = (workdir / 'samples').glob('*.png')
    assert archive.name == 'ddim-eta=0_5-4steps-uniform-w1-seed3.npz' and archive.stem == picture.stem
    assert picture.read_bytes()[:4] == b'\x89PNG'
    stored = np.load(archive)
    assert stored['arr_0'].shape == (5, 8, 8, 1) and stored['arr_0'].dtype == np.uint8
    assert stored['labels'].tolist() == [7, 3, 7, 3, 7]

    def again(*more):
        code, out, _ = command(*words, f'--out={tmp_path}/x', *more)
        assert code == 0 and f'{tmp_path}/x.png' in out
        return np.load(tmp_path / 'x.npz')['arr_0']

    same = again('--config.sampler.solver=ddim:eta=0.5', '--config.sampler.num_steps=4')
    np.testing.assert_array_equal(same, stored['arr_0'])
    assert (again('--config.sampler.num_steps=4') != same).any()
    assert (again('--config.sampler.guidance=3.0', '--config.sampler.negative_label=1') != same).any()
    clipped = again('--config.sampler.threshold=0.25')  # of [-1, 1]
    assert 95 <= clipped.min() <= clipped.max() <= 160
    code, _, _ = command('--mode=sample', f'--workdir={workdir}', f'--out={tmp_path}/default')
    assert code == 0
    assert np.bincount(np.load(tmp_path / 'default.npz')['labels']).tolist() == [10] * 10
    assert json.loads((workdir / 'config.json').read_text())['sampler']['guidance'] == 1.0  # not changed by sampling


def test_evaluate_measures_again(command, trained, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained, workdir)
    words = ['--mode=evaluate', f'--workdir={workdir}', '--num_samples=12', '--seed=4']
    options = '--config.evaluation.noise_levels=2', '--config.sampler.num_steps=2'
    code, out, _ = command(*words, *options, '--config.evaluation.num_likelihoods=3')
    assert (
        code == 0
        and 'bits per dimension of held-out images' in out
        and 'class accuracy' in out
        and f'report: {workdir}/report.md' in out
    )
    figures = json.loads((workdir / 'figures.json').read_text())
    assert (figures['num_samples'], figures['seed'], figures['step']) == (12, 4, 4)
    assert figures['evaluations_per_sample'] == 3
    assert figures['num_likelihoods'] == 3 and 0 < figures['bits_per_dimension'] < 20
    assert '| bits per dimension | **' in (workdir / 'report.md').read_text()


def test_no_samples_are_not_measured(command, trained, snapshot):
    before = snapshot(trained)
    code, _, err = command('--mode=evaluate', f'--workdir={trained}', '--config.evaluation.num_samples=0')
    assert code == 2 and 'error: evaluation.num_samples = 0: ' in err and snapshot(trained) == before


def test_averages_of_other_lengths(command, tmp_path):
    """From training to samples: the command makes them from snapshots, and says what to call them."""
    (tmp_path / 'powers.py').write_text(
        f"""import runpy
def get_config():
    config = runpy.run_path('{ROOT}/configs/digits.py')['get_config']('smoke')
    config.training.ema = {{'narrow': 'power:sigma_rel=0.05', 'wide': 'power:sigma_rel=0.1'}}
    config.training.ema_snapshot_every_steps, config.network.depth, config.evaluation.num_samples = 2, 1, 0
    return config
"""
    )
    workdir = f'--workdir={tmp_path}/run'
    code, _, err = command(f'--config={tmp_path}/powers.py', workdir)
    assert code == 0, err
    code, _, err = command('--mode=sample', workdir, '--config.sampler.params=ema/0.08')
    (line,) = err.strip().splitlines()
    assert code == 2 and 'holds no ema/0.08: it has none; make it with --mode=ema' in line
    code, out, _ = command('--mode=ema', workdir, '--sigma_rel=0.08,0.05')
    told = [line for line in out.splitlines() if 'sampler.params' in line]
    assert code == 0 and len(told) == 2 and told[0].endswith('--config.sampler.params=ema/0.08/4')
    images = {}
    for params in ('ema/0.05', 'narrow', 'wide'):
        options = f'--config.sampler.params={params}', '--config.sampler.num_steps=2', '--num_samples=8'
        code, out, _ = command('--mode=sample', workdir, *options, f'--out={tmp_path}/x')
        assert code == 0 and '8 samples at step 4' in out
        images[params] = np.load(tmp_path / 'x.npz')['arr_0']
    np.testing.assert_array_equal(images['ema/0.05'], images['narrow'])  # which was tracked
    assert (images['wide'] != images['narrow']).any()
    code, _, err = command('--mode=ema', workdir, '--sigma_rel=0.08', '--step=1')
    assert code == 2 and 'there is no whole snapshot up to step 1' in err
