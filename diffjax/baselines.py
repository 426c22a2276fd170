"""Models that draw in one step, the baselines of diffusion, as experiments: a config with the section `task` in, a run
and its report out.

The section `task` names `variational` (`tasks/variational.py`) or `adversarial` (`tasks/adversarial.py`) with its
settings, and beside them the other network, an entry of `nets/generative.py` as the section `network` is:

    encoder                  of `variational`
    discriminator            of `adversarial`, and
    discriminator_optimizer  its own; '': the same as the generator's

Samples are drawn, measured and reported as those of diffusion are (`results`): sample i depends on the seed, i and its
label alone.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from diffjax import tasks
from diffjax.build import Drawing, open_split, with_averages
from diffjax.components import check_keys, component, parse_component, section
from diffjax.core.sampling import sample_keys
from diffjax.core.types import PyTree
from diffjax.data import Source
from diffjax.learning import check_params, check_shapes
from diffjax.nets import generative
from diffjax.restoring import restore_params
from diffjax.results import draw_samples, image_figures, write_results
from diffjax.run import check_labels, in_batches, to_output
from diffjax.settings import ConfigError, DatasetSettings, EvaluationSettings
from diffjax.tasks import Adversarial, Variational
from diffjax.training import optimizers
from diffjax.training.loop import Settings
from diffjax.training.sharding import batch_sharding, make_mesh, num_parts, replicated
from diffjax.values import check_whole

KEYS = ('seed', 'task')
SECTIONS = ('dataset', 'network', 'optimizer', 'training', 'mesh', 'sampler', 'evaluation')


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """The `sampler` section: with which parameters samples are drawn, and how many at once."""

    params: str = ''  # an average of training.ema; '' the first one; 'raw' for the parameters themselves
    batch_size: int = 256

    def __post_init__(self):
        if self.batch_size < 1:
            raise ConfigError(f'sampler.batch_size must be at least 1, got {self.batch_size}')

    @property
    def file_name(self) -> str:
        return f'samples-params={self.params}' if self.params else 'samples'


@dataclass(frozen=True, kw_only=True)
class Baseline(Drawing):
    """The config of a model that draws in one step, as objects."""

    task: Variational | Adversarial
    sampler: DrawSettings


def build_baseline(config: Mapping[str, Any]) -> Baseline:
    """Everything that a config describes, checked. Raises ConfigError or another ValueError in one line."""
    check_keys('the config', config, KEYS + SECTIONS, required=KEYS + SECTIONS)
    dataset = section(DatasetSettings, config, 'dataset')
    training = section(Settings, config | {'training': with_averages(config['training'])}, 'training')
    evaluation = section(EvaluationSettings, config, 'evaluation')
    sampler = section(DrawSettings, config, 'sampler')
    check_params('sampler.params', sampler.params, training.ema)
    if training.init_from or evaluation.num_likelihoods:
        raise ConfigError(
            'training.init_from and evaluation.num_likelihoods are for networks that denoise; got '
            f'{training.init_from!r} and {evaluation.num_likelihoods}'
        )
    source, test = (
        open_split(dataset, split, for_sampling=False) if split else None
        for split in (dataset.split, dataset.test_split)
    )
    if source.kind != 'image':
        raise ConfigError(
            f'dataset.name: what draws in one step learns from images, and {dataset.name} has {source.kind}s'
        )
    task, optimizer = _task(config, source, training.num_steps)
    baseline = Baseline(
        seed=check_whole('seed', config['seed'], 0, 2**32 - 1),
        dataset=dataset,
        source=source,
        test=test,
        images=source,
        test_images=test,
        latents=None,
        task=task,
        sampler=sampler,
        evaluation=evaluation,
        training=training,
        mesh=section(make_mesh, config, 'mesh'),
        optimizer=optimizer,
        config=dict(config),
    )
    baseline.comparison()  # checks itself
    check_shapes(baseline)
    return baseline


def _task(
    config: Mapping[str, Any], source: Source, num_steps: int
) -> tuple[Variational | Adversarial, optax.GradientTransformation]:
    """The task of the sections `task` and `network`, fitted to the dataset, and what its parameters are updated by."""
    name, options = parse_component(config['task'], 'task')
    classes = {'num_classes': source.num_classes}
    generator = component(generative, config['network'], 'network', **classes)()
    if not isinstance(generator, generative.PictureGenerator):
        raise ConfigError(f'network is a PictureGenerator, got {config["network"]!r}')
    optimizer = component(optimizers, config['optimizer'], 'optimizer', num_steps=num_steps)()
    if name.lower() == 'variational':
        encoder = _encoder(options, 'encoder', out_features=2 * generator.latent_size, **classes)
        given = {'generator': generator, 'encoder': encoder, **classes}
        return component(tasks.variational, {'name': name, **options}, 'task', **given)(), optimizer
    other = options.pop('discriminator_optimizer', '') or config['optimizer']
    judge = component(optimizers, other, 'task.discriminator_optimizer', num_steps=num_steps)()
    optimizer = optax.multi_transform(
        {'generator': optimizer, 'discriminator': judge}, lambda params: {part: part for part in params}
    )
    discriminator = _encoder(options, 'discriminator', out_features=1, **classes)
    given = {'generator': generator, 'discriminator': discriminator, **classes}
    return component(tasks.adversarial, {'name': name, **options}, 'task', **given)(), optimizer


def _encoder(options: dict[str, Any], key: str, **fitted: Any) -> generative.PictureEncoder:
    """The network that the section `task` names under `key`, taken out of its options."""
    spec = options.pop(key, 'PictureEncoder')
    encoder = component(generative, spec, f'task.{key}', **fitted)()
    if not isinstance(encoder, generative.PictureEncoder):
        raise ConfigError(f'task.{key} is a PictureEncoder, got {spec!r}')
    return encoder


# Samples --------------------------------------------------------------------------------------------------------------


def drawing(experiment: Baseline, at_most: int | None = None) -> Callable[..., np.ndarray]:
    """(params, labels, *, seed, progress, finish, kept) -> samples, by one compiled program.

    at_most: the number of samples that will ever be drawn at once, if that is known.
    """
    mesh, task = experiment.mesh, experiment.task
    size = min(experiment.sampler.batch_size, at_most or experiment.sampler.batch_size)
    size = -(-size // num_parts(mesh)) * num_parts(mesh)
    everywhere, split = replicated(mesh), batch_sharding(mesh)

    def draw(params, labels, key_data, start):
        keys = sample_keys(jax.random.wrap_key_data(key_data), size, start)
        labels, keys = jax.lax.with_sharding_constraint((labels, keys), split)
        return task.sample(params, (), labels, keys, experiment.sample_shape)

    program = jax.jit(draw, in_shardings=(None, *[everywhere] * 3), out_shardings=everywhere)

    def samples(params: PyTree, labels: np.ndarray, *, seed: int = 0, **how: Any) -> np.ndarray:
        key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        return in_batches(lambda part, start: program(params, part, key_data, start), labels, size, **how)

    return samples


@dataclass(frozen=True, kw_only=True, eq=False)
class BaselineRun:
    """A trained run, ready to use."""

    config: dict[str, Any]
    experiment: Baseline
    params: PyTree  # the averaged parameters that the config's sampler uses
    step: int
    draw: Callable[..., np.ndarray]

    def sample(self, labels, *, seed: int = 0) -> np.ndarray:
        """Samples for labels [N]: uint8 images [N, H, W, C]."""
        labels = check_labels(labels, self.experiment.task.num_classes, null_label=False)
        return to_output(self.experiment, self.draw(self.params, labels, seed=seed))


def load_baseline(config: dict[str, Any], workdir: str | os.PathLike) -> BaselineRun:
    """The newest checkpoint of a workdir with this config. Raises FileNotFoundError where there is none."""
    experiment = build_baseline(config)
    params, step = restore_params(experiment, workdir)
    return BaselineRun(config=config, experiment=experiment, params=params, step=step, draw=drawing(experiment))


def measure(
    experiment: Baseline, params: PyTree, workdir: Path, step: int, *, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """Draws `evaluation.num_samples` samples, measures them, and writes samples, figures.json and report.md.

    All processes draw; process 0 measures and writes, the others return {}.
    """
    drawn = draw_samples(experiment, drawing(experiment), params, workdir, seed=seed, progress=progress)
    figures = image_figures(experiment, drawn.images, drawn.labels, progress=progress)
    if jax.process_index():
        return {}
    task, source = experiment.task, experiment.source
    if isinstance(task, Variational):
        what = f'A variational autoencoder, its likelihood {task.likelihood} and beta {task.beta:g}'
        settings = {'likelihood': task.likelihood, 'beta': task.beta, 'samples': task.samples}
    else:
        what = f'A generative adversarial network, its game {task.game}'
        settings = {'game': task.game, 'R1 weight': task.r1_weight, 'R2 weight': task.r2_weight}
    summary = (
        f'{what}, trained for {step:,} steps of batch {experiment.training.batch_size} on {source.num_examples:,} '
        f'examples of {source.name}; each sample is one call of the generator, seed {seed}.'
    )
    figures |= {'step': step, 'evaluations_per_sample': 1}
    return write_results(experiment, Path(workdir), drawn, figures, summary, settings)
