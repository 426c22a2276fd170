"""A command that dies while it draws samples: the next one draws what is missing, and the whole is the same."""

import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import diffjax
from diffjax import run as running
from diffjax.build import build
from diffjax.core.solvers.plan_records import PlanRecord, describe
from diffjax.kept_samples import Kept, digest_of
from diffjax.plan_files import write_plan
from diffjax.run import in_batches, keep_samples

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
SLOWNESS = float(os.environ.get('DIFFJAX_TESTS_SLOWNESS', 3))  # how much longer than an idle machine this one may take

# Batches on disk ------------------------------------------------------------------------------------------------------

MADE_BY = digest_of({'seed': 0})
SAMPLE = jax.ShapeDtypeStruct((2, 3), np.uint8)
LABELS = np.arange(10, dtype=np.int32)
WHOLE = np.repeat(LABELS, 6).reshape(10, 2, 3).astype(np.uint8) * 7


class Drawn:
    """Draws 7 times the label, three at once, and notes where each batch starts; dies before the one at `until`."""

    def __init__(self, until=99):
        self.starts, self.until = [], until

    def __call__(self, labels, start):
        if start == self.until:
            raise KeyboardInterrupt
        self.starts.append(int(start))
        return np.repeat(labels, 6).reshape(-1, 2, 3).astype(np.float32) * 7

    def all(self, kept, **how):
        return in_batches(self, LABELS, 3, finish=lambda x: x.astype(np.uint8), kept=kept, **how)


def open_kept(folder, made_by=MADE_BY):
    return Kept(folder, made_by, SAMPLE)


@pytest.fixture
def folder(tmp_path):
    """Three batches of four, as a process leaves them that dies before the last one."""
    with pytest.raises(KeyboardInterrupt):
        Drawn(until=9).all(open_kept(tmp_path / 'a.parts'))
    return tmp_path / 'a.parts'


def names(folder):
    return sorted(path.name[:8] for path in folder.iterdir())


def test_the_rest_is_drawn(folder, capsys, caplog):
    """And the bar starts there."""
    assert names(folder) == ['00000000', '00000003', '00000006']
    drawn, kept = Drawn(), open_kept(folder)
    assert kept.num_samples == 9 and 'going on after 9 samples that were drawn before' in caplog.text
    assert drawn.all(kept, progress=True).tobytes() == WHOLE.tobytes() and drawn.starts == [9]
    shown = capsys.readouterr().err
    assert '| 9/10' in shown and '| 10/10' in shown and '| 0/10' not in shown
    assert names(folder) == ['00000000', '00000003', '00000006', '00000009']

    drawn = Drawn()
    assert drawn.all(open_kept(folder)).tobytes() == WHOLE.tobytes() and drawn.starts == []
    (folder / 'of_another_kind.npy').write_bytes(b'')
    kept.clear()
    assert [path.name for path in folder.iterdir()] == ['of_another_kind.npy']
    (folder / 'of_another_kind.npy').unlink()
    kept.clear()
    assert not folder.exists()
    kept.clear()


def test_nothing_is_kept_where_nobody_asks(tmp_path):
    assert Drawn().all(None).tobytes() == WHOLE.tobytes() and not list(tmp_path.iterdir())


def test_batches_of_another_making_are_not_mixed(folder, caplog):
    other = open_kept(folder, digest_of({'seed': 1}))
    assert other.num_samples == 0 and not list(folder.iterdir())
    drawn = Drawn()
    assert drawn.all(other).tobytes() == WHOLE.tobytes() and drawn.starts == [0, 3, 6, 9]
    assert not caplog.records


def test_other_batches_are_drawn_again(folder):
    """Of five and not of three: those that were kept begin elsewhere, or are too short."""
    drawn = Drawn()
    whole = in_batches(drawn, LABELS, 5, finish=lambda x: x.astype(np.uint8), kept=open_kept(folder))
    assert whole.tobytes() == WHOLE.tobytes() and drawn.starts == [0, 5]


def forged(path, samples):
    """A batch under the name that its bytes ask for."""
    data = io.BytesIO()
    np.save(data, samples)
    path.unlink()
    name = f'{path.name[:25]}-{zlib.crc32(data.getvalue()):08x}.npy'
    path.with_name(name).write_bytes(data.getvalue())


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    'truncated': (lambda path: path.write_bytes(path.read_bytes()[:-4]), 'its bytes are not those'),
    'empty': (lambda path: path.write_bytes(b''), 'its bytes are not those'),
    'a flipped bit': (flip, 'its bytes are not those'),
    'another type': (lambda path: forged(path, WHOLE[3:6].astype(np.float32)), 'it holds float32 [3, 2, 3]'),
    'another shape': (lambda path: forged(path, WHOLE[3:6, :1]), 'it holds uint8 [3, 1, 3]'),
    'objects': (lambda path: forged(path, np.array([{}, {}, {}])), 'allow_pickle=False'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_batch_is_drawn_again(folder, caplog, kind):
    damage, said = DAMAGE[kind]
    damage(next(folder.glob('00000003-*')))
    drawn, kept = Drawn(), open_kept(folder)
    (warning,) = [record for record in caplog.records if ' is damaged (' in record.message]
    assert str(folder / '00000003-') in warning.message and warning.levelno == logging.WARNING
    assert said in warning.message
    assert drawn.all(kept).tobytes() == WHOLE.tobytes() and drawn.starts == [3, 9]
    assert open_kept(folder).num_samples == 10


def test_half_a_batch_does_not_count(folder):
    """A process has died while it wrote it."""
    path = next(folder.glob('00000006-*'))
    path.rename(path.with_suffix('.part'))
    drawn = Drawn()
    assert drawn.all(open_kept(folder)).tobytes() == WHOLE.tobytes() and drawn.starts == [6, 9]
    assert not list(folder.glob('*.part'))


def test_a_full_disk_ends_the_keeping_and_not_the_run(folder, caplog, limit_files):
    """Its room is given back, for the whole; the samples are the same."""
    kept = open_kept(folder)
    assert kept.take(0, 3) is not None and kept.take(6, 3) is not None  # two are missing
    caplog.clear()
    limit_files(100)
    samples = Drawn().all(kept)
    limit_files()
    assert samples.tobytes() == WHOLE.tobytes() and not folder.exists()
    (warning,) = caplog.records
    assert f'samples cannot be kept in {folder} while they are drawn (file too large)' in warning.message
    (folder.parent / 'a_file').write_text('')
    assert Drawn().all(open_kept(folder.parent / 'a_file' / 'x.parts')).tobytes() == WHOLE.tobytes()


# What they are made by ------------------------------------------------------------------------------------------------


def test_the_digest_tells_values_apart():
    """Also those that look alike; and not the same in another order."""
    table = {'a': np.float32(1), 'b': [1, None], 'c': np.zeros((2, 3), np.float32)}
    assert digest_of(table) == digest_of(dict(reversed(table.items())))
    for key, value in {'a': np.float32(1).view(np.int32), 'b': [1, 0], 'c': np.zeros((3, 2), np.float32)}.items():
        assert digest_of(table | {key: value}) != digest_of(table)
    changed = np.zeros((2, 3), np.float32)
    changed[1, 2] = -0.0
    assert digest_of(table | {'c': changed}) != digest_of(table)
    with pytest.raises(TypeError, match='no digest of <object'):
        digest_of({'a': object()})


@pytest.fixture(scope='module')
def loaded(trained):
    return diffjax.load(trained, overrides={'sampler': {'batch_size': 8, 'num_steps': 2}})


def test_what_is_kept_is_tied_to_all_that_samples_depend_on(loaded, changed, tmp_path):
    labels, config, plain = np.arange(20) % 10, loaded.config, loaded.experiment
    made = np.zeros((8, 8, 8, 1), np.uint8)

    def found(experiment=plain, params=loaded.params, labels=labels, seed=3):
        """Whether a batch counts here that was kept by the plain experiment."""
        keep_samples(plain, loaded.params, np.arange(20) % 10, 3, tmp_path / 'x').keep(8, made)
        kept = keep_samples(experiment, params, labels, seed, tmp_path / 'x')
        there = kept.take(8, 8)
        assert there is None or there.tobytes() == made.tobytes()
        return there is not None

    def other(key, value):
        return build(changed(config, key, value))

    assert found() and found(build(config))
    assert found(other('evaluation.noise_levels', 3)) and found(other('training.num_steps', 7))
    assert not found(seed=4)
    assert not found(labels=labels[::-1]) and not found(labels=labels[:17])
    leaves, tree = jax.tree.flatten(loaded.params)
    assert not found(params=jax.tree.unflatten(tree, [leaves[0] * 1.001, *leaves[1:]]))
    assert not found(other('sampler.num_steps', 3)) and not found(other('sampler.guidance', 2.0))
    assert not found(other('sampler.threshold', 0.5)) and not found(other('sampler.batch_size', 16))
    assert not found(other('target', 'v')) and not found(other('network.attention', 'xla'))
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    params = jax.tree.map(np.asarray, loaded.params)
    assert not found(replace(plain, mesh=one), params=params)
    assert keep_samples(plain, loaded.params, labels[:8], 3, tmp_path / 'x') is None  # one batch


def test_a_plan_counts_by_what_stands_in_its_file(loaded, changed, tmp_path):
    """And not by its name alone."""
    path = tmp_path / 'plan.json'

    def kept():
        experiment = build(changed(loaded.config, 'sampler.solver', str(path)))
        return keep_samples(experiment, loaded.params, np.arange(20) % 10, 0, tmp_path / 'x')

    for num_steps in (2, 3):
        plan = loaded.experiment.plan(replace(loaded.experiment.sampler, num_steps=num_steps))
        write_plan(path, PlanRecord(plan, describe(loaded.schedule), 'ddim', 'uniform', {}))
        assert kept().num_samples == 0
        kept().keep(8, np.zeros((8, 8, 8, 1), np.uint8))
        assert kept().num_samples == 8


# Commands that are killed ---------------------------------------------------------------------------------------------

# The command, which dies as by SIGKILL when it has kept, or half kept, the batch at sys.argv[1].
DIES = """
import os, pathlib, signal, sys
from absl import app
from diffjax import kept_samples, main
from diffjax.command import parse

what, at = sys.argv.pop(1).split(':')
keep, replace = kept_samples.Kept.keep, pathlib.Path.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def kept(self, first, samples):
    keep(self, first, samples)
    if what == 'after' and first == int(at):
        die()

def replaced(self, target):
    if what == 'within' and self.name.startswith(f'{int(at):08d}-'):
        die()
    return replace(self, target)

kept_samples.Kept.keep, pathlib.Path.replace = kept, replaced
app.run(main.main, flags_parser=parse)
"""
OPTIONS = '--config.sampler.num_steps=2', '--config.sampler.batch_size=8', '--config.evaluation.noise_levels=1'


def killed(place, *words):
    """Runs the command until it dies there."""
    environment = os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}
    command = [sys.executable, '-c', DIES, place, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=80 * SLOWNESS)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


@pytest.fixture
def starts(monkeypatch):
    """Where the batches start that this process draws."""
    found, whole = [], running.in_batches

    def noted(draw, *args, **how):
        return whole(lambda labels, start: found.append(int(start)) or draw(labels, start), *args, **how)

    monkeypatch.setattr(running, 'in_batches', noted)
    return found


def test_the_end_of_a_run_is_killed_and_goes_on(command, starts, trained, tmp_path, monkeypatch):
    """The final evaluation: killed after a batch, then after the drawing, it ends as one that nobody disturbed."""
    monkeypatch.setattr('diffjax.results.held_out_loss', lambda *args: [])  # takes longer than the rest
    folders = [tmp_path / 'whole', tmp_path / 'killed']
    for folder in folders:
        shutil.copytree(trained, folder)
    words = ['--config=configs/digits.py:smoke', *OPTIONS, '--config.evaluation.num_samples=30']
    code, _, err = command(*words, f'--workdir={folders[0]}')
    assert code == 0 and 'going on' not in err and starts == [0, 0, 8, 16, 24]  # the first one compiles
    assert not (folders[0] / 'samples.parts').exists()

    workdir = f'--workdir={folders[1]}'
    killed('after:8', *words, workdir)
    parts = folders[1] / 'samples.parts'
    assert names(parts) == ['00000000', '00000008'] and not (folders[1] / 'samples.npz').exists()
    starts.clear()
    with pytest.MonkeyPatch.context() as patch:  # and once more, when all are drawn and none is measured
        patch.setattr('diffjax.results.image_figures', lambda *args, **how: sys.exit(9))
        code, _, err = command(*words, workdir)
    assert code == 9 and starts == [0, 16, 24] and names(parts) == ['00000000', '00000008', '00000016', '00000024']
    starts.clear()
    code, out, err = command(*words, workdir)
    assert code == 0 and starts == [] and not parts.exists() and ' s per sample' not in out

    one, other = ((folder / 'samples.npz').read_bytes() for folder in folders)
    assert one == other
    figures = [json.loads((folder / 'figures.json').read_text()) for folder in folders]
    assert figures[0].pop('seconds_per_sample') > 0 and figures[0] == figures[1]


def test_sampling_is_killed_within_a_batch_and_goes_on(command, starts, trained, tmp_path):
    """--mode=sample; another sampler in between begins anew."""
    workdir = tmp_path / 'run'
    shutil.copytree(trained, workdir)
    words = ['--mode=sample', f'--workdir={workdir}', '--num_samples=30', *OPTIONS]
    assert command(*words, f'--out={tmp_path}/whole')[0] == 0 and starts == [0, 8, 16, 24]
    parts = tmp_path / 'x.parts'
    killed('within:16', *words, f'--out={tmp_path}/x')
    assert names(parts) == ['00000000', '00000008', '00000016'] and len(list(parts.glob('*.part'))) == 1
    starts.clear()
    code, _, err = command(*words, f'--out={tmp_path}/x')
    assert code == 0 and starts == [16, 24] and not parts.exists()
    assert (tmp_path / 'x.npz').read_bytes() == (tmp_path / 'whole.npz').read_bytes()

    killed('after:8', *words, f'--out={tmp_path}/x')
    starts.clear()
    other = f'--out={tmp_path}/x', '--config.sampler.guidance=2.0'
    assert command(*words, *other)[0] == 0 and starts == [0, 8, 16, 24]
    guided = np.load(tmp_path / 'x.npz')['arr_0']
    assert command(*words, other[1], f'--out={tmp_path}/y')[0] == 0
    np.testing.assert_array_equal(guided, np.load(tmp_path / 'y.npz')['arr_0'])


# Several processes ----------------------------------------------------------------------------------------------------

# Process 1 sees another folder, which is empty: it has what process 0 reads.
TOGETHER = """
import sys
from pathlib import Path
import jax, numpy as np
from diffjax.kept_samples import Kept
from diffjax.plan_files import write_plan
from diffjax.run import in_batches
from diffjax.training import processes

processes.MOST_BYTES = 11
processes.connect(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]), 60)
kept, starts = Kept(Path(sys.argv[3]), sys.argv[4], jax.ShapeDtypeStruct((2, 3), np.uint8)), []

def draw(labels, start):
    starts.append(int(start))
    return np.repeat(labels, 6).reshape(-1, 2, 3).astype(np.uint8) * 7

samples = in_batches(draw, np.arange(10), 3, kept=kept)
print(kept.num_samples, starts, samples.tobytes().hex())
"""


def test_two_processes_go_on_alike(folder, tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    places, environment = (folder, tmp_path / 'elsewhere'), os.environ | {'XLA_FLAGS': ''}
    pair = [
        subprocess.Popen(
            [sys.executable, '-c', TOGETHER, str(port), str(i), str(place), MADE_BY],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, place in enumerate(places)
    ]
    for process in pair:
        out, err = process.communicate(timeout=60 * SLOWNESS)
        assert process.returncode == 0, err[-3000:]
        assert out.split('\n')[-2] == f'0 [9] {WHOLE.tobytes().hex()}'
    assert names(folder) == ['00000000', '00000003', '00000006', '00000009'] and not places[1].exists()
