"""Checkpoints in a bucket: everything that they are on a disk, with no renames and no appending.

The bucket is `fake_gcs`, which gcsfs, TensorStore and google-cloud-storage take for Google's by variables of theirs.
"""

import csv
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fake_gcs import FakeGCS

from diffjax.starting import imported_params
from diffjax.training.averages import Power
from diffjax.training.checkpoints import Checkpoints, abstract
from diffjax.training.disk import CannotWrite
from diffjax.training.loop import train
from diffjax.training.places import half_written, place_of, steps_in
from diffjax.training.snapshots import Snapshots
from diffjax.workdir import check_same_run, write_config

# Where Orbax fails to read it leaves tasks behind, whose errors asyncio reports once more when they are collected.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
RUN = 'gs://bucket/runs/a'
DIGITS = '--config=configs/digits.py:smoke'


@pytest.fixture(scope='module')
def server():
    with FakeGCS('bucket') as gcs, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.variables.items():
            patch.setenv(name, value)
        yield gcs


@pytest.fixture
def gcs(server):
    server.objects.clear()
    server.changes.clear()
    server.refuse = None
    yield server
    assert server.unknown == []


@pytest.fixture
def folder(gcs):
    return place_of('', RUN) / 'checkpoints'


@pytest.fixture
def state():
    return {'kernel': jnp.arange(512.0).reshape(16, 32), 'step': jnp.int32(7)}


class Iterator:
    """One that has a place to save, and nothing to give."""

    def __init__(self):
        self.place = {'next': 0}

    def get_state(self):
        return self.place

    def set_state(self, place):
        self.place = place


def scaled(state, step):
    return jax.tree.map(lambda a: a * step, state)


def saved(folder, state, *steps, keep=3):
    """The steps saved, each with the state times its number."""
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, scaled(state, step), Iterator(), {})
    checkpoints.close()


def restored(folder, state, iterator=None):
    """(the step that is restored, whether its state is the one that was saved)."""
    checkpoints = Checkpoints(folder)
    got = checkpoints.restore_newest(abstract(state, jax.tree.map(lambda a: a.sharding, state)), iterator)
    checkpoints.close()
    wanted = scaled(state, got.step)
    return got.step, all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(wanted)))


def arrays(gcs, step):
    """The objects of a step that hold its arrays, the largest first."""
    names = [name for name in gcs.names(f'bucket/runs/a/checkpoints/{step}/state/') if '/d/' in name]
    return sorted(names, key=lambda name: -len(gcs.objects[name].data))


def rows(workdir):
    """metrics.csv without the column that depends on the clock."""
    with open(workdir / 'metrics.csv', newline='') as file:
        return [{key: value for key, value in row.items() if key != 'steps_per_second'} for row in csv.DictReader(file)]


def test_a_run_goes_on_from_a_bucket_without_its_disk(gcs, trainer, stream, tmp_path, bits):
    """Stopped, its workdir lost, it ends in the same bytes; old checkpoints go, and snapshots lie beside them."""
    settings = {'ema': {'narrow': Power(sigma_rel=0.05), 'wide': Power(sigma_rel=0.1)}, 'ema_snapshot_every_steps': 5}
    whole = train(trainer(10, **settings), stream(), tmp_path / 'whole', announce=lambda text: None)
    settings |= {'checkpoints': RUN, 'keep_checkpoints': 2}
    train(trainer(5, **settings), stream(), tmp_path / 'lost', announce=lambda text: None)
    said = []
    result = train(trainer(10, **settings), stream(), tmp_path / 'fresh', announce=said.append)

    assert 'going on from checkpoint 5' in said and bits(result.state) == bits(whole.state)
    assert sorted(steps_in(place_of('', RUN) / 'checkpoints')) == [8, 10]
    assert {name.split('/')[4] for name in gcs.names('bucket/runs/a/checkpoints/')} == {'8', '10'}  # nothing is left
    assert sorted(path.name for path in (tmp_path / 'fresh').iterdir()) == ['metrics.csv', 'tensorboard']
    assert [row['step'] for row in rows(tmp_path / 'fresh')] == ['10']  # those before went with the disk
    assert rows(tmp_path / 'fresh') == rows(tmp_path / 'whole')[1:]

    snapshots = Snapshots(place_of('', RUN) / 'ema_snapshots')
    shapes = abstract(whole.state.params, jax.tree.map(lambda a: a.sharding, whole.state.params))
    assert snapshots.steps == [5, 10]
    assert bits(snapshots.restore(10, 'wide', shapes)) == bits(whole.state.ema['wide'])
    snapshots.close()


def test_killed_at_any_request_a_save_leaves_a_whole_checkpoint(gcs, folder, state):
    """The bucket after each single change of a save that also drops the checkpoint before the last."""
    saved(folder, state, 1, 2, keep=2)
    before, begun = dict(gcs.objects), len(gcs.changes)
    saved(folder, state, 3, keep=2)
    changes, seen = gcs.changes[begun:], []
    for number in range(len(changes) + 1):
        gcs.objects = dict(before)
        for name, made in changes[:number]:
            if made is None:
                del gcs.objects[name]
            else:
                gcs.objects[name] = made
        steps = sorted(steps_in(folder))
        if not seen or steps != seen[-1]:
            seen.append(steps)
            assert restored(folder, state) == (steps[-1], True)
    assert len(changes) > 20 and seen == [[1, 2], [1, 2, 3], [2, 3]]


def test_what_a_killed_save_has_left_is_swept_by_who_trains(gcs, folder, state):
    saved(folder, state, 1, 2)
    gcs.delete('bucket/runs/a/checkpoints/2/commit_success.txt')  # what is written last
    assert [path.name for path in half_written(folder)] == ['2'] and steps_in(folder) == [1]
    assert restored(folder, state) == (1, True)
    assert gcs.names('bucket/runs/a/checkpoints/2/')
    assert restored(folder, state, Iterator()) == (1, True)
    assert not gcs.names('bucket/runs/a/checkpoints/2/') and gcs.names('bucket/runs/a/checkpoints/1/')


def test_a_flipped_byte_is_noticed(gcs, folder, state, caplog):
    saved(folder, state, 1, 2)
    name = arrays(gcs, 2)[0]
    data = bytearray(gcs.objects[name].data)
    data[len(data) // 2] ^= 0x10
    gcs.put(name, bytes(data))
    with caplog.at_level(logging.WARNING, 'diffjax'):
        assert restored(folder, state, Iterator()) == (1, True)
    (line,) = [record.message for record in caplog.records if record.name == 'diffjax']
    assert line.startswith('checkpoint 2 is damaged') and line.endswith('going on from checkpoint 1')
    assert steps_in(folder) == [1]


def test_what_cannot_be_read_now_is_not_damaged(gcs, folder, state):
    """Refused, or out of reach: the run ends, and nothing is deleted."""
    saved(folder, state, 1, 2)
    before = dict(gcs.objects)
    gcs.refuse = lambda method, address: method == 'GET' and '/2/state/' in address and 'alt=media' in address
    with pytest.raises(RuntimeError, match=rf'{RUN}/checkpoints/2 cannot be read now: (permission denied|forbidden)'):
        restored(folder, state, Iterator())
    assert gcs.objects == before
    gcs.refuse = None
    assert restored(folder, state, Iterator()) == (2, True)


@pytest.mark.parametrize('what', ['/state/', '/check/'])
def test_a_bucket_that_refuses_is_told_in_one_line(gcs, folder, state, what):
    """Arrays are written by TensorStore, the rest by gcsfs; what was whole stays."""
    saved(folder, state, 1)
    gcs.refuse = lambda method, address: method == 'POST' and f'/2{what}' in address
    with pytest.raises(CannotWrite) as caught:
        saved(folder, state, 2)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f'the checkpoint of step 2 could not be written to {folder} (') and 'free there' not in line
    assert line.endswith('the last good checkpoint is step 1: put that right and run the command again')
    gcs.refuse = None
    assert restored(folder, state, Iterator()) == (1, True)
    saved(folder, state, 2)
    assert restored(folder, state) == (2, True)


def put_copy(gcs, workdir):
    for path in workdir.rglob('*'):
        if path.is_file():
            gcs.put(f'bucket/runs/a/{path.relative_to(workdir)}', path.read_bytes())


def test_a_copy_from_a_disk_is_whole(gcs, folder, state, tmp_path):
    """And is not swept for half written."""
    saved(tmp_path / 'checkpoints', state, 1, 2)
    put_copy(gcs, tmp_path)
    assert restored(folder, state, Iterator()) == (2, True) and sorted(steps_in(folder)) == [1, 2]


def test_the_command_finds_its_checkpoints_in_a_bucket(gcs, command, trained, tmp_path):
    """In fresh workdirs: the samples are those of the run on its disk."""
    put_copy(gcs, trained)
    place = DIGITS, f'--config.training.checkpoints={RUN}'
    for name, words in {'disk': (f'--workdir={trained}',), 'bucket': (*place, f'--workdir={tmp_path}/a')}.items():
        options = '--mode=sample', '--num_samples=8', '--config.sampler.num_steps=2', f'--out={tmp_path}/{name}'
        code, out, err = command(*words, *options)
        assert code == 0 and '8 samples at step 4' in out, err
    drawn = [np.load(tmp_path / f'{name}.npz')['arr_0'] for name in ('disk', 'bucket')]
    np.testing.assert_array_equal(drawn[1], drawn[0])

    code, out, err = command(*place, f'--workdir={tmp_path}/b', '--config.evaluation.num_samples=0')
    assert code == 0 and 'all 4 steps have been trained before' in out, err
    assert not (tmp_path / 'b' / 'checkpoints').exists() and (tmp_path / 'b' / 'config.json').exists()


BAD = {
    'a workdir in a bucket': (['--workdir=gs://bucket/x'], ['a folder of this machine', 'training.checkpoints=gs://']),
    'a scheme that was not tried': (['--config.training.checkpoints=s3://bucket/x'], ["got 's3://bucket/x'", 'gs://']),
    'no bucket in it': (['--config.training.checkpoints=gs:///x'], ["got 'gs:///x'", 'gs://BUCKET/FOLDER']),
    'no such bucket': (['--config.training.checkpoints=gs://other/x'], ['gs://other', 'is not there']),
    'another network': ([f'--config.training.checkpoints={RUN}', '--config.network.depth=1'], ['network.depth', RUN]),
    'a file': (['--config.training.checkpoints=setup.py'], ['setup.py is no folder']),
}


@pytest.mark.parametrize('kind', BAD)
def test_places_that_cannot_be(gcs, command, refused, config, tmp_path, kind):
    write_config(tmp_path / 'first', config | {'training': config['training'] | {'checkpoints': RUN}})
    before, (words, fragments) = dict(gcs.objects), BAD[kind]
    for mode in ('train', 'sample'):
        refused(lambda mode=mode: command(DIGITS, f'--workdir={tmp_path}/x', f'--mode={mode}', *words), *fragments)
    assert gcs.objects == before


def test_checkpoints_of_nobody_are_refused(gcs, folder, state, config, tmp_path):
    """Without the config beside them nothing says what they are; and a run does not begin anew where it has none."""
    here = config | {'training': config['training'] | {'checkpoints': RUN}}
    saved(folder, state, 1)
    with pytest.raises(ValueError, match=f'{RUN} holds checkpoints and no config.json'):
        check_same_run(tmp_path, here)
    write_config(tmp_path, here)
    check_same_run(tmp_path, here)
    assert epath.Path(f'{RUN}/config.json').exists()
    (tmp_path / 'metrics.csv').write_text('step,loss\n1,0.5\n')
    elsewhere = config | {'training': config['training'] | {'checkpoints': 'gs://bucket/runs/b'}}
    with pytest.raises(ValueError, match=f'checkpoints are in {RUN}, and gs://bucket/runs/b has none'):
        check_same_run(tmp_path, elsewhere)
    with pytest.raises(ValueError, match=f'checkpoints are in {RUN}, and {tmp_path} has none'):
        check_same_run(tmp_path, config)


def test_what_reads_buckets_may_be_missing(gcs, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"needs gcsfs: pip install 'diffjax\[gcs\]'"):
        place_of('', RUN)


def test_a_half_written_first_checkpoint_is_no_beginning(gcs, folder, state):
    """Imported weights are where the run starts until a checkpoint is whole."""

    class Imported(Exception):
        pass

    def imports():
        raise Imported

    training = SimpleNamespace(init_from='weights', checkpoints=RUN)
    experiment = SimpleNamespace(training=training, trainer=imports)
    saved(folder, state, 1)
    assert imported_params({}, experiment, 'workdir') is None
    gcs.delete('bucket/runs/a/checkpoints/1/commit_success.txt')
    with pytest.raises(Imported):
        imported_params({}, experiment, 'workdir')


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/somebody')
    found = [str(place_of('run', given)) for given in ('', 'elsewhere', '~/runs', 'gs://bucket/a')]
    assert found == [f'{tmp_path}/run', f'{tmp_path}/elsewhere', '/home/somebody/runs', 'gs://bucket/a']
