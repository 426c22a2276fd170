"""The command line: every mistake in one line, and real processes that are killed, stopped, or two."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax import main as program
from diffjax.command import FLAGS, parse
from diffjax.training.loop import NonFiniteError, Trainer

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
DIGITS = f'--config={ROOT}/configs/digits.py:smoke'


@pytest.fixture
def command(monkeypatch, capsys):
    """(*words) -> (exit code, stdout, stderr) of the command, run inside this process on eight devices."""

    def run(*words):
        for name in [name for name in FLAGS if name.partition('.')[0] == 'config']:
            delattr(FLAGS, name)
        for name in ('workdir', 'mode', 'labels', 'num_samples', 'seed', 'out', 'coordinator'):
            FLAGS[name].unparse()
        FLAGS.unparse_flags()
        monkeypatch.setattr(sys, 'argv', ['diffjax.main', *words])  # where ml_collections looks for overrides
        capsys.readouterr()
        try:
            program.main(parse(sys.argv))
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    monkeypatch.chdir(ROOT)
    filtering = jax.config.jax_traceback_filtering
    yield run
    jax.config.update('jax_traceback_filtering', filtering)


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, **kwargs):
        raise AssertionError('it began to train')

    monkeypatch.setattr('diffjax.training.loop.train', train)
    monkeypatch.setattr(Trainer, 'step', train)


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in Path(folder).rglob('*')
        if path.is_file()
    }


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
            "--config.training.batchsize: unknown key 'batchsize'",
            'did you mean batch_size?',
            'valid in config.training',
        ],
    ),
    ([DIGITS, '--workdir=W', '--config.seed.x=1'], ["unknown key 'x'", 'nothing, it is a value']),
    ([DIGITS, '--workdir=W', '--config.training.num_steps=many'], ['num_steps', 'many']),
    ([DIGITS, '--workdr=W'], ["Unknown command line flag 'workdr'", 'workdir']),
    ([DIGITS, '--workdir=W', '--mode=dance'], ['dance', 'train', 'sample', 'evaluate']),
    ([DIGITS, '--workdir=W', 'extra'], ['stray words on the command line: extra']),
    ([DIGITS, '--workdir=W', '--config.schedule=cosin'], ["schedule: unknown name 'cosin'", 'did you mean Cosine?']),
    ([DIGITS, '--workdir=W', '--config.sampler.solver=ddim:etta=1'], ["unknown key 'etta'", 'valid: eta']),
    ([DIGITS, '--workdir=W', '--config.network.name=ResNet'], ["network: unknown name 'ResNet'", 'DiT, UNet']),
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
def test_a_workdir_of_another_run_is_left_alone(command, no_training, trained, option, fragments):
    before = snapshot(trained)
    for mode in ('train', 'sample', 'evaluate'):
        code, _, err = command(DIGITS, f'--workdir={trained}', f'--config.{option}', f'--mode={mode}')
        (line,) = err.strip().splitlines()
        assert code == 2 and line.startswith(f'error: {trained} holds another run: ')
        assert all(fragment in line for fragment in fragments)
    assert snapshot(trained) == before


def test_mistakes_in_sampling(command, trained):
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
    assert stored['images'].shape == (5, 8, 8, 1) and stored['images'].dtype == np.uint8
    assert stored['labels'].tolist() == [7, 3, 7, 3, 7]

    def again(*more):
        code, out, _ = command(*words, f'--out={tmp_path}/x', *more)
        assert code == 0 and f'{tmp_path}/x.png' in out
        return np.load(tmp_path / 'x.npz')['images']

    same = again('--config.sampler.solver=ddim:eta=0.5', '--config.sampler.num_steps=4')
    np.testing.assert_array_equal(same, stored['images'])
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


# Real processes, one device each.

STEPS = 40
OPTIONS = (
    f'--config.training.num_steps={STEPS}',
    '--config.training.log_every_steps=5',
    '--config.training.checkpoint_every_steps=7',
    '--config.evaluation.num_samples=20',
    '--config.evaluation.noise_levels=1',
    '--config.network.depth=1',
)


def start(workdir, *options):
    environment = os.environ | {'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}
    words = [sys.executable, '-m', 'diffjax.main', DIGITS, f'--workdir={workdir}', *OPTIONS, *options]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out, err


def rows(workdir):
    """{step: row} of metrics.csv as it stands there, without the column that depends on the clock."""
    with open(Path(workdir) / 'metrics.csv', newline='') as file:
        found = list(csv.DictReader(file))
    assert len({row['step'] for row in found}) == len(found)
    return {int(row['step']): {k: v for k, v in row.items() if k != 'steps_per_second'} for row in found}


def final_state(workdir):
    """{path: bytes} of the last checkpoint, read by Orbax alone."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(Path(workdir).absolute() / 'checkpoints') as manager:
        assert manager.latest_step() == STEPS
        state = manager.restore(STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state

    def read(leaf):
        is_key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return {jax.tree_util.keystr(path): read(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def same(one, other):
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that nobody disturbed: (workdir, what it said)."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    return workdir, finish(start(workdir))


def test_the_command_leaves_a_whole_run(whole, command, no_training):
    """And the same command again says that there is nothing to do."""
    workdir, (out, err) = whole
    for text in ('device: 1 x cpu', 'mesh: data 1 x fsdp 1', 'parameters: ', 'FLOPs per step', 'class accuracy'):
        assert text in out
    assert 'ETA' in err and f'step {STEPS}/{STEPS}' in err
    names = {path.name for path in workdir.iterdir()}
    assert {
        'checkpoints',
        'tensorboard',
        'metrics.csv',
        'config.json',
        'samples.png',
        'samples.npz',
        'report.md',
    } <= names
    assert list(rows(workdir)) == list(range(5, STEPS + 1, 5))
    assert sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir()) == [28, 35, 40]
    stored = np.load(workdir / 'samples.npz')
    assert stored['images'].shape == (20, 8, 8, 1) and np.bincount(stored['labels']).tolist() == [2] * 10

    before = snapshot(workdir)
    code, out, _ = command(DIGITS, f'--workdir={workdir}', *OPTIONS)
    assert code == 0 and f'{workdir} is finished ({STEPS} steps), nothing was trained again' in out
    assert snapshot(workdir) == before


def wait_for(process, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, 'it never came to that'
        time.sleep(0.001)
    return True


def names_in(folder):
    return [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []


def test_killed_at_any_moment_it_ends_the_same(whole, tmp_path):
    """While a checkpoint is written, and at random moments: the same command goes on each time."""
    workdir, seed = tmp_path / 'run', random.randrange(10**6)
    print('seed of the moments:', seed)
    rng = random.Random(seed)
    checkpoints = workdir / 'checkpoints'

    def writing(above):
        """Whether a checkpoint of a step above this one is under way."""
        return lambda: any('tmp' in name and int(name.split('.')[0]) > above for name in names_in(checkpoints))

    def reached(step):
        return lambda: (workdir / 'metrics.csv').exists() and f'\n{step},' in (workdir / 'metrics.csv').read_text()

    killed = 0
    for moment, delay in (
        (writing(0), 0.0),
        (reached(20), rng.uniform(0, 0.1)),
        (writing(21), rng.uniform(0, 0.03)),
        (lambda: True, rng.uniform(0.5, 4.0)),
    ):
        process = start(workdir)
        alive = wait_for(process, moment)
        time.sleep(delay)
        killed += alive and process.poll() is None
        process.kill()
        process.communicate()
    assert killed >= 3
    finish(start(workdir))
    assert rows(workdir) == rows(whole[0])
    assert same(final_state(workdir), final_state(whole[0]))
    np.testing.assert_array_equal(*(np.load(folder / 'samples.npz')['images'] for folder in (workdir, whole[0])))


def test_sigterm_saves_and_exits_with_zero(whole, tmp_path):
    workdir = tmp_path / 'run'
    process = start(workdir)
    assert wait_for(
        process, lambda: (workdir / 'metrics.csv').exists() and '\n5,' in (workdir / 'metrics.csv').read_text()
    )
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process)
    assert 'stopped by SIGTERM at step ' in out
    step = int(out.split('stopped by SIGTERM at step ')[1].split(',')[0])
    assert str(step) in names_in(workdir / 'checkpoints')
    out, _ = finish(start(workdir))
    assert f'going on from checkpoint {step}' in out
    assert rows(workdir) == rows(whole[0]) and same(final_state(workdir), final_state(whole[0]))


def test_two_processes_train_as_one(whole, tmp_path):
    """Parameters split across both processes; stopped together by a signal to one of them, and gone on."""
    workdir = tmp_path / 'run'

    def pair():
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = free.getsockname()[1]
        options = (f'--coordinator=localhost:{port}', '--num_processes=2', '--config.mesh.fsdp=2')
        return [start(workdir, *options, f'--process_id={i}') for i in range(2)]

    first = pair()
    assert wait_for(
        first[0], lambda: (workdir / 'metrics.csv').exists() and '\n5,' in (workdir / 'metrics.csv').read_text()
    )
    first[1].send_signal(signal.SIGTERM)
    (out, _), (silent, quiet) = [finish(process) for process in first]
    step = int(out.split('stopped by SIGTERM at step ')[1].split(',')[0])
    assert step % 5 == 0 and str(step) in names_in(workdir / 'checkpoints')  # they ask each other at rows
    assert 'device: 2 x cpu' in out and 'mesh: data 1 x fsdp 2' in out
    assert 'step ' not in silent and 'step ' not in quiet  # the second process writes nothing

    (out, _), (silent, _) = [finish(process) for process in pair()]
    assert f'going on from checkpoint {step}' in out and 'class accuracy' in out
    one, two = rows(whole[0]), rows(workdir)
    assert list(one) == list(two)
    for row in one:
        np.testing.assert_allclose(float(two[row]['loss']), float(one[row]['loss']), rtol=1e-3)
    assert len(list((workdir / 'tensorboard').iterdir())) == 2  # one file for each start
    assert np.load(workdir / 'samples.npz')['images'].shape == (20, 8, 8, 1)
    assert json.loads((workdir / 'figures.json').read_text())['step'] == STEPS
