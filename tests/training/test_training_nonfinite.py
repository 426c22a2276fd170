"""What is not finite: kept and told, skipped and counted, and made again."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.data import Prefetched
from diffjax.tasks import Task
from diffjax.training import nonfinite
from diffjax.training.loop import NonFiniteError, train
from diffjax.training.nonfinite import keep_batch, read_kept
from diffjax.training.replay import replay, unclean
from diffjax.training.sharding import batch_sharding


def spoil(*steps):
    """NaN in three values of the batches of these steps."""

    def change(index, batch):
        if index + 1 not in steps:
            return batch
        x = batch['x'].copy()
        x[5, :3] = np.nan
        return {**batch, 'x': x}

    return change


def rows(workdir):
    lines = [line.split(',') for line in (Path(workdir) / 'metrics.csv').read_text().splitlines()]
    return {int(line[0]): dict(zip(lines[0], line)) for line in lines[1:]}


def quiet(text):
    del text


# Checkpoints after steps 4, 8, ...; looks after steps 4, 5, 8, 10, ...
@pytest.mark.parametrize('at, checkpoint', [(1, 0), (4, 0), (5, 4), (7, 4), (10, 8)])
@pytest.mark.parametrize('mesh', [(1, 1), (4, 2)])
def test_the_batch_is_kept(trainer, stream, tmp_path, batch_of, at, checkpoint, mesh):
    """The very batch of the step, read again behind the loop's back, from the host's arrays and from the mesh's."""
    run = trainer(20, mesh=mesh)
    batches = stream(spoil(at)) if mesh == (1, 1) else Prefetched(stream(spoil(at)), batch_sharding(run.mesh))
    with pytest.raises(NonFiniteError, match=f'at step {at}; .*; its batch is kept in .*{at:08d}-0000.npz: see '):
        train(run, batches, tmp_path, announce=quiet)
    kept = read_kept(tmp_path)
    wanted = spoil(at)(at - 1, batch_of(at - 1))
    assert (kept.step, kept.seed, kept.checkpoint) == (at, 3, checkpoint)
    assert set(kept.names) == {'loss', 'grad_norm', 'param_norm'}
    assert kept.batch.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(kept.batch[name], array)
    assert unclean(kept.batch) == ['x: 3 of 1,024, the first at [5, 0]']


def test_a_dataset_that_fails_again_hides_nothing(trainer, stream, tmp_path):
    """The step is named whatever happens to its batch."""
    reads = []

    def change(index, batch):
        reads.append(index)
        if index == 6 and reads.count(6) > 1:
            raise OSError('the network is gone')
        return spoil(7)(index, batch)

    with pytest.raises(NonFiniteError, match='at step 7; .* step 4; its batch could not be kept .*the network is gone'):
        train(trainer(20), stream(change), tmp_path, announce=quiet)


def test_parts_of_several_processes_are_one_batch(tmp_path, monkeypatch):
    whole = {'image': np.arange(24, dtype=np.uint8).reshape(6, 4), 'label': np.arange(6, dtype=np.int32)}
    monkeypatch.setattr(nonfinite.jax, 'process_count', lambda: 3)
    for process in (2, 0, 1):
        monkeypatch.setattr(nonfinite.jax, 'process_index', lambda process=process: process)
        if process == 1:
            with pytest.raises(FileNotFoundError, match='2 processes of 3 at step 12'):
                read_kept(tmp_path, 12)
        part = {name: array[2 * process : 2 * process + 2] for name, array in whole.items()}
        keep_batch(tmp_path, 12, part, seed=1, checkpoint=8, names=['loss'])
    kept = read_kept(tmp_path)
    for name, array in whole.items():
        assert kept.batch[name].dtype == array.dtype
        np.testing.assert_array_equal(kept.batch[name], array)
    with pytest.raises(FileNotFoundError, match='keeps no batch of step 13, only of 12'):
        read_kept(tmp_path, 13)
    with pytest.raises(FileNotFoundError, match='keeps no batch, nor of any other'):
        read_kept(tmp_path / 'other')


@pytest.mark.parametrize('mesh', [(1, 1), (4, 2)])
def test_a_skipped_step_leaves_everything_as_it_was(trainer, stream, tmp_path, bits, batch_of, caplog, mesh):
    """Parameters, averages, moments and the count of examples: those of the other steps alone, to the bit."""
    run = trainer(12, mesh=mesh, on_nan='skip')
    result = train(run, stream(spoil(7, 9)), tmp_path, announce=quiet)

    plain = trainer(12, mesh=mesh)
    make, _, shardings = plain.init(batch_of(0))
    state, step, losses = make(), plain.step(shardings), {}
    for n in range(12):
        if n + 1 in (7, 9):
            state = state._replace(step=state.step + 1)
            continue
        state, metrics = step(state, (), batch_of(n))
        losses[n + 1] = float(metrics['loss'])
    assert bits(result.state) == bits(state)

    found = rows(tmp_path)
    assert {n: row['skipped'] for n, row in found.items()} == {5: '0', 10: '2', 12: '0'}
    for end, part in ((5, range(1, 6)), (10, (6, 8, 10)), (12, (11, 12))):
        np.testing.assert_allclose(float(found[end]['loss']), np.mean([losses[n] for n in part]), rtol=1e-6)
    assert 'not finite, and skipped: step 7' in caplog.text and 'skipped: step 9' in caplog.text
    assert not (tmp_path / 'nonfinite').exists()


def test_stop_adds_nothing_to_the_program(trainer, batch):
    """`stop` is free: the compiled step looks at no value; `skip` looks at its metrics."""
    texts = {}
    for on_nan in ('stop', 'skip'):
        run = trainer(9, on_nan=on_nan)
        make, _, shardings = run.init(batch)
        texts[on_nan] = run.step(shardings).lower(jax.eval_shape(make), (), batch).as_text()
    assert 'is_finite' not in texts['stop'] and 'is_finite' in texts['skip']


def test_too_many_skipped_in_a_row_stop_the_run(trainer, stream, tmp_path, batch_of):
    settings = {'on_nan': 'skip', 'max_skipped_in_a_row': 2}
    result = train(trainer(12, **settings), stream(spoil(6, 7, 9, 10)), tmp_path / 'two', announce=quiet)
    assert result.step == 12
    with pytest.raises(NonFiniteError, match='at step 8, after 2 skipped ones in a row; .* step 4; its batch is kept'):
        train(trainer(12, **settings), stream(spoil(6, 7, 8)), tmp_path / 'three', announce=quiet)
    np.testing.assert_array_equal(read_kept(tmp_path / 'three').batch['y'], batch_of(7)['y'])


def test_skipped_steps_are_counted_across_a_resume(trainer, stream, tmp_path):
    settings = {'on_nan': 'skip', 'max_skipped_in_a_row': 2}
    bad = spoil(3, 4, 5)
    assert train(trainer(4, **settings), stream(bad), tmp_path, announce=quiet).step == 4
    with pytest.raises(NonFiniteError, match='at step 5, after 2 skipped ones in a row; .* step 4'):
        train(trainer(12, **settings), stream(bad), tmp_path, announce=quiet)


def test_a_stopped_run_goes_on_by_skipping(trainer, stream, tmp_path, bits):
    """The same workdir, whose rows so far have no such column; a row without any finite step says so."""
    whole = train(trainer(12, on_nan='skip'), stream(spoil(*range(6, 11))), tmp_path / 'whole', announce=quiet)
    with pytest.raises(NonFiniteError):
        train(trainer(12), stream(spoil(*range(6, 11))), tmp_path / 'parts', announce=quiet)
    assert 'skipped' not in (tmp_path / 'parts' / 'metrics.csv').read_text()
    result = train(trainer(12, on_nan='skip'), stream(spoil(*range(6, 11))), tmp_path / 'parts', announce=quiet)
    assert bits(result.state) == bits(whole.state)
    found = rows(tmp_path / 'parts')
    assert {n: row['skipped'] for n, row in found.items()} in ({5: '', 10: '5', 12: '0'}, {5: '0', 10: '5', 12: '0'})
    assert found[10]['loss'] == 'nan' and np.isfinite(float(found[12]['loss']))


@dataclass(frozen=True)
class Edge(Task):
    """w grows by 1 at each step of rate 1 and is 5 before step 6, where the square root has no value."""

    def init(self, key, batch):
        return {'w': jnp.zeros(())}, ()

    def loss(self, params, task_state, frozen, batch, step, keys):
        return -params['w'] + 0 * _root(4.5 - params['w']) + 0 * batch['x'].sum(), ((), {})


def _root(value):
    return jnp.sqrt(value)  # here


def edge(trainer):
    return trainer(20, task=Edge(), optimizer=optax.sgd(1.0))


def test_a_replay_finds_the_operation(trainer, stream, tmp_path, snapshot):
    """The state is the one that failed: the checkpoint of step 4, where w = 4, is still within the root's domain."""
    with pytest.raises(NonFiniteError, match='at step 6'):
        train(edge(trainer), stream(), tmp_path, announce=quiet)
    before, said = snapshot(tmp_path), []
    found = replay(edge(trainer), stream(), tmp_path, announce=said.append)
    assert found.step == 6 and set(found.names) == {'loss', 'grad_norm', 'param_norm'}
    assert (found.batch, found.before, found.after) == ([], [], ['w: 1 of 1, the first at []'])
    assert found.origins[0].operation == 'sqrt' and found.origins[0].value == 'nan'
    assert 'jnp.sqrt(value)  # here' in found.origins[0].frames[-1]
    text = '\n'.join(said)
    for part in ('from checkpoint 4 by 1 steps', 'the first nan comes out of sqrt', 'the batch: finite'):
        assert part in text
    assert 'is not what the dataset has there' not in text and snapshot(tmp_path) == before

    jumped = replay(edge(trainer), stream(), tmp_path, jump=True, announce=quiet)
    assert jumped.names == [] and jumped.origins == []


def test_a_replay_uses_the_batch_that_was_kept(trainer, stream, tmp_path):
    """And says where the dataset gives another one now, as it does after a fault of the memory or the disk."""
    with pytest.raises(NonFiniteError, match='at step 3'):
        train(trainer(20), stream(spoil(3)), tmp_path, announce=quiet)
    said = []
    found = replay(trainer(20), stream(), tmp_path, announce=said.append)
    assert found.batch == ['x: 3 of 1,024, the first at [5, 0]'] and 'loss' in found.names
    assert 'x of the batch is not what the dataset has there' in '\n'.join(said)
    assert 'from the start by 2 steps' in said[1]


def test_what_is_kept_names_no_code(tmp_path):
    """An archive of plain arrays and one JSON text."""
    path = keep_batch(tmp_path, 1, {'x': np.ones(2)}, seed=0, checkpoint=0, names=['loss'])
    with np.load(path, allow_pickle=False) as stored:
        assert set(stored) == {'about', 'batch/x'}
        assert json.loads(str(stored['about']))['names'] == ['loss']
