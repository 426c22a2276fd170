"""Do samples of a class look like that class? A classifier trained on the real train split answers.

The classifier is scikit-learn's support vector machine with a Gaussian kernel on raw pixels, which suits small images:
on the digits it is right on about 99 % of the real test images, with the settings of scikit-learn's own example.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class ClassAccuracy(NamedTuple):
    """How often a class was recognised. `per_class` maps each class that occurs to the fraction of its images."""

    overall: float
    per_class: dict[int, float]


def fit_svc(
    train_images: np.ndarray, train_labels: np.ndarray, *, gamma: float = 0.001, C: float = 10, pixel_max: float = 16
) -> Callable[[np.ndarray], np.ndarray]:
    """Train the classifier on uint8 images `[N, H, W, C]` with labels `[N]`; returns images -> predicted labels.

    Args:
      gamma, C: of `sklearn.svm.SVC`.
      pixel_max: pixels are scaled from 0..255 to 0..pixel_max, since gamma depends on their scale.
    """
    from sklearn.svm import SVC

    def scaled(images):
        if images.dtype != np.uint8:
            raise ValueError(f'The classifier takes uint8 images, not {images.dtype}.')
        return images.reshape(len(images), -1) * (pixel_max / 255)

    classifier = SVC(gamma=gamma, C=C).fit(scaled(train_images), train_labels)
    return lambda images: classifier.predict(scaled(images))


def class_accuracy(predicted: np.ndarray, labels: np.ndarray) -> ClassAccuracy:
    """Compare predictions with labels, `[N]` each: the fraction that agrees, overall and by class."""
    labels = np.asarray(labels)
    correct = np.asarray(predicted) == labels
    return ClassAccuracy(float(correct.mean()), {int(c): float(correct[labels == c].mean()) for c in np.unique(labels)})


def svc_accuracy(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    gamma: float = 0.001,
    C: float = 10,
    pixel_max: float = 16,
) -> float:
    """The fraction of `images` to which the classifier trained on the train split gives their own label."""
    classify = fit_svc(train_images, train_labels, gamma=gamma, C=C, pixel_max=pixel_max)
    return class_accuracy(classify(images), labels).overall
