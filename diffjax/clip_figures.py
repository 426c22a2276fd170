"""How good samples are as clips: how they move, whether what they show stays what it is, and how near real ones are."""

from typing import Any, NamedTuple

import numpy as np

from diffjax.build import Drawing
from diffjax.evaluation.clip_spaces import Seen
from diffjax.evaluation.distances import frechet_distance
from diffjax.evaluation.motion import bounce_residual, centres, constancy, flicker
from diffjax.evaluation.neighbours import precision_recall

BLOCK = 8  # of flicker, where it divides the sides
NUM_NEIGHBOURS = 3


class Walls(NamedTuple):
    """Between which single bodies fly on their paths (motion.py, equation 2)."""

    span: float  # in sides of the picture
    max_speed: float  # of it in a frame


PHYSICS = {'moving_digits': Walls(span=1 - 12.8 / 32, max_speed=0.07)}


def clip_figures(experiment: Drawing, clips: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Of samples uint8 [N, T, H, W, C]; {} without a test split of clips, with which all of it is compared.

    Longer clips are cut into pieces of the length of real ones, of which distances are measured.
    """
    if experiment.test_images is None:
        return {}
    real = experiment.test_images.read(range(len(experiment.test_images)))['video']
    figures = flicker_figures(clips, real[: len(clips)])
    space = experiment.clip_space()
    if space is None:
        return figures
    count = min(len(clips), len(experiment.images))
    train = experiment.images.read(range(count))['video']
    pieces = clips.shape[1] // real.shape[1]
    whole = clips[:, : pieces * real.shape[1]].reshape(-1, *real.shape[1:])
    made, known = space.see(whole), space.see(real)
    figures |= {'clip_features': space.name, **distance_figures(made, known, space.see(train))}
    if made.kinds is not None:
        made = made._replace(kinds=made.kinds.reshape(len(clips), -1), number=_all_alike(made.number, pieces))
        single, single_real = (seen.number == 1 for seen in (made, known))
        figures |= identity_figures(made, known, labels if experiment.source.num_classes else None)
        walls = PHYSICS.get(experiment.images.name)
        if walls and single.any() and single_real.any():
            figures |= path_figures(clips[single], real[single_real], walls)
    return figures


def _all_alike(numbers: np.ndarray, pieces: int) -> np.ndarray:
    """The number of bodies that all pieces of a clip have; -1 where they differ: [N * pieces] -> [N]."""
    numbers = numbers.reshape(-1, pieces)
    return np.where((numbers == numbers[:, :1]).all(1), numbers[:, 0], -1)


def flicker_figures(clips: np.ndarray, real: np.ndarray) -> dict[str, float]:
    block = int(np.gcd.reduce([BLOCK, *clips.shape[2:4]]))
    made, there = (float(flicker(each, block=block).mean()) for each in (clips, real))
    return {'flicker': made, 'flicker_real': there, 'flicker_ratio': made / there if there else float('inf')}


def distance_figures(made: Seen, known: Seen, train: Seen) -> dict[str, float]:
    """The Frechet video distance (Unterthiner et al. 2018, arXiv:1812.01717) in these features, of as many real clips
    too, and precision and recall."""
    figures = {
        'frechet_video_distance': frechet_distance(made.points, known.points),
        'frechet_video_distance_train': frechet_distance(train.points, known.points),
    }
    if min(len(made.points), len(known.points)) > NUM_NEIGHBOURS:
        precision, recall = precision_recall(known.points, made.points, k=NUM_NEIGHBOURS)
        figures |= {'video_precision': precision, 'video_recall': recall}
    return figures


def identity_figures(made: Seen, known: Seen, labels: np.ndarray | None) -> dict[str, float]:
    """Of clips in which one body is seen: how many, whether its kind stays in all frames, and is the one asked for."""
    figures = {}
    for end, seen in (('', made), ('_real', known)):
        single = seen.number == 1
        figures[f'single_clips{end}'] = float(single.mean())
        if single.any():
            figures[f'class_constancy{end}'] = constancy(seen.kinds[single])
    single = made.number == 1
    if labels is not None and single.any():
        figures['single_class_accuracy'] = float((made.kinds[single] == labels[single, None]).mean())
    return figures


def path_figures(clips: np.ndarray, real: np.ndarray, walls: Walls) -> dict[str, float]:
    """How far bodies are from the nearest path that physics has, in pixels (root mean square, median of clips)."""
    side = clips.shape[2]
    figures = {}
    for end, each in (('', clips), ('_real', real)):
        residual = bounce_residual(centres(each), walls.span * side, walls.max_speed * side)
        figures[f'path_residual{end}'] = float(np.median(residual))
    return figures
