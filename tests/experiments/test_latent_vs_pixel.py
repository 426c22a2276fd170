"""The comparison of latents with pixels, small: its rows, its figures by hand, its refusals."""

import csv
import json

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures('fast_compilation', 'one_device')
MINUTES = 0.2


@pytest.fixture(scope='module')
def study(experiment):
    return experiment('latent_vs_pixel')


@pytest.fixture(scope='module')
def result(study, tmp_path_factory):
    out = tmp_path_factory.mktemp('latent_vs_pixel')
    table = study.main(['--config=configs/ldm_digits.py:smoke', f'--minutes={MINUTES}', f'--out={out}'])
    return out, table


def test_rows_say_what_was_trained_and_what_it_costs(result):
    _, table = result
    latents, equal, more, fewer = table
    assert [row['tokens'] for row in table] == [16, 16, 64, 64]  # 4 x 4 latents; 8 x 8 pixels in patches of 2 and of 1
    assert [row['values'] for row in table] == [32, 64, 64, 64]
    assert 3.5 < more['gflops_per_call'] / equal['gflops_per_call'] < 5  # four times the tokens, and attention
    np.testing.assert_allclose(latents['gflops_per_call'], equal['gflops_per_call'], rtol=0.05)
    assert latents['gflops_per_sample'] > latents['evaluations'] * latents['gflops_per_call']  # the decoder
    np.testing.assert_allclose(more['gflops_per_sample'], more['evaluations'] * more['gflops_per_call'])
    assert fewer['gflops_per_sample'] <= latents['gflops_per_sample'] or fewer['evaluations'] == 1
    assert fewer['steps'] == more['steps'] and fewer['evaluations'] < more['evaluations']


def test_the_first_stage_is_counted(result):
    out, table = result
    for row, folder in zip(table, ('latents', 'pixels_patch2_x0', 'pixels_patch1_x0')):
        plan = json.loads((out / folder / 'num_steps.json').read_text())
        left = 60 * MINUTES - row['of_that_first_stage_s']
        assert row['steps'] == plan['num_steps'] == max(round(left / plan['seconds_per_step']), 4)
    assert table[0]['of_that_first_stage_s'] > 0 == table[1]['of_that_first_stage_s']


def test_costs_fall_with_the_factor(result):
    out, _ = result
    with open(out / 'costs.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [int(row['values']) for row in rows] == [8 * 8 * 3, 4 * 4 * 4, 2 * 2 * 8]
    assert [int(row['tokens']) for row in rows] == [16, 4, 1]
    for row in rows:
        np.testing.assert_allclose(
            float(row['gflops_ratio']), float(rows[0]['gflops_per_call']) / float(row['gflops_per_call'])
        )
    assert float(rows[-1]['gflops_ratio']) > 3


def test_report_and_pictures(result):
    out, _ = result
    report = (out / 'report.md').read_text()
    assert 'pixels, as many tokens' in report and 'A call of the denoiser' in report
    assert (out / 'samples.png').stat().st_size > 1000


def test_again_trains_nothing(study, result, capsys):
    out, table = result
    again = study.main(['--config=configs/ldm_digits.py:smoke', f'--minutes={MINUTES}', f'--out={out}'])
    assert 'compiled in' not in capsys.readouterr().out
    assert [row['frechet_distance'] for row in again] == [row['frechet_distance'] for row in table]


@pytest.mark.parametrize(
    'argument, message',
    [
        ('--config=configs/digits.py:smoke', 'no section first_stage'),
        ('--minutes=7', 'holds a study of another minutes'),
        ('--targets=eps', "some of velocity, x0 .* got 'eps'"),
    ],
)
def test_refuses(study, result, argument, message):
    out, _ = result
    with pytest.raises(SystemExit, match=message):
        study.main([f'--minutes={MINUTES}', '--config=configs/ldm_digits.py:smoke', f'--out={out}', argument])


def test_time_that_the_first_stage_has_taken_already(study, tmp_path):
    row = study.Row('latents', {}, tmp_path / 'row', 61.0)
    with pytest.raises(study.Stop, match='took 61 s of 60: give more --minutes'):
        study.run_row(row, 60.0, tmp_path)
