"""How good are samples? Features, distances, neighbours, classifiers, and the report that shows them."""

from diffjax.evaluation.classifiers import ClassAccuracy, class_accuracy, fit_svc, svc_accuracy
from diffjax.evaluation.distances import (
    Statistics,
    frechet_distance,
    frechet_distance_of_statistics,
    kernel_distance,
    statistics,
)
from diffjax.evaluation.neighbours import Memorisation, PrecisionRecall, memorisation, precision_recall
from diffjax.evaluation.noise_levels import loss_by_noise_level
from diffjax.evaluation.pictures import line_plot, sample_grid
from diffjax.evaluation.report import evaluate_samples, markdown_table, write_report

__all__ = [
    'ClassAccuracy',
    'Memorisation',
    'PrecisionRecall',
    'Statistics',
    'class_accuracy',
    'evaluate_samples',
    'fit_svc',
    'frechet_distance',
    'frechet_distance_of_statistics',
    'kernel_distance',
    'line_plot',
    'loss_by_noise_level',
    'markdown_table',
    'memorisation',
    'precision_recall',
    'sample_grid',
    'statistics',
    'svc_accuracy',
    'write_report',
]
