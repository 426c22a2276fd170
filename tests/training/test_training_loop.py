"""The loop: what it says, where it stops, and what is there when it goes on."""

import os
import signal
import threading
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.tasks import Task
from diffjax.training.loop import NonFiniteError, Settings, train


def read(workdir):
    """metrics.csv as {step: {column: text}}, without the column that depends on the clock."""
    lines = [line.split(',') for line in (workdir / 'metrics.csv').read_text().splitlines()]
    rows = [dict(zip(lines[0], line)) for line in lines[1:]]
    assert len({row['step'] for row in rows}) == len(rows)
    return {int(row.pop('step')): {k: v for k, v in row.items() if k != 'steps_per_second'} for row in rows}


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def test_rows_are_means_and_checkpoints_come_on_time(trainer, stream, tmp_path, exact, capsys):
    """The logged loss is the mean of the closed-form losses of its steps."""
    said = []
    run = trainer(11, ema={})
    result = train(run, stream(), tmp_path, announce=said.append)
    assert (result.step, int(result.state.step), result.stopped) == (11, 11, False)
    assert steps_in(tmp_path) == [4, 8, 11]
    assert f'parameters: {2 * 64 * 32 + 32:,}   batch: 16   FLOPs per step: ' in said[0]
    forward = 2 * 16 * 64 * 32 + 2 * 16 * 32  # x W and noise . b; backward once more for W and b
    assert said[0].endswith(f'{2 * forward:.3g}')

    make, _, shardings = run.init(next(stream()))
    state, losses, iterator = make(), [], stream()
    step = run.step(shardings)
    for n in range(11):
        batch = next(iterator)
        keys = jax.random.split(jax.random.fold_in(state.key, n))[1]
        noise = np.stack([jax.random.normal(jax.random.fold_in(keys, i), (32,)) for i in range(16)])
        losses.append(exact(state.params, batch, noise)[0])
        state, _ = step(state, (), batch)
    rows = read(tmp_path)
    assert list(rows) == [5, 10, 11]
    for end, part in ((5, losses[:5]), (10, losses[5:10]), (11, losses[10:])):
        np.testing.assert_allclose(float(rows[end]['loss']), np.mean(part), rtol=1e-5)
    assert set(rows[5]) == {'loss', 'noise', 'grad_norm', 'param_norm'}
    assert 'step 10/11' in capsys.readouterr().err
    assert any(path.name.startswith('events') for path in (tmp_path / 'tensorboard').iterdir())


def test_a_finished_run_does_not_train(trainer, stream, tmp_path, bits, compiles):
    first = train(trainer(6), stream(), tmp_path, announce=lambda text: None)
    before = read(tmp_path)
    said = []
    with compiles() as names:
        again = train(trainer(6), stream(), tmp_path, announce=said.append)
    assert bits(again.state) == bits(first.state) and again.step == 6
    assert said == ['all 6 steps have been trained before'] and read(tmp_path) == before
    assert not any('train_step' in name for name in names)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason='signals reach the main thread')
@pytest.mark.parametrize('at', [5, 7, 8])  # at a row, between rows, at a checkpoint
def test_sigterm_saves_and_the_run_goes_on_the_same(trainer, stream, tmp_path, bits, before_step, at):
    """What has been measured since the last row survives: the row after the stop is the same mean."""
    whole = train(trainer(20), stream(), tmp_path / 'whole', announce=lambda text: None)
    handler = signal.getsignal(signal.SIGTERM)
    before_step(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = train(trainer(20), stream(), tmp_path / 'parts', announce=lambda text: None)
    assert stopped.stopped and stopped.step == at
    assert signal.getsignal(signal.SIGTERM) is handler
    assert steps_in(tmp_path / 'parts')[-1] == at

    said = []
    result = train(trainer(20), stream(), tmp_path / 'parts', announce=said.append)
    assert said[0] == f'going on from checkpoint {at}'
    assert not result.stopped and bits(result.state) == bits(whole.state)
    assert read(tmp_path / 'parts') == read(tmp_path / 'whole')


def test_the_host_is_never_far_ahead(trainer, stream, tmp_path, monkeypatch):
    """A save waits for all steps that have been started: at most eight, whatever stands between two rows."""
    waited = []
    monkeypatch.setattr(jax, 'block_until_ready', lambda tree: waited.append(tree[0]))
    train(trainer(20, log_every_steps=100, checkpoint_every_steps=100), stream(), tmp_path, announce=lambda text: None)
    assert waited == list(range(1, 13))  # before step n + 1 is started, step n - 8 is done


def test_other_threads_can_train(trainer, stream, tmp_path):
    """Where no signal handler can be set."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(trainer(2), stream(), tmp_path, announce=lambda text: None))
    )
    thread.start()
    thread.join()
    assert results[0].step == 2


def spoil(at):
    def change(index, batch):
        return {**batch, 'x': np.full_like(batch['x'], np.nan)} if index == at - 1 else batch

    return change


@pytest.mark.parametrize(
    'at, message',
    [
        (7, 'at step 7; the last good checkpoint is step 4'),  # noticed at the checkpoint of step 8
        (10, 'at step 10; the last good checkpoint is step 8'),  # at a row
        (1, 'at step 1; there is no checkpoint yet'),
        (4, 'at step 4; there is no checkpoint yet'),
    ],
)
def test_nan_stops_the_run(trainer, stream, tmp_path, at, message):
    """The step that it came from is named, and nothing of it is kept: neither a row nor a checkpoint."""
    with pytest.raises(NonFiniteError, match=f'grad_norm and loss and param_norm became NaN or infinite {message}'):
        train(trainer(20), stream(spoil(at)), tmp_path, announce=lambda text: None)
    assert all(step < at for step in steps_in(tmp_path))
    text = (tmp_path / 'metrics.csv').read_text()
    assert 'nan' not in text and all(int(line.split(',')[0]) < at for line in text.splitlines()[1:])


def test_a_healed_run_goes_on_after_nan(trainer, stream, tmp_path, bits):
    whole = train(trainer(12), stream(), tmp_path / 'whole', announce=lambda text: None)
    with pytest.raises(NonFiniteError):
        train(trainer(12), stream(spoil(7)), tmp_path / 'parts', announce=lambda text: None)
    healed = train(trainer(12), stream(), tmp_path / 'parts', announce=lambda text: None)
    assert bits(healed.state) == bits(whole.state)
    assert read(tmp_path / 'parts') == read(tmp_path / 'whole')


@dataclass(frozen=True)
class SteepEdge(Task):
    """A finite loss whose gradient is infinite: sqrt at 0, from step 3 on."""

    def init(self, key, batch):
        return {'w': jnp.zeros(())}, ()

    def loss(self, params, task_state, frozen, batch, step, keys):
        return jnp.where(step < 2, 0.0, 1.0) * jnp.sqrt(params['w']) + 0 * batch['x'].sum(), ((), {})


def test_an_infinite_gradient_stops_the_run(trainer, stream, tmp_path):
    with pytest.raises(NonFiniteError, match='grad_norm'):
        train(trainer(6, task=SteepEdge()), stream(), tmp_path, announce=lambda text: None)


@pytest.mark.parametrize(
    'name', ['num_steps', 'batch_size', 'num_microbatches', 'log_every_steps', 'checkpoint_every_steps']
)
def test_settings_refuse_what_cannot_be_counted(name):
    with pytest.raises(ValueError, match=f'training.{name} must be at least 1, got 0'):
        Settings(**{'num_steps': 1, 'batch_size': 1, name: 0})


@pytest.mark.parametrize('decay', [0.0, 1.0, -0.1, 1.5])
def test_settings_refuse_a_decay_outside_the_interval(decay):
    with pytest.raises(ValueError, match=f'training.ema.slow is a decay between 0 and 1, got {decay}'):
        Settings(num_steps=1, batch_size=1, ema={'slow': decay})
