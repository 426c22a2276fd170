"""Faults through the command: what it says, its exit code, and what a person does next."""

import json
import runpy
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax.training import processes
from diffjax.training.disk import CannotWrite
from diffjax.training.nonfinite import read_kept
from diffjax.training.processes import lost_another, parting, stop_requests

pytestmark = pytest.mark.usefixtures('fast_compilation')
DIGITS = '--config=configs/digits.py:smoke'


@pytest.mark.parametrize(
    'word, told',
    [
        ('--config.training.on_nan=go_on', "training.on_nan is 'stop' or 'skip', got 'go_on'"),
        ('--config.training.max_skipped_in_a_row=-1', 'training.max_skipped_in_a_row'),
        ('--config.training.max_skipped_in_a_row=many', 'training.max_skipped_in_a_row'),
        ('--heartbeat_timeout_seconds=3', '--heartbeat_timeout_seconds=3: at least 10'),
    ],
)
def test_settings_are_checked(command, tmp_path, word, told):
    """Keys that the config file does not name are known all the same."""
    coordinator = ['--coordinator=localhost:1'] if 'heartbeat' in word else []
    code, _, err = command(DIGITS, f'--workdir={tmp_path}/run', *coordinator, word)
    (line,) = err.splitlines()
    assert code == 2 and told in line and not (tmp_path / 'run').exists()


def test_a_run_that_diverges_keeps_its_batch_and_is_replayed(command, tmp_path, capsys, monkeypatch):
    """A rate of 1e30: the first update after the warm-up leaves parameters whose squares overflow."""
    workdir = tmp_path / 'run'
    words = (DIGITS, f'--workdir={workdir}', '--config.optimizer.learning_rate=1e30', '--config.network.depth=1')
    code, _, err = command(*words)
    last = err.splitlines()[-1]
    assert code == 2 and 'became NaN or infinite at step 2; there is no checkpoint yet; its batch is kept in' in last
    kept = read_kept(workdir)
    assert kept.batch['image'].shape == (16, 8, 8, 1) and kept.batch['image'].dtype == np.uint8
    assert kept.step == 2 and kept.seed == json.loads((workdir / 'config.json').read_text())['seed']

    folder = Path(__file__).parents[1] / 'experiments'
    monkeypatch.syspath_prepend(str(folder))
    capsys.readouterr()
    runpy.run_path(str(folder / 'replay.py'))['main'](['--workdir', str(workdir)])
    said = capsys.readouterr().out
    assert 'from the start by 1 steps' in said and 'the batch: finite' in said
    assert 'the first inf (some are meant, as in masks) comes out of' in said and 'optax.global_norm(params)' in said
    assert 'not finite in the replay: param_norm' in said

    code, _, err = command(*words, '--config.training.on_nan=skip', '--config.training.max_skipped_in_a_row=1')
    assert code == 2 and 'at step 3, after 1 skipped ones in a row' in err.splitlines()[-1]


def test_a_full_disk_is_told_in_one_line(command, tmp_path, monkeypatch):
    def train(*args, **kwargs):
        raise CannotWrite('the checkpoint of step 7 could not be written')

    monkeypatch.setattr('diffjax.training.loop.train', train)
    code, _, err = command(DIGITS, f'--workdir={tmp_path}/run')
    assert (code, err) == (2, 'error: the checkpoint of step 7 could not be written\n')


GLOO = 'UNKNOWN: Gloo all-reduce failed: [tcp/pair.cc:538] Read error [127.0.0.1]:10943: Connection reset by peer'


def test_another_that_is_gone_is_told_from_errors_of_ones_own():
    line = lost_another(f'{GLOO}\nand more')
    assert 'process 0 of 1 has lost another, which died or cannot be reached (UNKNOWN: Gloo' in line
    assert 'start all of them again' in line and '\n' not in line
    assert lost_another('RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes') == ''


@pytest.fixture
def left(monkeypatch):
    """What a process of several did at its end: its exit code, and whether it said goodbye."""
    done = []
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(processes.os, '_exit', lambda code: done.append(code))
    monkeypatch.setattr(processes, 'FAREWELL_SECONDS', 0.1)
    return done


@pytest.mark.parametrize(
    'error, code, told',
    [
        (SystemExit(2), 2, ''),
        (jax.errors.JaxRuntimeError(GLOO), 3, 'error: process 0 of 1 has lost another'),
        (jax.errors.JaxRuntimeError('Out of memory'), 1, 'Out of memory'),
        (KeyError('a mistake'), 1, "KeyError: 'a mistake'"),
    ],
)
def test_a_process_that_fails_leaves_without_the_others(left, capsys, monkeypatch, error, code, told):
    """Though they never come to say goodbye."""
    monkeypatch.setattr(jax.distributed, 'shutdown', threading.Event().wait)
    with parting():
        raise error
    assert left == [code] and told in capsys.readouterr().err


def test_one_process_alone_raises_as_ever():
    with pytest.raises(KeyError), parting():
        raise KeyError('a mistake')
    with parting():
        pass


def test_sigterm_is_heard_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stop_now:
        assert not stop_now(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop_now(2)
    assert signal.getsignal(signal.SIGTERM) is before
