"""The comparison of models at equal training time: its rows, its files, and what it refuses."""

import csv
import json

import numpy as np
import pytest

from diffjax.data import open_source, read_all
from diffjax.evaluation import fit_svc

pytestmark = pytest.mark.usefixtures('fast_compilation')


def read(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def module(experiment):
    return experiment('compare_models')


def test_each_model_is_a_row(module, tmp_path, capsys):
    out = tmp_path / 'out'
    module.main(['--argument=smoke', '--seconds=0.2', '--seed=1', f'--out={out}'])
    rows = read(out / 'models.csv')
    assert [row['model'] for row in rows] == ['VAE', 'GAN', 'diffusion', 'real images']
    for row in rows[:3]:
        workdir = out / row['model'].lower()
        figures, config = (json.loads((workdir / f'{name}.json').read_text()) for name in ('figures', 'config'))
        for name in ('frechet_ratio', 'precision', 'class_accuracy', 'seconds_per_sample'):
            assert float(row[name]) == figures[name]
        assert int(row['steps']) == figures['step'] == config['training']['num_steps'] and config['seed'] == 1
        metrics = read(workdir / 'metrics.csv')
        assert int(metrics[-1]['step']) == int(row['steps'])
        assert 0 < int(row['parameters_drawing']) <= int(row['parameters'])
    assert int(rows[2]['parameters_drawing']) == int(rows[2]['parameters'])
    real = json.loads((out / 'vae' / 'figures.json').read_text())
    assert float(rows[3]['frechet_ratio']) == 1 and float(rows[3]['precision']) == real['precision_real']

    classes = read(out / 'classes.csv')
    archive, images = np.load(out / 'gan' / 'samples.npz'), read_all(open_source('digits', 'train'))
    seen = fit_svc(images['image'], images['label'])(archive['arr_0'])
    (found,) = (row for row in classes if (row['model'], row['labels']) == ('GAN', 'recognised'))
    assert [float(found[str(c)]) for c in range(10)] == [np.mean(seen == c) for c in range(10)]
    (asked,) = (row for row in classes if (row['model'], row['labels']) == ('GAN', 'asked for'))
    assert {float(asked[str(c)]) for c in range(10)} == {0.1}
    for name in ('samples.png', 'classes.png'):
        assert (out / name).read_bytes()[:4] == b'\x89PNG'
    report = (out / 'report.md').read_text()
    assert report in capsys.readouterr().out and '| real images |' in report
    with pytest.raises(SystemExit, match='is there already: give another --out'):
        module.main(['--argument=smoke', '--seconds=0.2', f'--out={out}'])


def test_shares_and_what_is_said_of_them(module):
    data = np.array([0.5, 0.25, 0.25, 0.0])
    figures = module.class_figures(np.array([0, 0, 3, 3]), data)
    assert figures['class_total_variation'] == pytest.approx(0.5)  # half of 0 + 0.25 + 0.25 + 0.5
    assert figures['class_entropy'] == pytest.approx(np.log(2) / np.log(4))
    assert module.class_figures(np.arange(4), np.full(4, 0.25)) == pytest.approx(
        {'class_total_variation': 0, 'class_entropy': 1}
    )


def test_seconds_are_those_of_the_steps(module, tmp_path):
    (tmp_path / 'metrics.csv').write_text('step,loss,steps_per_second\n10,1,5\n30,1,10\n')
    assert module.trained_seconds(tmp_path) == pytest.approx(10 / 5 + 20 / 10)


@pytest.mark.parametrize(
    ('words', 'fragment'),
    [
        (['--models=VAE,flow'], "--models are of VAE, GAN, diffusion; got 'flow'"),
        (['--models='], "got 'none'"),
        (['--seconds=0'], '--seconds must be above 0, got 0'),
        (['--argument=smok'], "takes the argument smoke, got 'smok'"),
    ],
)
def test_mistakes_are_told_in_one_line(module, tmp_path, words, fragment):
    with pytest.raises(SystemExit) as stopped:
        module.main([*words, f'--out={tmp_path}/out'])
    assert str(stopped.value).startswith('error: ') and fragment in str(stopped.value)
    assert not (tmp_path / 'out').exists()
