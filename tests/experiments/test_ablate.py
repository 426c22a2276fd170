"""Ablations: cells are trained once, aggregated as arithmetic says, and judged by the stated rule."""

import csv
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    'dataset.test_split': 'test[:20%]',
    'training.num_steps': 2,
    'training.batch_size': 16,
    'training.log_every_steps': 2,
    'training.checkpoint_every_steps': 2,
    'optimizer.warmup_steps': 0,
    'network.hidden_size': 16,
    'network.depth': 1,
    'network.patch_size': 8,
    'sampler.num_steps': 2,
    'sampler.batch_size': 24,
    'evaluation.num_samples': 24,
    'evaluation.noise_levels': 1,
    'evaluation.classifier': 'none',
}

# What varies leaves the compiled programs alone: compiling is what takes time here.
SPLITS = 'dataset.split=train[:10%]|nowhere|train[10%:20%]'


def read(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """(a function that runs the tiny study and returns what it says, its folder, what the first run said).

    A process of its own has one device, for which there is much less to compile than for the tests' eight.
    """
    out = tmp_path_factory.mktemp('ablation') / 'out'
    options = ['--config=configs/digits.py', f'--vary={SPLITS}', '--figures=frechet_ratio,recall', f'--out={out}']
    changes = [f'--set={key}={value}' for key, value in TINY.items()]

    def run(*more):
        command = [sys.executable, 'experiments/ablate.py', *options, *changes, *more]
        environment = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run, out, run()


def trained(said):
    """The cells that a run worked on, as it says."""
    return [line.split('] ')[1].split(': ')[0] for line in said.splitlines() if line.startswith('[')]


def test_a_cell_for_each_setting_and_seed_and_refusals_with_their_reason(study):
    _, out, said = study
    rows = read(out / 'cells.csv')
    assert [(row['dataset.split'], row['seed']) for row in rows] == [
        (split, seed) for seed in '012' for split in ('train[:10%]', 'nowhere', 'train[10%:20%]')
    ]
    for row in rows:
        assert row['status'] == ('refused' if row['dataset.split'] == 'nowhere' else 'done')
    assert "refused: dataset.split=nowhere: 'digits' has no split 'nowhere'" in (out / 'report.md').read_text()
    assert len(trained(said)) == len(list((out / 'cells').iterdir())) == 6
    assert (out / 'ablation.png').stat().st_size > 5_000


def test_the_aggregate_is_that_of_the_cells(study):
    _, out, _ = study
    cells = read(out / 'cells.csv')
    for line in read(out / 'summary.csv'):
        mine = [cell for cell in cells if cell['dataset.split'] == line['dataset.split'] and cell['status'] == 'done']
        values = [float(cell[line['figure']]) for cell in mine]
        assert len(values) == int(line['num']) == 3
        assert float(line['mean']) == pytest.approx(sum(values) / 3)
        assert float(line['std']) == pytest.approx(statistics.stdev(values))
    assert {line['dataset.split'] for line in read(out / 'summary.csv')} == {'train[:10%]', 'train[10%:20%]'}


def test_finished_cells_are_not_trained_again(study):
    """Not by another sampler either, which only measures again; a cell that is gone is trained as it was."""
    run, out, _ = study
    first = read(out / 'cells.csv')
    logs = {path: path.read_text() for path in out.glob('cells/*/metrics.csv')}  # they hold the time of each step
    victim = next(path for path in logs if path.parent.name.startswith('train_10_-seed1'))
    shutil.rmtree(victim.parent)

    changed = '--set=sampler.num_steps=3'
    assert len(trained(run(changed))) == len(logs) == 6
    again = {path: path.read_text() for path in out.glob('cells/*/metrics.csv')}
    assert {path for path in logs if logs[path] != again[path]} == {victim}
    assert read(victim)[0]['loss'] == next(csv.DictReader(logs[victim].splitlines()))['loss']
    rows = read(out / 'cells.csv')
    assert rows[0]['evaluations_per_sample'] == '5' and first[0]['evaluations_per_sample'] == '3'

    assert trained(run(changed)) == []
    assert read(out / 'cells.csv') == rows


def test_the_verdict_needs_a_difference_beyond_the_noise(experiment):
    judge = experiment('ablation_report').judge
    clear = judge({'a': [1.0, 1.1, 0.9], 'b': [1.05, 0.95, 1.12], 'c': [5.0, 5.1, 4.9]}, 'lower')
    assert clear['a'].text == 'best mean'
    assert clear['b'].text == 'no difference beyond noise'
    assert clear['c'].text.startswith('worse')
    assert judge({'a': [1.0, 1.1, 0.9], 'c': [5.0, 5.1, 4.9]}, 'higher')['c'].text == 'best mean'
    noisy = judge({'a': [1.0, 9.0, 5.0], 'c': [8.0, 2.0, 6.0]}, 'lower')
    assert noisy['c'].text == 'no difference beyond noise'
    assert judge({'a': [1.0], 'b': [2.0]}, 'lower')['b'].text == 'too few runs to tell'
    assert judge({'a': [1.0, 2.0], 'b': [2.0, 3.0]}, None)['b'].text == ''


def test_welch_by_hand(experiment):
    """Means 2 and 5, variances 1 and 4, n = 3: t = 3 / sqrt(5 / 3), df = (5/3)^2 / (1/9/2 + 16/9/2) = 50 / 17."""
    from scipy.stats import t

    p = experiment('ablation_report').welch([1.0, 2.0, 3.0], [3.0, 5.0, 7.0])
    assert p == pytest.approx(2 * t.sf(3 / np.sqrt(5 / 3), 50 / 17))
    assert experiment('ablation_report').welch([1.0, 1.0], [1.0, 1.0]) == 1
    assert experiment('ablation_report').welch([1.0, 1.0], [2.0, 2.0]) == 0


def test_holm_by_hand(experiment):
    assert experiment('ablation_report').holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert experiment('ablation_report').holm([0.7, 0.9]) == pytest.approx([1.0, 1.0])


def test_many_comparisons_need_more_than_one_small_p(experiment):
    """Twenty settings of pure noise: without the correction one of them would often be called worse."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(50):
        groups = {i: rng.standard_normal(3).tolist() for i in range(20)}
        verdicts = experiment('ablation_report').judge(groups, 'higher')
        called += any(v.text.startswith('worse') for v in verdicts.values())
    assert called <= 5


def test_main_effects_average_what_all_levels_have(experiment):
    rows = [
        {'a': a, 'b': b, 'seed': seed, 'status': 'done', 'figure': 10 * a + b + 0.1 * seed}
        for a in (0, 1)
        for b in (0, 1, 2)
        for seed in (0, 1, 2)
        if (a, b) != (1, 2)
    ]
    effect = experiment('ablation_report').main_effect(rows, ['a', 'b'], 'a', 'figure')
    assert effect[0] == pytest.approx([0.5, 0.6, 0.7]) and effect[1] == pytest.approx([10.5, 10.6, 10.7])


def test_values_with_commas(experiment):
    split = experiment('ablate').split_change
    assert split('a.b=1e-3,2') == ('a.b', [1e-3, 2])
    assert split('times=uniform:low=1e-3,high=0.9|logit_normal') == (
        'times',
        ['uniform:low=1e-3,high=0.9', 'logit_normal'],
    )
    assert split('times=uniform:low=1e-3,high=0.9|') == ('times', ['uniform:low=1e-3,high=0.9'])


def test_mistakes_are_one_line(experiment, tmp_path):
    main, base = experiment('ablate').main, ['--config=configs/digits.py', f'--out={tmp_path}']
    for arguments, message in (
        ([*base, '--vary=target=v,velocity', '--seeds=0,1'], 'at least 3'),
        ([*base, '--vary=netwrok.depth=1,2'], "no section 'netwrok'"),
        ([*base, '--vary=optimizer.learning_rat=1,2'], 'no setting can be built'),
        (base, 'nothing varies'),
        (['--study=target'], 'there are: targets'),
        (['--config=configs/digit.py', '--vary=seed=1'], 'no config'),
    ):
        with pytest.raises(SystemExit, match='error: .*' + message):
            main(arguments)
    assert not list(tmp_path.iterdir())


def test_the_first_study_can_be_built_in_all_its_settings(experiment, capsys, tmp_path):
    experiment('ablate').main(['--study=targets', '--check', f'--out={tmp_path}'])
    assert '48 settings x 3 seeds; 0 settings refused' in capsys.readouterr().out
