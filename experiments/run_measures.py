"""How samples of a trained run are measured, whichever study drew them."""

import numpy as np

from diffjax.build import Experiment
from diffjax.data import read_all
from diffjax.evaluation import fit_svc, frechet_distance_of_statistics, statistics
from diffjax.evaluation.features import pixels


def has_test_images(experiment: Experiment) -> bool:
    return experiment.source.kind == 'image' and experiment.test is not None


class Measures:
    """Frechet distance to the test images over raw pixels, and the run's classifier, where it has one."""

    def __init__(self, experiment: Experiment):
        self._train = read_all(experiment.source)
        self._test = statistics(pixels(read_all(experiment.test)['image']))
        wanted = experiment.evaluation.classifier == 'svc'
        self._classify = fit_svc(self._train['image'], self._train['label']) if wanted else None

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """images: uint8 [N, H, W, C] of the classes `labels`, [N]."""
        figures = {'frechet_distance': self._distance(images)}
        if self._classify is not None:
            figures['class_accuracy'] = float(np.mean(self._classify(images) == labels))
        return figures

    def of_real(self, num: int | None = None) -> float:
        """The distance of so many train images, or of all."""
        return self._distance(self._train['image'][:num])

    def _distance(self, images: np.ndarray) -> float:
        return frechet_distance_of_statistics(statistics(pixels(images)), self._test)
