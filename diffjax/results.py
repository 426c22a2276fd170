"""What a trained run leaves to look at: samples, figures and a report."""

import functools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.build import Drawing, Experiment
from diffjax.clip_figures import clip_figures
from diffjax.clips import images_of
from diffjax.core.editing import Known
from diffjax.core.likelihood import bits_per_dimension
from diffjax.core.sampling import sample_keys
from diffjax.core.types import PyTree
from diffjax.data import BYTE_WIDTH, Source, dequantize, read_all
from diffjax.edits import described, edit_figures
from diffjax.evaluation import clips
from diffjax.evaluation.image_sets import image_array
from diffjax.evaluation.noise_levels import loss_by_noise_level
from diffjax.evaluation.pictures import line_plot, sample_grid
from diffjax.evaluation.references import reference_figures
from diffjax.evaluation.report import class_figures, evaluate_samples, write_report
from diffjax.json_files import read_json
from diffjax.kept_samples import Kept
from diffjax.run import drawing, keep_samples, labels_to_draw, to_output
from diffjax.settings import ConfigError
from diffjax.training.metrics import read_rows
from diffjax.training.processes import from_process_0
from diffjax.training.sharding import batch_sharding, num_parts, replicated

HELD_OUT_EXAMPLES = 1024  # at most, for the loss by noise level


def finished(workdir: str | os.PathLike, num_steps: int) -> bool:
    """Whether the figures of a run of this length are there: in the workdir of process 0, which writes them."""
    figures = read_json(Path(workdir) / 'figures.json')
    if figures is not None and not isinstance(figures.get('step'), int):
        raise ValueError(f'{workdir}/figures.json is damaged: it has no step; remove it, and it is made anew')
    done = figures is not None and figures['step'] >= num_steps
    return from_process_0(b'yes' if done else b'') == b'yes'


def save_samples(
    stem: Path, images: np.ndarray, labels: np.ndarray, frame_rate: float = 0.0, known: Known | None = None
) -> tuple[Path, Path]:
    """(STEM.npz, STEM.png): the samples with their labels, and a grid of them by class.

    uint8 images are stored as `arr_0`, where ADM's evaluator and others look for them. Latents are stored as `latents`,
    and the grid shows their first channels. Clips are `arr_0` too, STEM.png is a sheet with a clip in each row, and
    beside it they move: STEM.gif and, with imageio-ffmpeg, STEM.mp4, `frame_rate` frames per second; 0: 8 of them.
    What was `known` of clips stands in the archive too, as `given` and its mask `known`, and beside them in pictures.
    """
    archive, picture = stem.with_suffix('.npz'), stem.with_suffix('.png')
    stem.parent.mkdir(parents=True, exist_ok=True)
    if images.dtype == np.uint8:
        kept = {} if known is None else {'given': known.x0, 'known': known.mask}
        np.savez_compressed(archive, arr_0=images, labels=labels, **kept)
        shown = images
    else:
        np.savez_compressed(archive, latents=images, labels=labels)
        low, high = np.percentile(images, [1, 99])
        shown = np.clip((images - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    if shown.shape[-1] not in (1, 3):
        shown = shown[..., : 3 if shown.shape[-1] > 3 else 1]
    if not clips.is_clip(shown.shape[1:]):
        sample_grid(shown, labels, path=picture)
        return archive, picture
    given = None if known is None else clips.known_part(known.x0[..., : shown.shape[-1]], known.mask)
    clips.contact_sheet(shown, labels, picture, given)
    moving = clips.side_by_side(shown, labels, given)
    clips.write_gif(moving, stem.with_suffix('.gif'), frame_rate)
    if clips.can_write_mp4():
        clips.write_mp4(moving, stem.with_suffix('.mp4'), frame_rate)
    return archive, picture


def all_images(source: Source) -> dict[str, np.ndarray]:
    """A whole split as `image` and perhaps `label`; of clips one frame each."""
    arrays = read_all(source)
    return {**arrays, 'image': clips.one_frame_each(arrays['video'])} if source.kind == 'video' else arrays


def held_out_loss(experiment: Experiment, params: PyTree) -> list[dict[str, float]]:
    """The target's squared error on held-out examples by noise level, with its standard error. [] without such."""
    if experiment.test is None:
        return []
    count = min(len(experiment.test), HELD_OUT_EXAMPLES)
    mesh, split = experiment.mesh, batch_sharding(experiment.mesh)
    size = -(-min(count, experiment.sampler.batch_size) // num_parts(mesh)) * num_parts(mesh)
    trainer, task = experiment.trainer(), experiment.task

    @functools.partial(jax.jit, out_shardings=split)
    def prepared(frozen, batch, start):
        batch = jax.lax.with_sharding_constraint(batch, split)
        key = jax.random.fold_in(jax.random.split(jax.random.key(experiment.seed))[1], start)
        batch = trainer.prepare(batch, key)
        return batch if trainer.encode is None else trainer.encode(frozen, batch, key)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def losses(params, batch, t, start):
        keys = sample_keys(jax.random.split(jax.random.key(experiment.seed))[0], size, start)
        keys = jax.lax.with_sharding_constraint(keys, split)
        return task.losses_at(params, batch, t, keys)

    read = experiment.test.read(range(count))
    parts = {start: prepared(trainer.frozen, _part(read, start, size), start) for start in range(0, count, size)}

    def loss_at(t):
        values = [losses(params, part, np.float32(t), np.int32(start)) for start, part in parts.items()]
        values = np.concatenate([np.asarray(part, np.float64) for part in values])[:count]
        return values.mean(), values.std() / np.sqrt(count)

    return loss_by_noise_level(loss_at, experiment.evaluation.noise_levels)


def _part(batch: PyTree, start: int, size: int) -> PyTree:
    """Examples start to start + size, the last ones repeated where there are not so many."""
    return jax.tree.map(lambda a: np.resize(a[start : start + size], (size, *a.shape[1:])), batch)


def held_out_likelihood(experiment: Experiment, params: PyTree) -> dict[str, float]:
    """Bits per dimension of held-out images, given their labels, and what they cost. {} where none are wanted.

    Each image is drawn once from the bins of its bytes (`dequantize`), so that the mean bounds the bits of the bytes
    from above. With `likelihood_t_min` above 0 it does not: the density is then that of the data blurred by noise of
    sigma / alpha there (`bits_blur`), while the images get no noise. Images whose integration ran out of steps are
    counted, and then there is no mean. As many images run at once as have `sampler.batch_size` probes between them.
    """
    settings, mesh, task = experiment.evaluation, experiment.mesh, experiment.task
    trace, num_dimensions = experiment.likelihood_trace(), math.prod(experiment.sample_shape)
    if trace is None:
        return {}
    count = min(settings.num_likelihoods, len(experiment.test))
    size = min(count, max(experiment.sampler.batch_size // trace.num_directions(num_dimensions), 1))
    size = -(-size // num_parts(mesh)) * num_parts(mesh)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def bits_of(params, batch, start):
        keys = sample_keys(jax.random.key(experiment.seed), size, start)
        batch, keys = jax.lax.with_sharding_constraint((batch, keys), batch_sharding(mesh))
        bins, probes = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x0 = dequantize(batch[experiment.source.kind], bins)
        options = {'trace': trace, 't_min': settings.likelihood_t_min, 'tolerance': settings.likelihood_tolerance}
        result = task.log_likelihood(params, {**batch, 'x0': x0}, probes, **options)
        return bits_per_dimension(result.log_density, num_dimensions, BYTE_WIDTH), result.num_evaluations

    rates = np.full(count, experiment.frame_rate, np.float32)
    images = {'label': np.zeros(count, np.int32), 'frame_rate': rates} | experiment.test_images.read(range(count))
    parts = {start: _part(images, start, size) for start in range(0, count, size)}
    compiled = bits_of.lower(params, parts[0], np.int32(0)).compile()
    bits, evaluations, began = [], [], time.perf_counter()
    for start, part in parts.items():
        for values, new in zip((bits, evaluations), compiled(params, part, np.int32(start))):
            values.extend(np.asarray(new, np.float64)[: count - start])
    seconds, failed = time.perf_counter() - began, np.isnan(bits).sum()
    cost = {'likelihood_evaluations': np.mean(evaluations), 'seconds_per_likelihood': seconds / count}
    if failed:
        return {'likelihoods_out_of_steps': int(failed), **cost}
    error = np.std(bits) / np.sqrt(count)
    if settings.likelihood_t_min:
        t, schedule = np.float64(settings.likelihood_t_min), task.objective.schedule
        cost['bits_blur'] = schedule.sigma(t) / schedule.alpha(t)
    return {'num_likelihoods': count, 'bits_per_dimension': np.mean(bits), 'bits_standard_error': error, **cost}


def image_figures(
    experiment: Drawing, images: np.ndarray, labels: np.ndarray, *, progress: bool = False
) -> dict[str, Any]:
    """How good the samples are as images, or one frame of each. {} for latents alone, and without anything real.

    In Inception's features, or against a reference: ADM's figures, by all processes together. Over pixels against the
    test split: all that there is, by process 0 alone.
    """
    settings, source, test = experiment.evaluation, experiment.images, experiment.test_images
    what = 'images'
    if clips.is_clip(images.shape[1:]):
        images, what = clips.one_frame_each(images), 'clips, one frame of each'
    classifier = {} if settings.classifier == 'svc' and test is not None and test.num_classes else None
    figures: dict[str, Any] = {}
    if comparison := experiment.comparison():
        space, reference = comparison
        real = None if settings.reference or source is None else images_of(source).first(len(images))
        samples = image_array('samples', images)
        figures |= reference_figures(samples, reference, space, real=real, progress=progress)
        if classifier is not None and not jax.process_index():
            figures |= class_figures(images, labels, all_images(source), all_images(test), classifier)
    elif test is not None and not jax.process_index():
        figures |= {'features': 'pixels', 'reference': f'{test.name} {test.split} ({len(test):,} {what})'}
        figures |= evaluate_samples(images, labels, all_images(source), all_images(test), classifier=classifier)
    return figures


class Drawn(NamedTuple):
    images: np.ndarray  # or latents
    labels: np.ndarray
    seed: int
    seconds_per_sample: float | None  # None: all were drawn before, by a command that died
    known: Known | None = None  # of clips that were made from others
    kept: Kept | None = None  # on disk, until all is written


def draw_samples(
    experiment: Drawing, draw: Callable[..., np.ndarray], params: PyTree, workdir: Path, *, seed: int, progress: bool
) -> Drawn:
    """`evaluation.num_samples` samples of all classes alike, or of the clips they are made from, none rejected or
    selected. draw: as of `run.drawing`. What a command that died has drawn is not drawn again.
    """
    if not experiment.evaluation.num_samples:
        raise ConfigError(
            'evaluation.num_samples = 0: there is nothing to measure; --num_samples says how many to draw'
        )
    edit, labels = experiment.edit(), labels_to_draw(experiment, experiment.evaluation.num_samples)
    kept = keep_samples(experiment, params, labels, seed, Path(workdir) / 'samples')
    missing = len(labels) - (kept.num_samples if kept else 0)
    finish = functools.partial(to_output, experiment)
    if missing:
        draw(params, labels[:1], seed=seed, finish=finish)  # compiles
    began = time.perf_counter()
    images = draw(params, labels, seed=seed, progress=progress, finish=finish, kept=kept)
    seconds = (time.perf_counter() - began) / missing if missing else None
    return Drawn(images, labels, seed, seconds, edit and edit.known(len(labels)), kept)


def measure(
    experiment: Experiment, params: PyTree, workdir: Path, step: int, *, seed: int, progress: bool
) -> dict[str, Any]:
    """Draws `evaluation.num_samples` samples, measures them, and writes samples, figures.json and report.md.

    All processes draw; process 0 measures and writes, the others return {}.
    """
    workdir = Path(workdir)
    drawn = draw_samples(experiment, drawing(experiment), params, workdir, seed=seed, progress=progress)
    levels, likelihood = held_out_loss(experiment, params), held_out_likelihood(experiment, params)
    figures = image_figures(experiment, drawn.images, drawn.labels, progress=progress)
    if jax.process_index():
        return {}
    if clips.is_clip(drawn.images.shape[1:]) and experiment.image_shape is not None:
        figures |= clip_figures(experiment, drawn.images, drawn.labels)
    figures |= edit_figures(drawn.images, drawn.known, experiment.windows())
    branches = 1 if experiment.guidance() is None else 2
    figures |= {'step': step, 'evaluations_per_sample': experiment.plan().num_evaluations * branches, **likelihood}
    pictures, tables = {}, {}
    if levels:
        line_plot(
            workdir / 'loss_by_noise_level.png',
            {'': tuple(zip(*((row['t'], row['loss'], row['standard_error']) for row in levels)))},
            xlabel='t (0 data, 1 noise)',
            ylabel='squared error of the target',
            yscale='log',
        )
        pictures['Loss by noise level, held-out images'] = workdir / 'loss_by_noise_level.png'
        tables['Loss by noise level, table'] = levels
    summary, settings = _described(experiment, figures, seed)
    return write_results(experiment, workdir, drawn, figures, summary, settings, pictures, tables)


def write_results(
    experiment: Drawing,
    workdir: Path,
    drawn: Drawn,
    figures: dict[str, Any],
    summary: str,
    settings: dict[str, Any],
    pictures: dict[str, Path] | None = None,
    tables: dict[str, list] | None = None,
) -> dict[str, Any]:
    """The figures with what the drawing took; samples, the curve of the loss, report.md and figures.json written."""
    if drawn.seconds_per_sample is not None:
        figures = figures | {'seconds_per_sample': drawn.seconds_per_sample}
    stem = workdir / 'samples'
    shown = {'Samples': save_samples(stem, drawn.images, drawn.labels, experiment.frame_rate, drawn.known)[1]}
    if clips.is_clip(drawn.images.shape[1:]):
        shown['Samples in motion'] = stem.with_suffix('.gif')
        mp4 = 'samples.mp4 shows the same' if clips.can_write_mp4() else clips.HOW_TO_GET_MP4
        summary += f' Each row of the sheet is a clip; {mp4}.'
    shown |= pictures or {}
    shown |= loss_picture(workdir)
    write_report(
        workdir / 'report.md',
        figures,
        title=f'{experiment.source.name}: samples and figures',
        summary=summary,
        pictures=shown,
        tables=tables,
        config=settings
        | {
            'seed of training': experiment.seed,
            'seed of sampling': drawn.seed,
            'steps': figures['step'],
            'batch size': experiment.training.batch_size,
        },
    )
    part = workdir / 'figures.part'
    part.write_text(json.dumps({**figures, 'seed': drawn.seed}, indent=2, default=float) + '\n')
    os.replace(part, workdir / 'figures.json')
    if drawn.kept is not None:
        drawn.kept.clear()
    return figures


def loss_picture(workdir: Path) -> dict[str, Path]:
    """loss.png drawn, as a picture for a report; {} without metrics.csv."""
    curve, path = loss_curve(workdir), Path(workdir) / 'loss.png'
    if not curve:
        return {}
    yscale = 'log' if min(curve[1]) > 0 else 'linear'  # of densities, and of games, it falls below 0
    line_plot(path, {'': curve}, xlabel='step', ylabel='training loss', yscale=yscale)
    return {'Training loss': path}


def loss_curve(workdir: Path) -> tuple[list[float], list[float]] | None:
    """(steps, losses) of metrics.csv; None without it."""
    rows = [row for row in read_rows(Path(workdir) / 'metrics.csv') if row.get('loss')]
    return ([int(row['step']) for row in rows], [float(row['loss']) for row in rows]) if rows else None


def _described(experiment: Experiment, figures: dict, seed: int) -> tuple[str, dict[str, Any]]:
    """What the report says in a sentence, and the settings it lists."""
    objective, sampler = experiment.task.objective, experiment.sampler
    network = type(objective.parameterization).__name__, type(objective.schedule).__name__
    summary = (
        f'A network that predicts {network[0]} on the {network[1]} schedule, trained for {figures["step"]:,} steps of '
        f'batch {experiment.training.batch_size} on {experiment.source.num_examples:,} examples of '
        f'{experiment.source.name}; sampled with {", ".join(f"{k} {v}" for k, v in sampler.what.items())} at guidance '
        f'{sampler.guidance:g}, seed {seed}.' + described(experiment.edit(), sampler.known, experiment.windows())
    )
    if 'bits_blur' in figures:
        summary += (
            f' Bits per dimension are those of the density blurred by noise of {figures["bits_blur"]:.2g}, where '
            'the likelihood starts (likelihood_t_min), and no bound on those of the bytes.'
        )
    settings = sampler.what | {'guidance': sampler.guidance} | sampler.chosen
    return summary, settings | {'label_drop': experiment.task.label_drop}


def summary_lines(figures: dict[str, Any]) -> list[str]:
    """The figures that the terminal shows at the end."""
    shown = {
        'psnr': 'PSNR {:.2f} dB of held-out images, reconstructed',
        'psnr_pca': '  {:.2f} dB by as many principal components',
        'psnr_jpeg': '  {:.2f} dB by JPEG in as many bytes',
        'codes_used': '{:.1%} of the codes are used',
        'class_accuracy': 'class accuracy {:.2%}',
        'frechet_distance': 'Frechet distance {:.4g}',
        'features': '  between samples and reference in {}',
        'frechet_ratio': '  {:.3f} times that of real train images',
        'spatial_frechet_distance': 'spatial Frechet distance {:.4g}',
        'inception_score': 'Inception Score {:.4g}',
        'precision': 'precision {:.3f}',
        'recall': 'recall {:.3f}',
        'memorised_fraction': 'memorised {:.2%}',
        'bits_per_dimension': '{:.4f} bits per dimension of held-out images',
        'bits_blur': 'of the density blurred by noise of {:.2g}: likelihood_t_min is above 0',
        'likelihoods_out_of_steps': '{} likelihoods ran out of steps: raise likelihood_tolerance or likelihood_t_min',
        'frechet_video_distance': 'Frechet video distance {:.4g}',
        'flicker_ratio': 'flicker {:.3f} times that of real clips',
        'class_constancy': '{:.1%} of single bodies keep their class in all frames',
        'seam_rank': 'rank of the frame differences where windows join {:.3f} (0.5: no seam shows)',
        'seconds_per_sample': '{:.2g} s per sample',
        'evaluations_per_sample': '{} network evaluations per sample',
    }
    return [text.format(figures[name]) for name, text in shown.items() if figures.get(name) is not None]
