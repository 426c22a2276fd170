"""Class accuracy against scikit-learn used directly, on the real digits."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from diffjax.data.digits.digits_dataset_builder import NUM_TRAIN, PERMUTATION_SEED
from diffjax.evaluation import class_accuracy, fit_svc, svc_accuracy


def test_accuracy_on_the_test_split_is_scikit_learns_on_its_own_arrays(digits):
    real = load_digits()
    order = np.random.RandomState(PERMUTATION_SEED).permutation(1797)  # noqa: NPY002
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    predicted = SVC(gamma=0.001, C=10).fit(real.data[train], real.target[train]).predict(real.data[test])
    ours = fit_svc(digits['train']['image'], digits['train']['label'])(digits['test']['image'])
    np.testing.assert_array_equal(ours, predicted)
    accuracy = svc_accuracy(*digits['train'].values(), digits['test']['image'], digits['test']['label'])
    assert accuracy == np.mean(predicted == real.target[test])
    assert accuracy > 0.98


def test_wrong_labels_are_wrong(digits):
    test = digits['test']
    accuracy = svc_accuracy(*digits['train'].values(), test['image'], (test['label'] + 1) % 10)
    assert accuracy < 0.02


def test_the_pixel_scale_is_used(digits):
    test = digits['test']
    images = test['image']
    wrong_scale = svc_accuracy(*digits['train'].values(), images, test['label'], gamma=0.001, pixel_max=255)
    equal_scale = svc_accuracy(
        *digits['train'].values(), images, test['label'], gamma=0.001 * (16 / 255) ** 2, pixel_max=255
    )
    assert wrong_scale < 0.6 < 0.98 < equal_scale


def test_per_class_figures_by_hand():
    overall, per_class = class_accuracy(np.array([1, 1, 2, 7]), np.array([1, 2, 2, 2]))
    assert overall == 0.5
    assert per_class == {1: 1.0, 2: pytest.approx(1 / 3)}


def test_floats_are_refused(digits):
    classify = fit_svc(digits['train']['image'][:50], digits['train']['label'][:50])
    with pytest.raises(ValueError, match='uint8 images, not float32'):
        classify(digits['test']['image'].astype(np.float32))
