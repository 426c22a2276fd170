"""Figures of the real digits, of copies and of noise, and the report that shows them."""

import numpy as np
import pytest

from diffjax.evaluation import (
    evaluate_samples,
    frechet_distance,
    loss_by_noise_level,
    markdown_table,
    sample_grid,
    svc_accuracy,
    write_report,
)
from diffjax.evaluation.features import pixels


@pytest.fixture(scope='module')
def copies(digits):
    """The figures of samples that are the train images themselves."""
    train = digits['train']
    return evaluate_samples(train['image'], train['label'], train, digits['test'], classifier={})


def test_copies_of_the_train_split_are_perfect_and_memorised(copies):
    assert copies['num_samples'] == 1437
    assert copies['frechet_ratio'] == 1
    assert (copies['precision'], copies['recall'], copies['memorised_fraction']) == (1, 1, 1)
    assert copies['nearest_ratio_median'] == 0
    assert copies['class_accuracy'] > 0.995


def test_real_test_images_are_not_memorised(copies):
    assert copies['memorised_fraction_real'] < 0.01
    assert copies['precision_real'] > 0.85 and copies['recall_real'] > 0.85
    assert copies['classifier_test_accuracy'] > 0.98


def test_each_figure_is_the_one_it_is_called(digits, copies):
    train, test = digits['train'], digits['test']
    rng = np.random.default_rng(0)
    half = train['image'] // 2 + rng.integers(0, 99, train['image'].shape, dtype=np.uint8)
    figures = evaluate_samples(half[:600], train['label'][:600], train, test, classifier={'C': 1})
    assert figures['frechet_distance'] == frechet_distance(pixels(half[:600]), pixels(test['image']))
    assert figures['frechet_distance_train'] == frechet_distance(pixels(train['image']), pixels(test['image']))
    assert figures['frechet_ratio'] == figures['frechet_distance'] / figures['frechet_distance_train'] > 2
    assert figures['class_accuracy'] == svc_accuracy(*train.values(), half[:600], train['label'][:600], C=1)
    assert set(figures['class_accuracy_per_class']) == set(range(10))
    assert figures['precision_real'] == copies['precision_real']
    assert figures['memorised_fraction'] < copies['memorised_fraction']


def test_without_labels_or_classifier_there_is_no_class_accuracy(digits):
    train, test = digits['train'], digits['test']
    for labels, classifier in ((None, {}), (test['label'], None)):
        figures = evaluate_samples(test['image'], labels, train, test, classifier=classifier)
        assert not any('class' in name for name in figures)
        assert figures['frechet_distance'] == pytest.approx(0, abs=1e-9)


def test_a_report_says_what_a_stranger_needs(digits, copies, tmp_path):
    (tmp_path / 'pictures').mkdir()
    picture = tmp_path / 'pictures' / 'samples.png'
    sample_grid(digits['train']['image'], digits['train']['label'], path=picture)
    write_report(
        tmp_path / 'report.md',
        copies | {'num_parameters': 700_000},
        title='Digits',
        summary='The train images themselves.',
        pictures={'Samples by class': picture},
        tables={'Loss by noise level': loss_by_noise_level(lambda t: (t, 0.01), 2)},
        config={'solver': 'heun', 'betas': (0.9, 0.99)},
    )
    text = (tmp_path / 'report.md').read_text()
    assert text.startswith('# Digits\n\nThe train images themselves.\n')
    rows = {
        line.split('|')[1].strip(): [cell.strip() for cell in line.split('|')[2:-1]]
        for line in text.split('\n')
        if '|' in line
    }
    assert rows['samples'][0] == '**1,437**'
    assert rows['Frechet ratio'][:3] == ['**1.000**', '1.000', 'lower']
    assert rows['memorised'][0] == '**100.00%**' and rows['memorised'][2] == 'lower'
    assert rows['class accuracy'][1] == format(copies['classifier_test_accuracy'], '.2%')
    assert rows['class accuracy'][2] == 'higher' and 'classifier' in rows['class accuracy'][3]
    assert rows['num parameters'][0] == '**700000**'
    assert rows['0.75'] == ['0.75', '0.01']
    assert rows['betas'] == ['`(0.9, 0.99)`']
    assert '![Samples by class](pictures/samples.png)' in text
    assert '_real' not in text and 'None' not in text and 'nan' not in text


def test_markdown_tables_keep_bars_inside_cells():
    table = markdown_table([{'a': 'x|y', 'b': 0.123456}, {'a': 'two\nlines'}])
    assert table.split('\n') == ['| a | b |', '| --- | --- |', '| x\\|y | 0.1235 |', '| two lines |  |']
    assert markdown_table([]) == '(empty)'
