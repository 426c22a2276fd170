"""An autoencoder as an experiment: a config with the section `task` in, a trained first stage and its report out.

The section `task` names `autoencoding` with its weights (`tasks/autoencoding.py`), and beside them

    discriminator            'none', or 'patch_discriminator:base_channels=32,depth=2'
    discriminator_optimizer  of its own; '': the same as the autoencoder's
    perceptual               'none', 'recognizer' (the one of the embedded shapes; recognizer:weights=PATH another), or
                             'lpips:weights=PATH', a safetensors file of the published weights
"""

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffjax import nets, tasks
from diffjax.build import open_split, with_averages
from diffjax.components import check_keys, component, parse_component, section
from diffjax.core.types import PyTree
from diffjax.data import EncodingSettings, Source, prepare, to_uint8
from diffjax.evaluation.compression import as_bytes, jpeg_psnr, pca_psnr, psnr
from diffjax.evaluation.pictures import sample_grid
from diffjax.evaluation.report import write_report
from diffjax.learning import HeldOut, HeldOutSettings, check_params
from diffjax.nets.autoencoder import Codes
from diffjax.nets.recognizer import perceptual_distance
from diffjax.results import loss_picture
from diffjax.settings import ConfigError, DatasetSettings
from diffjax.tasks import Autoencoding
from diffjax.training import optimizers
from diffjax.training.loop import Settings
from diffjax.training.sharding import make_mesh, replicated
from diffjax.weights import lpips, recognizer

KEYS = ('seed', 'task')
SECTIONS = ('dataset', 'network', 'optimizer', 'training', 'mesh', 'evaluation')
SHOWN = 10  # pictures, each with its reconstruction and their difference
ERROR_SCALE = 4  # by which differences are brightened
PCA_BYTES = 2**30  # of training images, as float32


@dataclass(frozen=True, kw_only=True)
class FirstStage(HeldOut):
    """A config of an autoencoder as objects."""

    task: Autoencoding
    encoding: EncodingSettings


def build_first_stage(config: Mapping[str, Any]) -> FirstStage:
    """Everything that a config describes, checked. Raises ConfigError or another ValueError in one line."""
    check_keys('the config', config, (*KEYS, *SECTIONS, 'encoding'), required=KEYS + SECTIONS)
    dataset = section(DatasetSettings, config, 'dataset')
    training = section(Settings, config | {'training': with_averages(config['training'])}, 'training')
    evaluation = section(HeldOutSettings, config, 'evaluation')
    check_params('evaluation.params', evaluation.params, training.ema)
    source, test = (
        open_split(dataset, split, for_sampling=False) if split else None
        for split in (dataset.split, dataset.test_split)
    )
    if source.kind == 'image' and source.image_shape[-1] not in (1, 3):
        raise ConfigError(f'dataset.name: pictures of 1 or 3 channels are shown, and {dataset.name} has 4')
    if source.kind != 'image':
        raise ConfigError(f'dataset.name: an autoencoder learns from images, and {dataset.name} has {source.kind}s')
    network = component(nets.autoencoder, config['network'], 'network', out_channels=source.image_shape[-1])()
    task, frozen = _task(config['task'], network)
    if training.init_from and task.averages_codes:
        raise ConfigError(
            'training.init_from needs task.codebook_decay = 0 here: running means of codes start from codes drawn anew'
        )
    experiment = FirstStage(
        seed=config['seed'],
        dataset=dataset,
        source=source,
        test=test,
        task=task,
        evaluation=evaluation,
        encoding=section(EncodingSettings, {'encoding': {}} | dict(config), 'encoding'),
        training=training,
        mesh=section(make_mesh, config, 'mesh'),
        optimizer=_optimizer(config, training.num_steps),
        frozen=frozen,
    )
    experiment.trainer().init(experiment.batch_spec)  # checks shapes
    return experiment


def _task(spec: Any, network: nets.Autoencoder) -> tuple[Autoencoding, PyTree]:
    """The task of the section `task`, and its frozen parameters."""
    name, options = parse_component(spec, 'task')
    options.pop('discriminator_optimizer', None)
    judge, perceptual = options.pop('discriminator', 'none'), options.pop('perceptual', 'none')
    discriminator = None if judge == 'none' else component(nets.discriminator, judge, 'task.discriminator')()
    distance, frozen = _perceptual(perceptual)
    given = {'network': network, 'discriminator': discriminator, 'perceptual': distance}
    chosen = {'name': name, **options}
    return component(tasks.autoencoding, chosen, 'task', **given)(), frozen


@dataclass(frozen=True)
class Perceptual:
    """A distance (frozen, x, y) -> [B] of pictures [B, H, W, C], and its name for a report."""

    name: str
    distance: Callable[[PyTree, jax.Array, jax.Array], jax.Array]

    def __call__(self, frozen: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return self.distance(frozen, x, y)


def _perceptual(spec: Any) -> tuple[Perceptual | None, PyTree]:
    """The distance and what is frozen, or (None, ())."""
    name, options = parse_component(spec, 'task.perceptual')
    kind, given = name.lower(), list(options)
    if kind == 'none' and not given:
        return None, ()
    if kind == 'lpips' and given == ['weights']:
        frozen = {'lpips': lpips.open_weights(options['weights'])()}

        def distance(frozen, x, y):
            return nets.LPIPS().apply({'params': frozen['lpips']}, *(_with_channels(a, 3) for a in (x, y)))

        return Perceptual('LPIPS', distance), frozen
    if kind == 'recognizer' and given in ([], ['weights']):
        path = str(options.get('weights', recognizer.SHAPES))
        opened = recognizer.open_recognizer(path)

        def distance(frozen, x, y):
            variables, pair = {'params': frozen['recognizer']}, (_with_channels(a, opened.in_channels) for a in (x, y))
            return perceptual_distance(*(opened.network.apply(variables, a, method='features') for a in pair))

        return Perceptual(f'the feature distance of {Path(path).stem}', distance), {'recognizer': opened.load()}
    raise ConfigError(
        f"task.perceptual is 'none', 'recognizer', 'recognizer:weights=PATH' or 'lpips:weights=PATH', got {spec!r}"
    )


def _with_channels(x: jax.Array, channels: int) -> jax.Array:
    """Grey pictures with equal channels, those that have them as they are."""
    if x.shape[-1] not in (1, channels):
        raise ValueError(f'task.perceptual: pictures have {x.shape[-1]} channels, and this network sees {channels}')
    return jnp.broadcast_to(x, (*x.shape[:-1], channels))


def _optimizer(config: Mapping[str, Any], num_steps: int) -> optax.GradientTransformation:
    """One for each part of the parameters, by its name."""
    whole = component(optimizers, config['optimizer'], 'optimizer', num_steps=num_steps)()
    other = parse_component(config['task'], 'task')[1].get('discriminator_optimizer') or config['optimizer']
    judge = component(optimizers, other, 'task.discriminator_optimizer', num_steps=num_steps)()
    return optax.multi_transform({'autoencoder': whole, 'discriminator': judge}, lambda params: {k: k for k in params})


# What a trained one is worth ------------------------------------------------------------------------------------------


def reconstructions(experiment: FirstStage, params: PyTree, images: np.ndarray, *, progress: bool) -> dict[str, Any]:
    """`images` as uint8 again; `latents`, the posterior's means or the codes; `tokens` where there are some.

    Means are rounded to bytes: to 256 levels between the ends of their channel in a batch.
    """
    task, size = experiment.task, experiment.evaluation.batch_size

    @functools.partial(jax.jit, out_shardings=replicated(experiment.mesh))
    def run(params, images):
        x = prepare({'image': images}, jax.random.key(0), flip=False)['x0']
        code = task.encode(params, x)
        z = code.codes if isinstance(code, Codes) else as_bytes(code.mean)
        found = {'images': to_uint8(task.decode(params, z)), 'latents': z}
        return found | ({'tokens': code.tokens} if isinstance(code, Codes) else {})

    parts = []
    for start in tqdm(range(0, len(images), size), unit='batch', disable=not progress, dynamic_ncols=True):
        part = images[start : start + size]
        padded = np.resize(part, (size, *part.shape[1:]))
        found = {name: np.asarray(a)[: len(part)] for name, a in run(params, padded).items()}
        parts.append(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure(
    experiment: FirstStage, params: PyTree, workdir: Path, step: int, *, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """Encodes and decodes held-out images; writes reconstructions.png, figures.json and report.md."""
    del seed  # nothing is drawn
    workdir, network, source = Path(workdir), experiment.task.network, experiment.test or experiment.source
    images = source.read(range(min(experiment.evaluation.num_samples, len(source))))['image']
    found = reconstructions(experiment, params, images, progress=progress)
    if jax.process_index():
        return {}
    values, latents = math.prod(images.shape[1:]), math.prod(found['latents'].shape[1:])
    num_bytes = float(latents)
    if 'tokens' in found:
        codes = network.codebook_size or math.prod(network.levels)
        num_bytes = math.prod(found['tokens'].shape[1:]) * math.log2(codes) / 8
    figures = {
        'num_samples': len(images),
        'psnr': psnr(images, found['images']),
        'psnr_pca': pca_psnr(_for_pca(experiment.source), images, round(num_bytes)),
        'psnr_jpeg': jpeg_psnr(images, num_bytes),
        'bytes_per_image': num_bytes,
        'values_per_latent_value': values / latents,
        'latent_mean': float(found['latents'].mean()),
        'latent_std': float(found['latents'].std()),
    }
    if 'tokens' in found:
        share = np.bincount(found['tokens'].ravel(), minlength=codes) / found['tokens'].size
        figures['codes_used'] = float((share > 0).mean())
        figures['perplexity'] = float(np.exp(-np.sum(share * np.log(np.maximum(share, 1e-30)))))
    _write(experiment, workdir, figures | {'step': step}, images, found['images'])
    return figures | {'step': step}


def _for_pca(source: Source) -> np.ndarray | None:
    """Training images, as many as PCA can be fitted to in memory; None where few would say little."""
    values = math.prod(source.image_shape)
    number = min(len(source), PCA_BYTES // (4 * values))
    return source.read(range(number))['image'] if number >= values else None


def _write(experiment: FirstStage, workdir: Path, figures: dict, images: np.ndarray, again: np.ndarray) -> None:
    errors = np.abs(images[:SHOWN].astype(int) - again[:SHOWN]) * ERROR_SCALE
    rows = np.concatenate([images[:SHOWN], again[:SHOWN], np.clip(errors, 0, 255).astype(np.uint8)])
    sample_grid(rows, columns=len(images[:SHOWN]), path=workdir / 'reconstructions.png')
    held_out = 'Held-out' if experiment.test is not None else 'Training'
    pictures = {
        f'{held_out} images, their reconstructions, and the differences times {ERROR_SCALE}': workdir
        / 'reconstructions.png'
    }
    pictures |= loss_picture(workdir)
    source, network, task = experiment.source, experiment.task.network, experiment.task
    judged = 'no discriminator' if task.discriminator is None else 'a discriminator of patches'
    perceptual = 'no perceptual distance' if task.perceptual is None else task.perceptual.name
    write_report(
        workdir / 'report.md',
        {name: value for name, value in figures.items() if value is not None},
        title=f'{source.name}: an autoencoder',
        summary=(
            f'Trained for {figures["step"]:,} steps of batch {experiment.training.batch_size} on '
            f'{source.num_examples:,} images with {perceptual} and {judged}. PSNR is pooled over '
            f'{figures["num_samples"]:,} images, in decibels; JPEG is given as many bytes as the latents take at one '
            'byte a value, or the tokens at their bits, and PCA, fitted to the training images, as many numbers of a '
            'byte each.'
        ),
        pictures=pictures,
        config={
            'bottleneck': network.bottleneck,
            'latent channels': network.latent_channels,
            'factor': network.factor,
            'seed': experiment.seed,
        },
    )
    part = workdir / 'figures.part'
    part.write_text(json.dumps(figures, indent=2) + '\n')
    os.replace(part, workdir / 'figures.json')
