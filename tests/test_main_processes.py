"""The command in real processes, one device each: whole runs, killed runs, stopped runs, and two processes as one."""

import csv
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_gcs import FakeGCS

from diffjax.evaluation.image_sets import open_images
from diffjax.evaluation.references import read_reference, reference_figures
from diffjax.evaluation.spaces import pixels
from diffjax.training.places import COMMITTED

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
DIGITS = f'--config={ROOT}/configs/digits.py:smoke'

SLOWNESS = float(os.environ.get('DIFFJAX_TESTS_SLOWNESS', 3))  # how much longer than an idle machine this one may take
STEPS = 40
OPTIONS = (
    f'--config.training.num_steps={STEPS}',
    '--config.training.log_every_steps=5',
    '--config.training.checkpoint_every_steps=7',
    '--config.evaluation.num_samples=20',
    '--config.evaluation.noise_levels=1',
    '--config.network.depth=1',
)


def start(workdir, *options, **variables):
    environment = os.environ | {'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true', **variables}
    words = [sys.executable, '-m', 'diffjax.main', DIGITS, f'--workdir={workdir}', *OPTIONS, *options]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=80 * SLOWNESS)
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


def test_the_command_leaves_a_whole_run(whole, command, no_training, snapshot):
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
    assert stored['arr_0'].shape == (20, 8, 8, 1) and np.bincount(stored['labels']).tolist() == [2] * 10

    before = snapshot(workdir)
    code, out, _ = command(DIGITS, f'--workdir={workdir}', *OPTIONS)
    assert code == 0 and f'{workdir} is finished ({STEPS} steps), nothing was trained again' in out
    assert snapshot(workdir) == before


def wait_for(process, condition):
    end = time.monotonic() + 40 * SLOWNESS
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
    np.testing.assert_array_equal(*(np.load(folder / 'samples.npz')['arr_0'] for folder in (workdir, whole[0])))


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


GRACE_SECONDS = 20  # between SIGTERM and SIGKILL, on an idle machine


def said(process, text):
    """Reads on until the process has said something."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'it never said {text!r}: {process.stderr.read()[-3000:]}')


def ends(process, code):
    """(stdout, stderr) of a process that has to end by itself now, in time."""
    out, err = process.communicate(timeout=GRACE_SECONDS * SLOWNESS)
    assert process.returncode == code, err[-3000:]
    return out, err


def test_sigterm_at_any_stage(whole, tmp_path):
    """While it compiles or measures a run ends at once, in a checkpoint after the save; nothing is lost."""
    workdir = tmp_path / 'run'
    checkpoints = workdir / 'checkpoints'
    process = start(workdir, JAX_ENABLE_COMPILATION_CACHE='false')
    said(process, 'FLOPs per step')  # what it says last before it compiles
    process.send_signal(signal.SIGTERM)
    ends(process, -signal.SIGTERM)
    assert not (workdir / 'metrics.csv').exists() and not names_in(checkpoints)

    process = start(workdir)
    assert wait_for(process, lambda: any('tmp' in name for name in names_in(checkpoints)))
    process.send_signal(signal.SIGTERM)
    out, _ = ends(process, 0)
    step = int(out.split('stopped by SIGTERM at step ')[1].split(',')[0])
    assert str(step) in names_in(checkpoints) and not any('tmp' in name for name in names_in(checkpoints))

    process = start(workdir)
    said(process, 'drawing and measuring')
    process.send_signal(signal.SIGTERM)
    ends(process, -signal.SIGTERM)
    assert not (workdir / 'figures.json').exists()

    out, _ = finish(start(workdir))
    assert f'all {STEPS} steps have been trained before' in out and (workdir / 'figures.json').exists()
    assert rows(workdir) == rows(whole[0]) and same(final_state(workdir), final_state(whole[0]))
    np.testing.assert_array_equal(*(np.load(folder / 'samples.npz')['arr_0'] for folder in (workdir, whole[0])))


def start_pair(workdirs, *options, **variables):
    """Two processes of one device each, over which parameters are split."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    options += (f'--coordinator=localhost:{port}', '--num_processes=2', '--config.mesh.fsdp=2')
    return [start(workdir, *options, f'--process_id={i}', **variables) for i, workdir in enumerate(workdirs)]


def first_row(workdir):
    return lambda: (workdir / 'metrics.csv').exists() and '\n5,' in (workdir / 'metrics.csv').read_text()


@pytest.mark.parametrize('dead', [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_dead_process_ends_the_others(tmp_path, dead):
    """In less than the time after which a silent one counts as dead, and with a word on why. 0 coordinates them."""
    workdir = tmp_path / 'run'
    pair = start_pair([workdir] * 2, '--config.training.num_steps=100000')
    assert wait_for(pair[0], first_row(workdir))
    pair[dead].kill()
    began, other = time.monotonic(), pair[1 - dead]
    try:
        _, err = other.communicate(timeout=60 + 30 * SLOWNESS)
    finally:
        other.kill()
        pair[dead].communicate()
    print(f'{time.monotonic() - began:.1f} s:', err[-3000:])
    assert other.returncode not in (0, -signal.SIGKILL)
    lost = f'error: process {1 - dead} of 2 has lost another, which died or cannot be reached'
    assert lost in err or 'another task died' in err  # our line, or the coordination service's


def test_two_processes_train_as_one(whole, tmp_path):
    """Parameters split across both processes; stopped together by a signal to one of them, and gone on."""
    workdir, reference = tmp_path / 'run', tmp_path / 'reference.npz'
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (25, 8, 8, 1), dtype=np.uint8))
    measured = f'--config.evaluation.reference={reference}'

    first = start_pair([workdir] * 2, measured)
    assert wait_for(first[0], first_row(workdir))
    first[1].send_signal(signal.SIGTERM)
    (out, _), (silent, quiet) = [finish(process) for process in first]
    step = int(out.split('stopped by SIGTERM at step ')[1].split(',')[0])
    assert str(step) in names_in(workdir / 'checkpoints')
    assert 'device: 2 x cpu' in out and 'mesh: data 1 x fsdp 2' in out
    assert 'step ' not in silent and 'step ' not in quiet  # the second process writes nothing

    (out, _), (silent, _) = [finish(process) for process in start_pair([workdir] * 2, measured)]
    assert f'going on from checkpoint {step}' in out and 'class accuracy' in out
    one, two = rows(whole[0]), rows(workdir)
    assert list(one) == list(two)
    for row in one:
        np.testing.assert_allclose(float(two[row]['loss']), float(one[row]['loss']), rtol=1e-3)
    assert len(list((workdir / 'tensorboard').iterdir())) == 2  # one file for each start
    figures = json.loads((workdir / 'figures.json').read_text())
    assert figures['step'] == STEPS and figures['num_samples'] == 20

    # Each process has measured half of the samples and half of the reference.
    alone = reference_figures(open_images(workdir / 'samples.npz'), read_reference(reference), pixels())
    for name in ('frechet_distance', 'precision', 'recall'):
        assert figures[name] == pytest.approx(alone[name], rel=1e-9)
    assert alone['frechet_distance'] > 1


def steps_of(gcs):
    """Those of the checkpoints in gs://bucket/run that are whole."""
    name = re.compile(r'bucket/run/checkpoints/(\d+)/' + COMMITTED)
    return sorted(int(found[1]) for found in map(name.fullmatch, gcs.names()) if found)


@pytest.mark.slow
def test_two_processes_with_a_disk_each_and_one_bucket(whole, tmp_path):
    """Machines that share no folder, as those of a pod do not. Both die, their disks are lost, and they go on."""
    with FakeGCS('bucket') as gcs:
        bucket = '--config.training.checkpoints=gs://bucket/run'
        first = start_pair([tmp_path / 'a', tmp_path / 'b'], bucket, **gcs.variables)
        assert wait_for(first[0], lambda: 14 in steps_of(gcs))
        for process in first:
            process.kill()
        for process in first:
            process.communicate()  # dead from here on
        assert steps_of(gcs) and max(steps_of(gcs)) < STEPS

        again = [tmp_path / 'c', tmp_path / 'd']
        (out, _), (silent, _) = [finish(process) for process in start_pair(again, bucket, **gcs.variables)]
        assert 'going on from checkpoint' in out and 'class accuracy' in out and 'step ' not in silent
        assert steps_of(gcs) == [28, 35, 40] and gcs.unknown == []
    one, two = rows(whole[0]), rows(again[0])
    assert two and two.keys() <= one.keys() and STEPS in two
    for row in two:
        np.testing.assert_allclose(float(two[row]['loss']), float(one[row]['loss']), rtol=1e-3)
    assert json.loads((again[0] / 'figures.json').read_text())['step'] == STEPS
    assert not (again[1] / 'samples.npz').exists() and not (again[1] / 'checkpoints').exists()
