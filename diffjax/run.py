"""A trained run: samples from it, and its averages of other lengths."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffjax.build import ConfigError, Drawing, Experiment, SamplerSettings, build_plan
from diffjax.core.editing import Known, Windows
from diffjax.core.guidance import Guidance
from diffjax.core.sampling import pad, sample_keys
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import Plan
from diffjax.core.transforms import NO_TRANSFORMS, Transforms
from diffjax.core.types import Model, PyTree
from diffjax.data import from_uint8, to_uint8
from diffjax.kept_samples import Kept, digest_of
from diffjax.tasks import Denoising
from diffjax.training.checkpoints import abstract, checksums
from diffjax.training.places import place_of
from diffjax.training.posthoc_ema import (
    RECONSTRUCTED,
    SNAPSHOTS,
    TREE,
    Reconstruction,
    folder_of,
    power_profiles,
    reconstruct,
)
from diffjax.training.sharding import batch_sharding, num_parts, replicated
from diffjax.training.snapshots import Snapshots

DRAW_NOTHING = 'training', 'evaluation', 'optimizer'  # sections of a config; parameters stand for what they were
MIN_SIZES = 64, 8, 2  # rows, remembered estimates, noises that plans are padded to; larger ones to powers of 2


class Sampler:
    """Draws samples through one compiled program.

    Plans are padded to common sizes and are arguments, as the settings of guidance and transforms are, and what is
    known of clips: another solver, grid, number of steps (up to the padded one), guidance scale, threshold, seed or
    mask compiles nothing. Other programs are guidance or none, each of its refinements and each transform or none,
    something known or nothing, other windows, and a larger table.
    """

    def __init__(self, task: Denoising, shape: tuple[int, ...], mesh: jax.sharding.Mesh, batch_size: int):
        self._mesh, self._task = mesh, task
        parts = num_parts(mesh)
        self.batch_size = -(-batch_size // parts) * parts
        self.num_traces = 0

        everywhere, split = replicated(mesh), batch_sharding(mesh)

        def draw(params, plan, guidance, transforms, labels, baseline, key_data, start, frame_rate, known, windows):
            self.num_traces += 1  # runs when traced, not when called
            keys = sample_keys(jax.random.wrap_key_data(key_data), self.batch_size, start)
            labels, baseline, keys = jax.lax.with_sharding_constraint((labels, baseline, keys), split)
            if known is not None:
                known = Known(jax.lax.with_sharding_constraint(from_uint8(known.x0), split), known.mask)
            whole = shape if windows is None else (windows.num_frames, *shape[1:])
            told = baseline, transforms, frame_rate, known, windows
            return task.sample(params, (), plan, guidance, labels, keys, whole, *told)

        # Arguments are NumPy arrays, alike on every process, which jit takes only where they are not to be split.
        given = None, *[everywhere] * 9
        self._draw = jax.jit(draw, in_shardings=given, out_shardings=everywhere, static_argnums=10)

    def __call__(
        self,
        params: PyTree,
        plan: Plan,
        labels: np.ndarray,
        *,
        guidance: Guidance | None = None,
        transforms: Transforms = NO_TRANSFORMS,
        negative_label: int = -1,
        frame_rate: float | None = None,
        known: Known | None = None,
        windows: Windows | None = None,
        seed: int = 0,
        progress: bool = False,
        finish: Callable[[np.ndarray], np.ndarray] = lambda x: x,
        kept: Kept | None = None,
    ) -> np.ndarray:
        """Samples [N, *shape], float32, one for each label; sample i depends on the seed, i and its label alone.

        `frame_rate` is that of clips, for a network that is told it; `known` what they keep, x0 uint8 [N, T, H, W, C]
        and mask [T, H, W, 1]; `windows` are those in which longer clips are made. `finish` is applied to each batch:
        bytes, say, take a quarter of the memory. Batches that are `kept` are not drawn again.
        """
        sizes = len(plan.t), plan.num_remembered, plan.num_noises
        plan = pad(plan, *(max(least, 1 << max(size - 1, 0).bit_length()) for size, least in zip(sizes, MIN_SIZES)))
        plan = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, plan)
        baseline = self._task.num_classes if negative_label < 0 else negative_label
        key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        rate = None if frame_rate is None else np.float32(frame_rate)

        def draw(labels, start):
            negative = np.full_like(labels, baseline)
            kept = known
            if known is not None:
                part = known.x0[start : start + len(labels)]
                kept = Known(np.resize(part, (len(labels), *part.shape[1:])), known.mask)
            told = guidance, transforms, labels, negative, key_data, start, rate, kept
            return self._draw(params, plan, *told, windows)

        return in_batches(draw, labels, self.batch_size, progress=progress, finish=finish, kept=kept)


def in_batches(
    draw: Callable[[np.ndarray, np.ndarray], jax.Array],
    labels: np.ndarray,
    batch_size: int,
    *,
    progress: bool = False,
    finish: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    kept: Kept | None = None,
) -> np.ndarray:
    """Samples for labels [N]. draw(labels [batch_size], start): those from number `start` on, the last batch padded.

    Each batch is `kept` as soon as it is finished, and taken from there where it was drawn before.
    """
    labels, samples = np.asarray(labels, np.int32), None
    before = 0 if kept is None else kept.num_samples
    how = {'initial': before, 'unit': 'sample', 'disable': not progress, 'dynamic_ncols': True}
    with tqdm(total=len(labels), **how) as bar:
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            x = None if kept is None else kept.take(start, len(part))
            if x is None:
                x = draw(np.pad(part, (0, batch_size - len(part))), np.int32(start))
                x = finish(np.asarray(x)[: len(part)])
                if kept is not None:
                    kept.keep(start, x)
                bar.update(len(part))
            if samples is None:
                samples = np.empty((len(labels), *x.shape[1:]), x.dtype)
            samples[start : start + len(part)] = x
    return samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A trained run, ready to use."""

    config: dict[str, Any]
    experiment: Experiment
    network: Model
    params: PyTree  # the averaged parameters that the config's sampler uses
    schedule: Schedule
    step: int
    sampler: Sampler

    def sample(
        self,
        labels,
        *,
        clips: np.ndarray | None = None,
        seed: int = 0,
        guidance: float | None = None,
        **overrides: Any,
    ) -> np.ndarray:
        """Samples for labels [N]: uint8 images [N, H, W, C] or clips [N, T, H, W, C] (float32 latents, where the run
        learned latents).

        Args:
            clips: uint8 [M, T, H, W, C], what something is `known` of, in the place of those of `known_from`.
            guidance: the scale; None for the config's.
            overrides: keys of the config's `sampler` section: solver='ddim:eta=0.5', grid='karras', num_steps=20.
                Of clips, known='first_frames' (or a mask, booleans [H, W] or [T, H, W]) and num_frames=48.
                `params` and `batch_size` are chosen when the run is loaded: load(..., overrides={'sampler': {...}}).
        """
        valid = [name for name in SamplerSettings.__dataclass_fields__ if name not in ('params', 'batch_size')]
        if unknown := [name for name in overrides if name not in valid]:
            raise ConfigError(f'sample cannot change {unknown[0]!r}; valid: {", ".join(valid)}')
        settings = replace(self.experiment.sampler, **overrides)
        settings = settings if guidance is None else replace(settings, guidance=guidance)
        task = self.experiment.task
        labels = check_labels(labels, task.num_classes, null_label=task.null_label)
        edit = self.experiment.edit(settings, clips)
        x = self.sampler(
            self.params,
            build_plan(settings, self.experiment.task),
            labels,
            **self.experiment.sampling_options(settings),
            known=edit and edit.known(len(labels)),
            seed=seed,
        )
        return to_output(self.experiment, x)


def make_sampler(experiment: Experiment, at_most: int | None = None) -> Sampler:
    """at_most: the number of samples that will ever be drawn at once, if that is known."""
    size = min(experiment.sampler.batch_size, at_most or experiment.sampler.batch_size)
    return Sampler(experiment.task, experiment.sample_shape, experiment.mesh, size)


def drawing(experiment: Experiment, at_most: int | None = None) -> Callable[..., np.ndarray]:
    """(params, labels, *, seed, progress, finish, kept) -> samples, as the config's `sampler` section wants them."""
    sampler, plan, options = make_sampler(experiment, at_most), experiment.plan(), experiment.sampling_options()
    edit = experiment.edit()

    def draw(params, labels, **how):
        return sampler(params, plan, labels, known=edit and edit.known(len(labels)), **options, **how)

    return draw


def keep_samples(experiment: Drawing, params: PyTree, labels: np.ndarray, seed: int, stem: Path) -> Kept | None:
    """What has been drawn of these samples, to be filed as STEM.npz, by a command that died: in the folder STEM.parts.

    None where they are drawn at once. What they are made by is all that they depend on: a batch of other parameters,
    another plan, seed or label, another section of the config or other devices does not count.
    """
    if len(labels) <= experiment.sampler.batch_size:
        return None
    ours, mesh, latents = isinstance(experiment, Experiment), experiment.mesh, experiment.latents
    shape, device = experiment.image_shape or experiment.sample_shape, mesh.devices.flat[0]
    edit, windows = experiment.edit(), experiment.windows() if ours else None
    shape = shape if windows is None else (windows.num_frames, *shape[1:])
    made_by = {
        'parameters': np.asarray(checksums(params)),
        'latents': latents and [np.asarray(checksums(latents.params)), latents.shift, latents.scale, latents.settings],
        'sections': {name: value for name, value in experiment.config.items() if name not in DRAW_NOTHING},
        'sampler': experiment.sampler,
        'plan': ours and [experiment.plan(), experiment.sampling_options(), experiment.standardisation],
        'known': edit and edit.known(len(labels)),
        'labels': labels,
        'seed': seed,
        'devices': [device.platform, device.device_kind, dict(mesh.shape), jax.process_count()],
    }
    sample = jax.ShapeDtypeStruct(shape, np.float32 if experiment.image_shape is None else np.uint8)
    return Kept(stem.with_name(f'{stem.name}.parts'), digest_of(made_by), sample)


def reconstruct_averages(
    experiment: Experiment, workdir: str | os.PathLike, widths: list[float], step: int | None = None
) -> dict[str, Reconstruction]:
    """Averages of other widths from a run's snapshots, kept in the workdir: what `sampler.params` calls them -> each.

    step: None for the newest snapshot's. Raises FileNotFoundError where the run kept no snapshots.
    """
    place, profiles = place_of(workdir, experiment.training.checkpoints), power_profiles(experiment.training.ema)
    folder = place / SNAPSHOTS
    if not folder.is_dir() or not profiles:
        raise FileNotFoundError(
            f'{place} holds no snapshots of averages: train with power averages in training.ema, such as '
            'power:sigma_rel=0.05 and power:sigma_rel=0.10, and a training.ema_snapshot_every_steps'
        )
    snapshots = Snapshots(folder)
    _, shapes, shardings = experiment.trainer().init(experiment.batch_spec)
    step = snapshots.steps[-1] if step is None and snapshots.steps else step or 0
    made = reconstruct(snapshots, profiles, widths, step, abstract(shapes.params, shardings.params))
    for width, one in zip(widths, made):
        store = Snapshots(folder_of(Path(workdir), width, step))
        store.forget_after(-1)  # snapshots may have come or gone since it was made before
        store.save(step, {TREE: one.params})
        store.close()
    snapshots.close()
    return {f'{RECONSTRUCTED}/{width:g}/{step}': one for width, one in zip(widths, made)}


def to_output(experiment: Experiment, x: np.ndarray) -> np.ndarray:
    """uint8 images or clips; where nothing decodes them, latents as the autoencoder made them (unscaled)."""
    if experiment.latents is not None:
        return experiment.latents.decode(x)
    if experiment.source.kind != 'latent':
        return np.asarray(to_uint8(jnp.asarray(x)))
    shift, scale = experiment.standardisation
    return x / scale + shift


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ...: every class as equally often as the number allows. [N] int32."""
    return np.arange(num_samples, dtype=np.int32) % max(num_classes, 1)


def labels_to_draw(experiment: Drawing, num_samples: int) -> np.ndarray:
    """Those of the clips that samples are made from, where they have any; or all classes alike. [N] int32."""
    edit, num_classes = experiment.edit(), experiment.source.num_classes
    given = None if edit is None else edit.labels(num_samples)
    return balanced_labels(num_samples, num_classes) if given is None else check_labels(given, num_classes)


def check_labels(labels, num_classes: int, *, null_label: bool = True) -> np.ndarray:
    """Labels as int32 [N], N > 0. Raises ConfigError for one that is no class (the null, num_classes, is allowed)."""
    labels = np.atleast_1d(np.asarray(labels))
    if (
        labels.dtype.kind not in 'iu'
        or labels.ndim != 1
        or not len(labels)
        or not 0 <= labels.min() <= labels.max() <= max(num_classes - (not null_label), 0)
    ):
        raise ConfigError(f'labels are whole numbers from 0 to {max(num_classes - 1, 0)}; got {labels.tolist()}')
    return labels.astype(np.int32)
