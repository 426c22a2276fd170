"""A disk that is full while a run writes: one line says so, what was whole stays whole, and the run goes on from it."""

import os
import subprocess
import time

import pytest

from diffjax.training.disk import CannotWrite, writing
from diffjax.training.loop import train

# Where Orbax fails to write it leaves threads behind, which call an event loop that is closed.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def quiet(text):
    del text


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB; skipped where nobody may mount one."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip('mounting a small disk needs root')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(folder, but):
    """A file that leaves so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
    (folder / 'filler').write_bytes(bytes(free - but))


def steps_in(workdir):
    return sorted(path.name for path in (workdir / 'checkpoints').iterdir())


@pytest.fixture
def whole(trainer, stream, tmp_path, bits):
    return bits(train(trainer(12), stream(), tmp_path / 'whole', announce=quiet).state)


def test_a_full_disk_ends_the_run_in_one_line(trainer, stream, small_disk, bits, whole, before_step, caplog):
    """In the middle of a checkpoint, whose error comes from a thread; then there is room again."""
    run = small_disk / 'run'

    def fill_up():
        wait_for(run / 'checkpoints' / '4')
        fill(small_disk, 40_000)

    before_step(7, fill_up)
    with pytest.raises(CannotWrite) as error:
        train(trainer(12), stream(), run, announce=quiet)
    (line,) = str(error.value).splitlines()
    assert f'the checkpoint of step 8 could not be written to {run}/checkpoints (no space left on device, 0.' in line
    assert line.endswith('MB are free there); the last good checkpoint is step 4: make room and run the command again')
    assert not [record for record in caplog.records if record.exc_info]  # Orbax logs the whole traceback, twice
    (small_disk / 'filler').unlink()

    said = []
    result = train(trainer(12), stream(), run, announce=said.append)
    assert said[0] == 'going on from checkpoint 4' and bits(result.state) == whole
    assert steps_in(run) == ['12', '4', '8']  # what the failed save has left is gone


@pytest.mark.parametrize('at, good', [(1, None), (7, 4), (11, 8)])
def test_no_save_fails_in_silence(trainer, stream, tmp_path, bits, whole, before_step, limit_files, at, good):
    """Of the first checkpoint, of one on the way, and of the last, behind which nothing follows that could notice."""

    def fill_up():
        if good:
            wait_for(tmp_path / 'run' / 'checkpoints' / str(good))
        limit_files(10_000)

    before_step(at, fill_up)
    told = f'the last good checkpoint is step {good}' if good else 'there is no checkpoint yet'
    with pytest.raises(CannotWrite, match=f'file too large, .*; {told}: make room'):
        train(trainer(12), stream(), tmp_path / 'run', announce=quiet)
    limit_files()
    assert bits(train(trainer(12), stream(), tmp_path / 'run', announce=quiet).state) == whole


def test_a_full_disk_under_the_metrics(trainer, stream, tmp_path, bits, whole, before_step, limit_files):
    """The run ends with a line, and does not wait for a thread of TensorBoard's that has died of it."""
    events = tmp_path / 'run' / 'tensorboard'
    before_step(5, lambda: limit_files(max(path.stat().st_size for path in events.iterdir()) + 10))
    run = trainer(12, checkpoint_every_steps=100)
    with pytest.raises(CannotWrite, match="the run's metrics could not be written to .*run .file too large"):
        train(run, stream(), tmp_path / 'run', announce=quiet)
    limit_files()
    assert bits(train(trainer(12), stream(), tmp_path / 'run', announce=quiet).state) == whole


def test_errors_of_another_kind_pass(tmp_path):
    for error in (KeyError('a mistake'), ValueError('a shape'), AssertionError()):
        with pytest.raises(type(error)), writing('a file', tmp_path, 'go on'):
            raise error
    told = r'a file could not be written to .*/gone/file \(denied, [\d.,]+ MB are free there\); go on'
    with pytest.raises(CannotWrite, match=told), writing('a file', tmp_path / 'gone' / 'file', 'go on'):
        raise PermissionError(13, 'Denied')
