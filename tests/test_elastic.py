"""A run goes on wherever it finds itself: on fewer devices, other meshes, in other processes it learns the same."""

import csv
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax.build import build
from diffjax.data import make_iterator
from diffjax.restoring import restore_params
from diffjax.results import held_out_loss
from diffjax.run import drawing
from diffjax.training.loop import train
from diffjax.training.sharding import make_mesh

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
SLOWNESS = float(os.environ.get('DIFFJAX_TESTS_SLOWNESS', 3))  # how much longer than an idle machine this one may take

# Inside this process: meshes over some of its eight devices -----------------------------------------------------------

AXES = ('data', 'fsdp', 'tensor')
STEPS, SAVED = 6, 3
MOVES = {  # where a run is saved, and where it goes on
    'eight to one': ((8, 1, 1), (1, 1, 1)),
    'eight to four': ((2, 4, 1), (2, 2, 1)),
    'eight to two': ((2, 2, 2), (1, 1, 2)),
    'another mesh': ((2, 4, 1), (2, 2, 2)),
}


def mesh_of(shape):
    sizes = {name: size for name, size in zip(AXES, shape) if size > 1 or name != 'tensor'}
    devices = np.array(jax.devices()[: np.prod(shape)])
    return jax.sharding.Mesh(devices.reshape(list(sizes.values())), tuple(sizes))


@pytest.fixture(scope='module')
def experiment_on(get_config):
    """shape -> the smallest digits experiment, built for a mesh of this shape."""
    config = get_config('digits', 'smoke').to_dict()
    config['network'] |= {'depth': 1, 'scan_layers': True, 'num_heads': 2}
    config['training'] |= {'num_steps': STEPS, 'log_every_steps': 1, 'checkpoint_every_steps': SAVED}
    config['sampler'] |= {'num_steps': 2, 'batch_size': 16}
    config['evaluation'] |= {'noise_levels': 1}

    def make(shape):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('diffjax.build.make_mesh', lambda data=-1, fsdp=1: mesh_of(shape))
            return build(config)

    return make


class Recorded:
    """An iterator that notes a digest of each batch it gives, by its place in the stream."""

    def __init__(self, iterator):
        self._iterator, self.seen = iterator, {}

    def __next__(self):
        place = json.dumps(self._iterator.get_state(), default=str)
        batch = next(self._iterator)
        self.seen[place] = hashlib.sha256(b''.join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        return batch

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, state):
        self._iterator.set_state(state)


def run_on(experiment, workdir, until):
    """Trains up to a step: {place: digest of its batch}."""
    experiment = replace(experiment, training=replace(experiment.training, num_steps=until))
    training = experiment.training
    batches = Recorded(make_iterator(experiment.source, batch_size=training.batch_size, seed=experiment.seed))
    assert train(experiment.trainer(), batches, workdir, announce=lambda text: None).step == until
    return batches.seen


def losses(workdir):
    with open(workdir / 'metrics.csv', newline='') as file:
        return {int(row['step']): float(row['loss']) for row in csv.DictReader(file)}


@pytest.fixture(scope='module')
def alone(experiment_on, tmp_path_factory):
    """(the experiment on one device, its workdir, its batches), trained without a break."""
    experiment, workdir = experiment_on((1, 1, 1)), tmp_path_factory.mktemp('alone')
    return experiment, workdir, run_on(experiment, workdir, STEPS)


@pytest.fixture(scope='module')
def saved(experiment_on, tmp_path_factory):
    """shape -> (a workdir that is trained half way on it, its batches)."""
    made = {}

    def make(shape):
        if shape not in made:
            workdir = tmp_path_factory.mktemp('saved')
            made[shape] = workdir, run_on(experiment_on(shape), workdir, SAVED)
        return made[shape]

    return make


def close(one, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol), one, other)


@pytest.mark.parametrize('move', MOVES)
def test_it_goes_on_on_another_mesh(move, experiment_on, alone, saved, tmp_path):
    """The same batches in the same order, each once; the same losses, and the same parameters and averages."""
    before, after = MOVES[move]
    workdir, batches = tmp_path / 'run', saved(before)[1]
    shutil.copytree(saved(before)[0], workdir)
    experiment = experiment_on(after)
    batches = batches | run_on(experiment, workdir, STEPS)
    assert batches == alone[2] and len(batches) == STEPS
    one, other = losses(alone[1]), losses(workdir)
    assert list(one) == list(other) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=2e-4)
    for name in ('', 'raw'):
        sampler = replace(experiment.sampler, params=name)
        ends = [
            restore_params(replace(each, sampler=sampler), folder)
            for each, folder in ((experiment, workdir), (alone[0], alone[1]))
        ]
        assert [step for _, step in ends] == [STEPS, STEPS]
        close(ends[0][0], ends[1][0], 1e-3)


def test_it_is_sampled_and_measured_on_another_mesh(experiment_on, alone):
    """What one device has saved, by eight that share parameters, heads and examples."""
    labels, results = np.arange(16) % 10, []
    for experiment in (alone[0], experiment_on((2, 2, 2))):
        params, step = restore_params(experiment, alone[1])
        assert step == STEPS
        results.append((drawing(experiment)(params, labels, seed=0), held_out_loss(experiment, params)))
    ((one, loss), (other, its_loss)) = results
    np.testing.assert_allclose(other, one, atol=1e-3)
    assert np.std(one) > 0.1
    np.testing.assert_allclose([row['loss'] for row in its_loss], [row['loss'] for row in loss], rtol=1e-4)


# By config ------------------------------------------------------------------------------------------------------------


def test_the_section_mesh(config, changed):
    experiment = build(changed(config, 'mesh', {'data': 2, 'tensor': 2, 'fsdp': -1}))
    assert dict(experiment.mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
    rules = [['.*qkv/kernel', [None, 'tensor']]]
    experiment = build(changed(config, 'mesh', {'data': 4, 'tensor': 2, 'rules': rules}))
    assert experiment.rules == experiment.trainer().rules == (('.*qkv/kernel', (None, 'tensor')),)
    shardings = experiment.trainer().init(experiment.batch_spec)[2]
    found = {
        jax.tree_util.keystr(path): sharding.spec for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }
    specs = {spec for path, spec in found.items() if path.endswith("['qkv']['kernel']")}
    assert len(specs) == 1 and 'tensor' in specs.pop()
    assert dict(build(changed(config, 'mesh', {})).mesh.shape) == {'data': 8, 'fsdp': 1}


@pytest.mark.parametrize(
    'mesh, message',
    [
        ({'tensor': 3}, 'mesh.tensor = 3 does not divide the 8 devices of a process'),
        ({'tensor': 4, 'sequence': 4}, 'mesh.tensor = 4 does not divide the 8 devices of a process'),
        ({'data': 3, 'tensor': 2}, 'mesh.data = 3 times mesh.fsdp = 1 times mesh.tensor = 2 does not cover the 8'),
        ({'tensor': 8}, 'mesh.tensor = 8 does not divide the 4 heads of the network'),
        ({'tensor': 0}, 'mesh.tensor'),
        ({'tensr': 2}, "mesh: unknown key 'tensr'.*did you mean tensor"),
        ({'rules': [('.*', ('rows',))]}, "unknown axis 'rows'"),
        ({'rules': [('nowhere', ('fsdp',))]}, "mesh.rules: 'nowhere' matches no parameter"),
        ({'rules': 'tensor'}, 'mesh.rules are pairs'),
    ],
)
def test_mistakes_in_the_section_mesh(config, changed, mesh, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(changed(config, 'mesh', mesh))
    assert '\n' not in str(caught.value)


def test_the_axes_of_a_mesh():
    assert dict(make_mesh(tensor=4).shape) == {'data': 2, 'fsdp': 1, 'tensor': 4}
    mesh = make_mesh(fsdp=2, sequence=2, tensor=2)
    assert dict(mesh.shape) == {'data': 1, 'fsdp': 2, 'sequence': 2, 'tensor': 2}
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids[0, 0, 0].tolist() == [0, 1]  # those that talk most are neighbours


# In processes of their own --------------------------------------------------------------------------------------------

DIGITS = f'--config={ROOT}/configs/digits.py:smoke'
LAST, KEPT = 20, 16
OPTIONS = (
    f'--config.training.num_steps={LAST}',
    '--config.training.log_every_steps=4',
    '--config.training.checkpoint_every_steps=8',
    '--config.evaluation.num_samples=20',
    '--config.evaluation.noise_levels=1',
    '--config.network.depth=1',
)


def start(workdir, num_devices, *options):
    flags = f'--xla_force_host_platform_device_count={num_devices}'
    environment = os.environ | {'XLA_FLAGS': flags, 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}
    words = [sys.executable, '-m', 'diffjax.main', DIGITS, f'--workdir={workdir}', *OPTIONS, *options]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    said = [process.communicate(timeout=80 * SLOWNESS) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said[0][1][-3000:]
    return said[0][0]


def test_two_processes_of_four_devices_train_as_one_device_and_two_go_on(tmp_path):
    """Parameters are split across both processes; then the run goes on from its last but one checkpoint."""
    one, two, fewer = (tmp_path / name for name in ('one', 'two', 'fewer'))
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    shared = (f'--coordinator=localhost:{port}', '--num_processes=2', '--config.mesh.fsdp=8')
    out = finish(*[start(two, 4, *shared, f'--process_id={i}') for i in range(2)])
    assert 'device: 8 x cpu' in out and 'mesh: data 1 x fsdp 8' in out and 'class accuracy' in out
    finish(start(one, 1))

    shutil.copytree(two, fewer)
    shutil.rmtree(fewer / 'checkpoints' / str(LAST))
    (fewer / 'figures.json').unlink()
    out = finish(start(fewer, 2, '--config.mesh.fsdp=2'))
    assert 'device: 2 x cpu' in out and f'going on from checkpoint {KEPT}' in out

    wanted, figures = losses(one), json.loads((one / 'figures.json').read_text())
    for workdir in (two, fewer):
        assert list(losses(workdir)) == list(wanted) == list(range(4, LAST + 1, 4))
        np.testing.assert_allclose(list(losses(workdir).values()), list(wanted.values()), rtol=1e-3)
        found = json.loads((workdir / 'figures.json').read_text())
        assert (found['step'], found['num_samples']) == (LAST, 20)
        assert found['frechet_distance'] == pytest.approx(figures['frechet_distance'], rel=0.02)
        images = [np.load(folder / 'samples.npz')['arr_0'].astype(int) for folder in (one, workdir)]
        assert np.abs(images[0] - images[1]).mean() < 0.5  # of 255
