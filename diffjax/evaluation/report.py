"""Figures of a set of samples, and a report of a run that a stranger can read."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.evaluation.classifiers import class_accuracy, fit_svc
from diffjax.evaluation.distances import frechet_distance_of_statistics, statistics
from diffjax.evaluation.features import pixels
from diffjax.evaluation.neighbours import memorisation, precision_recall


class _Figure(NamedTuple):
    """How a figure is shown: its name, its format, which way is better, what it means, and its value on real data."""

    name: str
    style: str
    better: str
    meaning: str
    real: str | float | None = None  # the key of the figure of real images, or a value


_FIGURES = {
    'num_samples': _Figure('samples', ',d', '', 'generated images that were measured; none were rejected or selected'),
    'class_accuracy': _Figure(
        'class accuracy',
        '.2%',
        'higher',
        'samples that a classifier trained on the real train images gives the class they were made for',
        'classifier_test_accuracy',
    ),
    'frechet_distance': _Figure(
        'Frechet distance',
        '.4g',
        'lower',
        'between the samples and the real test images, or the reference where one is named, in the features named',
        'frechet_distance_train',
    ),
    'spatial_frechet_distance': _Figure(
        'spatial Frechet distance', '.4g', 'lower', 'the same over features that keep their place in the image: sFID'
    ),
    'inception_score': _Figure(
        'Inception Score', '.4g', 'higher', 'how sure of a class Inception is of each sample, and unsure over all'
    ),
    'frechet_ratio': _Figure(
        'Frechet ratio',
        '.3f',
        'lower',
        'the Frechet distance divided by that of the real train images to the same test images',
        1.0,
    ),
    'precision': _Figure(
        'precision',
        '.3f',
        'higher',
        'samples that lie among the real images, within the reach of their nearest neighbours: realism',
        'precision_real',
    ),
    'recall': _Figure(
        'recall', '.3f', 'higher', 'real images that lie among the samples in the same sense: variety', 'recall_real'
    ),
    'memorised_fraction': _Figure(
        'memorised',
        '.2%',
        'lower',
        'samples closer to a train image than half the distance from it to the next train image: copies',
        'memorised_fraction_real',
    ),
    'bits_per_dimension': _Figure(
        'bits per dimension',
        '.4f',
        'lower',
        'of held-out images given their labels, at most: each byte is spread evenly over its bin',
    ),
    'seam_rank': _Figure(
        'seam rank',
        '.3f',
        '0.5',
        'of the frame differences where windows of long clips join among all differences of their clip: 0.5 shows no '
        'seam, towards 1 frames jump there; its standard error is listed below',
        0.5,
    ),
    'nearest_ratio_median': _Figure(
        'nearest ratio',
        '.3f',
        'near real',
        'median of the distance to a train image over that from it to the next train image',
        'nearest_ratio_median_real',
    ),
    'frechet_video_distance': _Figure(
        'Frechet video distance',
        '.4g',
        'lower',
        'squared 2-Wasserstein distance between samples and test clips, as Gaussians in features of whole clips',
        'frechet_video_distance_train',
    ),
    'flicker': _Figure(
        'flicker',
        '.3f',
        'near real',
        'what changes between frames and is no motion of their parts, in bytes',
        'flicker_real',
    ),
    'single_clips': _Figure('single', '.1%', 'near real', 'clips in which one body is recognised', 'single_clips_real'),
    'class_constancy': _Figure(
        'constancy',
        '.1%',
        'higher',
        'of these, clips in whose every frame it is recognised as the same',
        'class_constancy_real',
    ),
    'path_residual': _Figure(
        'path residual',
        '.3f',
        'lower',
        'pixels by which its path is off the nearest one that straight flight and the walls allow, the median',
        'path_residual_real',
    ),
}
_HIDDEN = {figure.real for figure in _FIGURES.values()} | {'class_accuracy_per_class'}


def evaluate_samples(
    images: np.ndarray,
    labels: np.ndarray | None,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    *,
    features: Callable[[np.ndarray], np.ndarray] = pixels,
    classifier: Mapping[str, float] | None = None,
    num_neighbours: int = 3,
) -> dict[str, Any]:
    """Measure samples against real images. All figures are deterministic.

    Args:
      images, labels: the samples, uint8 `[N, H, W, C]`, and the classes they were made for, `[N]`. None of them is left
        out.
      train, test: the real splits, `image` uint8 `[M, H, W, C]` and, with labels, `label` `[M]`.
      features: images -> `[N, D]`, the space of all distances.
      classifier: keyword arguments of `fit_svc`, {} for its own settings; for None, and for samples without labels, no
        class accuracy is measured.
      num_neighbours: k of precision and recall.

    Returns a dict of plain numbers. A figure that ends in `_real`, and `frechet_distance_train` and
    `classifier_test_accuracy`, is its counterpart on real data: the test images in the place of the samples for
    precision, recall, memorisation and class accuracy, the train images for the Frechet distance. Class accuracy by
    class is a dict.
    """
    sample_features, train_features, test_features = features(images), features(train['image']), features(test['image'])
    test_statistics = statistics(test_features)
    distance = frechet_distance_of_statistics(statistics(sample_features), test_statistics)
    distance_train = frechet_distance_of_statistics(statistics(train_features), test_statistics)
    figures = {
        'num_samples': len(images),
        'frechet_distance': distance,
        'frechet_distance_train': distance_train,
        'frechet_ratio': distance / distance_train if distance_train else float('inf'),
    }
    for suffix, points in (('', sample_features), ('_real', test_features)):
        precision, recall = precision_recall(train_features, points, k=num_neighbours)
        fraction, ratios = memorisation(points, train_features)
        figures |= {
            f'precision{suffix}': precision,
            f'recall{suffix}': recall,
            f'memorised_fraction{suffix}': fraction,
            f'nearest_ratio_median{suffix}': float(np.median(ratios)),
        }
    if labels is not None and classifier is not None:
        figures |= class_figures(images, labels, train, test, classifier)
    return figures


def class_figures(images, labels, train, test, classifier) -> dict[str, Any]:
    classify = fit_svc(train['image'], train['label'], **classifier)
    accuracy = class_accuracy(classify(images), labels)
    return {
        'class_accuracy': accuracy.overall,
        'class_accuracy_per_class': accuracy.per_class,
        'classifier_test_accuracy': class_accuracy(classify(test['image']), test['label']).overall,
    }


def write_report(
    path: str | os.PathLike,
    figures: Mapping[str, Any],
    *,
    title: str,
    summary: str = '',
    pictures: Mapping[str, str | os.PathLike] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a report as Markdown.

    Args:
      path: the file to write; the pictures are linked relative to its directory.
      figures: of `evaluate_samples`; others may stand among them, and are listed under their own names.
      summary: one sentence on what the run was.
      pictures: caption -> file.
      tables: caption -> rows, each a dict with the same keys.
      config: the settings worth showing, name -> value.
    """
    folder = Path(path).resolve().parent
    parts = [f'# {title}', summary] if summary else [f'# {title}']
    parts += ['## Figures', _figure_table(figures)]
    if 'class_accuracy_per_class' in figures:
        per_class = figures['class_accuracy_per_class']
        rows = [{'class': 'accuracy'} | {str(c): format(value, '.1%') for c, value in per_class.items()}]
        parts += ['Class accuracy of the samples by class:', markdown_table(rows)]
    for caption, picture in (pictures or {}).items():
        link = Path(os.path.relpath(Path(picture).resolve(), folder)).as_posix()
        parts += [f'## {caption}', f'![{caption}]({link})']
    for caption, rows in (tables or {}).items():
        parts += [f'## {caption}', markdown_table(rows)]
    if config:
        parts += ['## Settings', markdown_table([{'setting': k, 'value': f'`{v}`'} for k, v in config.items()])]
    Path(path).write_text('\n\n'.join(parts) + '\n', encoding='utf-8')


def _figure_table(figures: Mapping[str, Any]) -> str:
    """Known figures with their meaning, direction and value on real data, then the others as they are."""
    rows = []
    for key, figure in _FIGURES.items():
        if key not in figures:
            continue
        real = figures.get(figure.real) if isinstance(figure.real, str) else figure.real
        rows.append(
            {
                'figure': figure.name,
                'samples': f'**{format(figures[key], figure.style)}**',
                'real images': '' if real is None else format(real, figure.style),
                'better': figure.better,
                'what it is': figure.meaning,
            }
        )
    for key, value in figures.items():
        if key not in _FIGURES and key not in _HIDDEN:
            rows.append({'figure': key.replace('_', ' '), 'samples': f'**{_text(value)}**'})
    return markdown_table(rows)


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures as lines for a terminal: those that have a name by it, then the others as they are."""
    known = {key: format(figures[key], figure.style) for key, figure in _FIGURES.items() if key in figures}
    lines = [f'{_FIGURES[key].name}: {text}' for key, text in known.items()]
    return lines + [f'{key.replace("_", " ")}: {_text(value)}' for key, value in figures.items() if key not in known]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, with the columns of the first row. Numbers have 4 digits; a missing cell is empty."""
    if not rows:
        return '(empty)'
    columns = list(rows[0])
    lines = [columns, ['---'] * len(columns)] + [[_text(row.get(column, '')) for column in columns] for row in rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _text(value: Any) -> str:
    text = format(value, '.4g') if isinstance(value, float | np.floating) else str(value)
    return text.replace('|', '\\|').replace('\n', ' ')
