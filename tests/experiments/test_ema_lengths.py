"""The study of average lengths: its rows, its files, and what it refuses."""

import csv
import shutil

import numpy as np
import pytest

from diffjax.training.posthoc_ema import SNAPSHOTS
from diffjax.workdir import read_config, write_config

pytestmark = pytest.mark.usefixtures('fast_compilation')


@pytest.fixture
def with_snapshots(trained, tmp_path):
    """A copy of the trained run as if its average had been a power one, of which it kept two snapshots."""
    from diffjax.loading import load
    from diffjax.training.snapshots import Snapshots

    workdir = tmp_path / 'run'
    shutil.copytree(trained, workdir)
    raw, average = (load(trained, overrides={'sampler': {'params': name}}).params for name in ('raw', 'ema'))
    store = Snapshots(workdir / SNAPSHOTS)
    store.save(2, {'ema': average})
    store.save(4, {'ema': raw})
    store.close()
    return workdir


def test_each_width_is_a_row(experiment, monkeypatch, with_snapshots, tmp_path, capsys):
    """The tracked width at the last snapshot is that snapshot, here the parameters themselves."""
    from diffjax.training.averages import Power

    module, workdir = experiment('ema_lengths'), with_snapshots
    monkeypatch.setattr('diffjax.run.power_profiles', lambda ema: {'ema': Power(sigma_rel=0.1)})
    words = [f'--workdir={workdir}', '--sigma_rel=0.1,0.2', '--num_samples=40', f'--out={tmp_path}/out']
    module.main(words)
    with open(tmp_path / 'out' / 'lengths.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['sigma_rel'] for row in rows] == ['raw', '0.1', '0.2']
    ratios = [float(row['frechet_ratio']) for row in rows]
    np.testing.assert_allclose(ratios[1], ratios[0], rtol=1e-6)
    assert ratios[2] != ratios[0] and float(rows[1]['profile_error']) < 1e-6 < float(rows[2]['profile_error'])
    report = (tmp_path / 'out' / 'report.md').read_text()
    assert 'Best of run, seed 0: sigma_rel = ' in report and '| 0.2 |' in report
    assert (tmp_path / 'out' / 'lengths.png').read_bytes()[:4] == b'\x89PNG'
    assert 'sigma_rel' in capsys.readouterr().out


def test_what_is_missing_is_said_in_one_line(experiment, trained, tmp_path, capsys):
    module = experiment('ema_lengths')
    copy = tmp_path / 'latents'
    copy.mkdir()
    write_config(copy, read_config(trained))
    for workdir, fragment in (
        (tmp_path / 'nowhere', 'holds no run: there is no config.json in it'),
        (copy, 'holds no checkpoint yet'),
        (trained, 'holds no snapshots of averages: train with power averages'),
    ):
        with pytest.raises(SystemExit) as stopped:
            module.main([f'--workdir={workdir}', f'--out={tmp_path}/out'])
        assert str(stopped.value).startswith('error: ') and fragment in str(stopped.value)
    assert not (tmp_path / 'out').exists()
