"""network_costs: the papers' figures, and a run's cost by hand."""

import csv

import pytest

PAPER = {  # parameters in millions, multiply-adds in G: Peebles & Xie 2023, tables 1 and 4; Dhariwal & Nichol 2021
    'DiT-S/8': (33, 0.36),
    'DiT-B/4': (131, 5.56),
    'DiT-XL/2': (675, 118.64),
    'ADM 256': (554, 1120),
}


def test_the_table_is_the_papers(experiment, tmp_path, capsys):
    rows = experiment('network_costs').main([f'--networks={";".join(PAPER)}', f'--out={tmp_path}/costs.csv'])
    for row, (name, (millions, giga)) in zip(rows, PAPER.items(), strict=True):
        assert row['network'] == name and round(row['parameters, M']) == pytest.approx(millions, abs=1)
        assert row['G multiply-adds'] == pytest.approx(giga, rel=0.01)
        assert row['T multiply-adds a sample'] == pytest.approx(giga * 250 * 2 / 1e3, rel=0.01)
    with open(tmp_path / 'costs.csv', newline='') as file:
        assert [row['network'] for row in csv.DictReader(file)] == list(PAPER)
    assert capsys.readouterr().out.count('|') > 40


def test_what_is_not_there_is_refused(experiment, tmp_path, capsys):
    for arguments, message in (
        (['--networks=DiT-Q/2'], 'unknown DiT-Q/2; valid: DiT-S/2'),
        ([f'--workdir={tmp_path}/nowhere'], 'holds no run'),
        (['--num_samples=0'], 'at least 1, got 0'),
    ):
        with pytest.raises(SystemExit):
            experiment('network_costs').main(arguments)
        assert message in capsys.readouterr().err


def test_a_run_costs_its_calls(experiment, trained, capsys):
    """The smoke run samples with three steps of Heun, whose last needs no second call: five, unguided."""
    (row,) = experiment('network_costs').main([f'--workdir={trained}', '--num_samples=8'])
    assert row['evaluations'] == 5 and row['branches'] == 1
    assert row['G multiply-adds a sample'] == pytest.approx(row['M multiply-adds'] * 5 / 1e3)
    d, tokens = 32, 16  # of two blocks, their ends, the embeddings of time and the modulations, by hand
    blocks = 2 * (12 * d * d * tokens + 2 * tokens * tokens * d + 6 * d * d)
    ends = tokens * (4 * d + 4 * d) + (256 * d + d * d) + 2 * d * d
    assert row['M multiply-adds'] == pytest.approx((blocks + ends) / 1e6, rel=1e-6)
    assert row['predicted, ms a sample'] > 0 and row['measured, ms a sample'] > 0
    assert row['measured / predicted'] == pytest.approx(
        row['measured, ms a sample'] / row['predicted, ms a sample'], rel=1e-6
    )
    assert 'measured / predicted' in capsys.readouterr().out
