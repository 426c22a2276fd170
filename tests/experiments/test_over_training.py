"""The figures of each checkpoint: its rows against the run loaded as it was then, its files, its refusals."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from diffjax import load
from diffjax.data import read_all
from diffjax.evaluation import evaluate_samples
from diffjax.run import balanced_labels
from diffjax.workdir import read_config, write_config

pytestmark = pytest.mark.usefixtures('fast_compilation')


def test_each_checkpoint_is_a_row(experiment, trained, tmp_path, capsys):
    """The older one is the run without the newer; what was measured is not measured again."""
    module, older = experiment('over_training'), tmp_path / 'older'
    words = [f'--workdir={trained}', '--num_samples=40', '--sampler=num_steps=2', f'--out={tmp_path}/out']
    rows = module.main(words)
    steps = sorted(int(path.name) for path in (trained / 'checkpoints').iterdir() if path.name.isdecimal())
    assert len(steps) > 1 and [row['step'] for row in rows] == steps
    assert 0 < rows[0]['minutes'] < rows[1]['minutes']

    shutil.copytree(trained, older)
    shutil.rmtree(older / 'checkpoints' / str(steps[-1]))
    for workdir, row in ((older, rows[-2]), (trained, rows[-1])):
        run, labels = load(workdir, overrides={'sampler': {'num_steps': 2}}), balanced_labels(40, 10)
        real = read_all(run.experiment.source), read_all(run.experiment.test)
        found = evaluate_samples(run.sample(labels), labels, *real)
        np.testing.assert_allclose(row['frechet_ratio'], found['frechet_ratio'], rtol=1e-3)

    with open(tmp_path / 'out' / 'rows.csv', newline='') as file:
        assert [int(row['step']) for row in csv.DictReader(file)] == steps
    assert f'| {steps[0]} |' in (tmp_path / 'out' / 'report.md').read_text()
    assert (tmp_path / 'out' / 'figures.png').read_bytes()[:4] == b'\x89PNG'
    capsys.readouterr()
    assert module.main(words) == rows
    assert capsys.readouterr().out == ''


def test_a_clip_that_shows_no_single_digit_leaves_a_gap(experiment, monkeypatch, tmp_path):
    """As early in training: the rows have the same columns, and what is there is drawn."""
    module, clips = experiment('over_training'), np.zeros((2, 4, 8, 8, 1), np.uint8)
    monkeypatch.setattr(module, 'image_figures', lambda *args: {'frechet_ratio': 2.0})
    run = SimpleNamespace(sample=lambda labels, seed: clips, experiment=None)
    rows = []
    for found in ({'flicker_ratio': 3.0}, {'flicker_ratio': 1.5, 'class_constancy': 0.5, 'class_constancy_real': 1.0}):
        monkeypatch.setattr(module, 'clip_figures', lambda *args, found=found: found)
        rows.append({'step': len(rows), 'minutes': 1.0} | module.figures_of(run, np.zeros(2), 0))
    assert np.isnan(rows[0]['class_constancy']) and rows[1]['class_constancy'] == 0.5
    module.write_csv(tmp_path / 'rows.csv', rows)
    assert module.read_done(tmp_path)[1] == pytest.approx(rows[1], nan_ok=True)
    module.plot(tmp_path / 'figures.png', rows)
    assert (tmp_path / 'figures.png').read_bytes()[:4] == b'\x89PNG'


def test_what_is_missing_is_said_in_one_line(experiment, trained, tmp_path):
    module = experiment('over_training')
    copy = tmp_path / 'empty'
    copy.mkdir()
    write_config(copy, read_config(trained))
    for words, fragment in (
        ([f'--workdir={tmp_path}/nowhere'], 'holds no run: there is no config.json in it'),
        ([f'--workdir={copy}'], 'holds no checkpoint yet'),
        ([f'--workdir={trained}', '--sampler=ddpm'], "changes are written key=value,..., got 'ddpm'"),
        ([f'--workdir={trained}', '--sampler=solver=ddmp'], "unknown name 'ddmp' (did you mean ddpm?)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            module.main([*words, f'--out={tmp_path}/out'])
        assert str(stopped.value).startswith('error: ') and fragment in str(stopped.value)
    assert not (tmp_path / 'out').exists()
