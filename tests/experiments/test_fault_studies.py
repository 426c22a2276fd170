"""The study of what a run survives: what it measures, and that it would notice."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest


@pytest.fixture
def faults(experiment):
    return experiment('faults')


def test_growth_is_the_slope_of_the_line(faults):
    """Of a line of known slope, and of noise around a constant, whose first and last samples differ."""
    steps = range(2000, 20_000, 100)
    leaking = [{'step': n, 'memory_mb': 800 + 0.002 * n} for n in steps]
    start, more = faults.growth(leaking, 'memory_mb')
    assert (start, more) == (pytest.approx(804), pytest.approx(0.002 * 17_900))
    noise = np.random.default_rng(0).normal(0, 3, len(steps))
    flat = [{'step': n, 'memory_mb': 800 + e} for n, e in zip(steps, noise)]
    assert abs(faults.growth(flat, 'memory_mb')[1]) < 0.01 * 800 < more


def test_peaks_tell_a_leak_from_swings(faults):
    """What every other sample meets swings by a tenth, at random: a line through all tells less than the peaks."""
    rng, steps = np.random.default_rng(1), range(2000, 20_000, 100)
    swings = [450 - 45 * rng.integers(0, 2) * rng.uniform() for _ in steps]

    def more(leak):
        samples = [{'step': n, 'memory_mb': value + leak * n} for n, value in zip(steps, swings)]
        largest = faults.peaks(samples, 'memory_mb', 500)
        assert [each['step'] for each in largest] == list(range(2000, 20_000, 500))
        return faults.growth(largest, 'memory_mb')[1]

    assert abs(more(0)) < 0.25 * 4.5
    assert more(0.5e-3) == pytest.approx(0.5e-3 * 17_500 + more(0), abs=0.5)


def test_a_sample_sees_memory_and_files(faults, tmp_path):
    """50 MB and ten files more, as the system counts them."""
    before = faults.sample(os.getpid(), tmp_path, time.monotonic())
    held, files = np.ones(50 * 2**17), [open(tmp_path / str(n), 'w') for n in range(10)]  # noqa: SIM115
    after = faults.sample(os.getpid(), tmp_path, time.monotonic())
    assert held.nbytes == 50 * 2**20 and after['memory_mb'] - before['memory_mb'] == pytest.approx(50, abs=5)
    assert after['open_files'] - before['open_files'] == 10
    for file in files:
        file.close()


def test_a_process_that_has_ended_is_not_sampled(faults, tmp_path):
    process = subprocess.Popen([sys.executable, '-c', ''])
    while process.poll() is None:
        time.sleep(0.01)
    assert faults.sample(process.pid, tmp_path, 0) is None


def test_a_kill_waits_for_its_moment(faults, tmp_path):
    """SIGKILL while the folder of a new checkpoint is there; one that an earlier kill has left is no such moment."""
    run = 'import pathlib, sys, time; time.sleep(0.5); pathlib.Path(sys.argv[1]).mkdir(parents=True); time.sleep(60)'
    folder = tmp_path / 'checkpoints' / '20.orbax-checkpoint-tmp'
    (tmp_path / 'checkpoints' / '10.orbax-checkpoint-tmp').mkdir(parents=True)
    make = next(faults.moments(tmp_path, faults.random.Random(0)))
    process = subprocess.Popen([sys.executable, '-c', run, str(folder)])
    kill = faults.kill_once(process, tmp_path, make())
    assert process.returncode == -9 and kill['moment'] == 'in a checkpoint' and kill['seconds_after_start'] >= 0.5
    assert '20.orbax-checkpoint-tmp' in kill['left_unfinished'] and kill['last_row'] == 0


def test_sigterm_is_timed_to_the_end(faults, tmp_path):
    """A process that takes half a second to leave, and one that leaves at once."""
    leaves = 'import signal, sys, time; signal.signal(15, lambda *a: (time.sleep(0.5), sys.exit(0))); print(); '
    for run, code, least in ((leaves, 0, 0.5), ('print(); import time; ', -15, 0)):
        process = subprocess.Popen([sys.executable, '-uc', run + 'time.sleep(60)'], stdout=subprocess.PIPE)
        moment = faults.Moment('at once', lambda: bool(process.stdout.readline()), 0)  # noqa: B023
        met = faults.terminate_once(process, tmp_path, moment)
        assert met['exit_code'] == code and least <= met['seconds_to_the_end'] < least + 10
        assert faults.terminate_once(process, tmp_path, faults.Moment('too late', lambda: True, 0)) is None
        process.stdout.close()


@pytest.mark.slow
def test_a_short_study_of_each(faults, tmp_path):
    """Three kills, four times SIGTERM and a soak of a few hundred steps, with all that they write."""
    with pytest.raises(SystemExit) as code:
        faults.main(['--kills=3', f'--out={tmp_path}/kills', '--config.training.num_steps=60'])
    assert code.value.code == 0 and len((tmp_path / 'kills' / 'kills.csv').read_text().splitlines()) == 4
    assert 'are the same' in (tmp_path / 'kills' / 'report.md').read_text()
    with pytest.raises(SystemExit) as code:
        faults.main(['--sigterms=3', f'--out={tmp_path}/sigterms', '--config.evaluation.num_samples=20'])
    assert code.value.code == 0 and len((tmp_path / 'sigterms' / 'sigterms.csv').read_text().splitlines()) == 5
    with pytest.raises(SystemExit):
        faults.main(
            ['--soak=300', f'--out={tmp_path}/soak', '--every_seconds=0.2', '--config.evaluation.num_samples=20']
        )
    assert (tmp_path / 'soak' / 'soak.png').exists() and 'open files' in (tmp_path / 'soak' / 'report.md').read_text()
