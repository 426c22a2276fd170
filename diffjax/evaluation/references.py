"""Reference statistics as ADM publishes them, and the figures of samples against them.

An ADM reference is an NPZ archive (`VIRTUAL_imagenet256_labeled.npz`, say) with some of

    mu [2048], sigma [2048, 2048]        mean and covariance of Inception's averages over the whole data set
    mu_s [2023], sigma_s [2023, 2023]    of its spatial features
    arr_0 uint8 [10000, H, W, 3]         images, for precision and recall; for all else, where there are no moments

Figures follow ADM's evaluator (Dhariwal & Nichol 2021, arXiv:2105.05233): FID (Heusel et al. 2017), sFID (Nash et al.
2021, arXiv:2103.03841) on the spatial features, the Inception Score, and precision and recall with k = 3 against all
images in the reference. Archives of pytorch-fid or EDM (`mu`, `sigma`) do too, for the resize they were made with.
"""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.evaluation.collection import Collected, collect
from diffjax.evaluation.distances import Statistics, frechet_distance_of_statistics
from diffjax.evaluation.image_sets import ImageSet, archived_images, array_names, open_images
from diffjax.evaluation.neighbours import precision_recall
from diffjax.evaluation.spaces import Space

NUM_NEIGHBOURS = 3
MAX_DIMENSION = 2**14  # a covariance of 2 GB


class Reference(NamedTuple):
    """What samples are measured against: moments, images, or both."""

    name: str
    statistics: Statistics | None
    spatial: Statistics | None
    images: ImageSet | None


def image_reference(images: ImageSet) -> Reference:
    return Reference(f'{images.name} ({images.shape[0]:,} images)', None, None, images)


def read_reference(path: str | os.PathLike) -> Reference:
    """An archive as above, or a folder of pictures. Raises ValueError, FileNotFoundError for what is neither."""
    path = Path(path)
    if path.is_dir():
        return image_reference(open_images(path))
    names = array_names(path)
    statistics, spatial = (_moments(path, names, *pair) for pair in (('mu', 'sigma'), ('mu_s', 'sigma_s')))
    images = archived_images(path)
    if statistics is None and images is None:
        raise ValueError(f'{path} is no reference: it holds {", ".join(names)}; needed: mu and sigma, or arr_0')
    parts = ['moments'] if statistics else []
    parts += [f'{images.shape[0]:,} images'] if images else []
    return Reference(f'{path.name} ({" and ".join(parts)})', statistics, spatial, images)


def write_reference(path: str | os.PathLike, collected: Collected) -> None:
    """The moments of a set of images as ADM's archives have them."""
    arrays = {'mu': collected.moments.statistics.mean, 'sigma': collected.moments.statistics.covariance}
    if collected.spatial is not None:
        arrays |= {'mu_s': collected.spatial.statistics.mean, 'sigma_s': collected.spatial.statistics.covariance}
    with open(path, 'wb') as file:  # a file: np.savez would add a suffix to a name
        np.savez(file, **arrays)


def check_reference(reference: Reference, space: Space, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless samples `[H, W, C]` can be measured against it in this space. Computes nothing."""
    sizes = space.dimensions(image_shape)
    if sizes[0] > MAX_DIMENSION:
        raise ValueError(
            f'{space.name} of {list(image_shape)} have {sizes[0]:,} dimensions, too many for a covariance; '
            "'inception' has 2048"
        )
    for statistics, size, what in zip((reference.statistics, reference.spatial), sizes, ('features', 'spatial ones')):
        if statistics is not None and size and len(statistics.mean) != size:
            raise ValueError(
                f'{reference.name} holds moments of {len(statistics.mean)} {what}, and {space.name} have {size}'
            )
    images = reference.images
    if images is not None and space.dimensions(images.shape[1:])[0] != sizes[0]:
        raise ValueError(
            f'{reference.name} holds images of {list(images.shape[1:])}, and the samples are {list(image_shape)}'
        )


def reference_figures(
    samples: ImageSet,
    reference: Reference,
    space: Space,
    *,
    real: ImageSet | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """ADM's figures of samples. All processes call it, and all return the same.

    Args:
      real: real images in the place of the samples, for what a perfect model would show; as many as there are samples.

    Returns plain numbers, and the names of `features` and `reference`. A figure without what it needs is left out.
    Raises ValueError, before anything is computed, where sizes do not fit.
    """
    check_reference(reference, space, samples.shape[1:])
    found = collect(samples, space, progress=progress)
    known = None if reference.images is None else collect(reference.images, space, progress=progress)
    target = reference.statistics or known.moments.statistics
    figures = {
        'features': space.name,
        'reference': reference.name,
        'num_samples': found.count,
        'frechet_distance': frechet_distance_of_statistics(found.moments.statistics, target),
        'images_per_second': found.images_per_second,
    }
    if found.inception_score is not None:
        figures['inception_score'] = found.inception_score
    spatial = reference.spatial
    if spatial is None and reference.statistics is None and known.spatial is not None:
        spatial = known.spatial.statistics
    if spatial is not None and found.spatial is not None:
        figures['spatial_frechet_distance'] = frechet_distance_of_statistics(found.spatial.statistics, spatial)
    if known is not None and min(len(known.points), len(found.points)) > NUM_NEIGHBOURS:
        precision, recall = precision_recall(known.points, found.points, k=NUM_NEIGHBOURS)
        figures |= {'precision': precision, 'recall': recall}
    if real is not None:
        figures |= _real_figures(collect(real, space, progress=progress), known, target, figures)
    return figures


def _real_figures(
    real: Collected, known: Collected | None, target: Statistics, figures: dict[str, Any]
) -> dict[str, Any]:
    distance = frechet_distance_of_statistics(real.moments.statistics, target)
    ratio = figures['frechet_distance'] / distance if distance else float('inf')
    found = {'frechet_distance_train': distance, 'frechet_ratio': ratio}
    if 'precision' in figures and len(real.points) > NUM_NEIGHBOURS:
        precision, recall = precision_recall(known.points, real.points, k=NUM_NEIGHBOURS)
        found |= {'precision_real': precision, 'recall_real': recall}
    return found


def _moments(path: Path, names: list[str], mean: str, covariance: str) -> Statistics | None:
    """Two arrays of an archive, checked; None where neither is there."""
    there = [name for name in (mean, covariance) if name in names]
    if not there:
        return None
    if len(there) == 1:
        raise ValueError(f'{path} holds {there[0]} alone; {mean} and {covariance} belong together')
    try:
        with np.load(path, allow_pickle=False) as archive:
            a, b = (np.asarray(archive[name], np.float64) for name in (mean, covariance))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if a.ndim != 1 or b.shape != 2 * a.shape:
        raise ValueError(f'{path}: {mean} [D] and {covariance} [D, D] are needed, got {list(a.shape)}, {list(b.shape)}')
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f'{path}: {mean} or {covariance} holds NaN or infinity')
    return Statistics(a, b)
