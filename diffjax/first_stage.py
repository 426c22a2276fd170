"""An autoencoder as an experiment: a config with the section `task` in, a trained first stage and its report out.

The section `task` names `autoencoding` with its weights (`tasks/autoencoding.py`), and beside them

    discriminator            'none', or 'patch_discriminator:base_channels=32,depth=2'
    discriminator_optimizer  of its own; '': the same as the autoencoder's
    perceptual               'none', 'recognizer' (the one of the embedded shapes; recognizer:weights=PATH another), or
                             'lpips:weights=PATH', a safetensors file of the published weights

Clips are learned where the network has `frames` above 1, cut as the section `dataset` says; discriminator and
perceptual distance see their frames one by one.
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
from diffjax.clips import as_drawn, check_clips
from diffjax.components import check_keys, component, parse_component, section
from diffjax.core.types import PyTree
from diffjax.data import EncodingSettings, Source, from_uint8, to_uint8
from diffjax.evaluation.clips import is_clip
from diffjax.evaluation.compression import as_bytes, jpeg_psnr, pca_psnr, psnr
from diffjax.evaluation.pictures import sample_grid
from diffjax.evaluation.report import write_report
from diffjax.latents import latent_shape
from diffjax.learning import HeldOut, HeldOutSettings, check_params, check_shapes
from diffjax.nets.autoencoder import Codes
from diffjax.nets.recognizer import Recognizer, perceptual_distance
from diffjax.results import loss_picture
from diffjax.settings import ConfigError, DatasetSettings
from diffjax.tasks import Autoencoding
from diffjax.training import optimizers
from diffjax.training.loop import Settings
from diffjax.training.sharding import make_mesh, replicated
from diffjax.values import check_whole
from diffjax.weights import lpips, recognizer

KEYS = ('seed', 'task')
SECTIONS = ('dataset', 'network', 'optimizer', 'training', 'mesh', 'evaluation')
SHOWN, SHOWN_CLIPS = 10, 4  # of images, of clips, each with its reconstruction and their difference
ERROR_SCALE = 4  # by which differences are brightened
PCA_BYTES = 2**30  # of what PCA is fitted to, as float32
PCA_EXAMPLES = 4  # at least, for each component: fewer would be known by heart


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
    _check_data(source, dataset, training.batch_size)
    network = component(nets.autoencoder, config['network'], 'network', out_channels=source.image_shape[-1])()
    latent_shape(network, as_drawn(source, dataset).image_shape)  # checks it
    task, frozen = _task(config['task'], network)
    if training.init_from and task.averages_codes:
        raise ConfigError(
            'training.init_from needs task.codebook_decay = 0 here: running means of codes start from codes drawn anew'
        )
    experiment = FirstStage(
        seed=check_whole('seed', config['seed'], 0, 2**32 - 1),
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
    check_shapes(experiment)
    return experiment


def _check_data(source: Source, dataset: DatasetSettings, batch_size: int) -> None:
    if source.kind == 'latent':
        raise ConfigError(f'dataset.name: an autoencoder learns from images or clips, and {source.name} has latents')
    if source.image_shape[-1] not in (1, 3):
        raise ConfigError(f'dataset.name: pictures of 1 or 3 channels are shown, and {source.name} has 4')
    if dataset.image_fraction:
        raise ConfigError(f'dataset.image_fraction is for what denoises: here it is 0, got {dataset.image_fraction:g}')
    check_clips(source, dataset, batch_size, 0.0, told=False)


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
        if not isinstance(opened.network, Recognizer):
            raise ConfigError(f'task.perceptual compares images, and {path} holds a {type(opened.network).__name__}')

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
    """`images`, or clips, as uint8 again; `latents`, the posterior's means or the codes; `tokens` where there are some.

    Means are rounded to bytes: to 256 levels between the ends of their channel in a batch.
    """
    task, size = experiment.task, experiment.evaluation.batch_size

    @functools.partial(jax.jit, out_shardings=replicated(experiment.mesh))
    def run(params, images):
        code = task.encode(params, from_uint8(images))
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
    """Encodes and decodes held-out images or clips; writes reconstructions.png, figures.json and report.md."""
    del seed  # nothing is drawn
    workdir, network = Path(workdir), experiment.task.network
    given = experiment.source, experiment.test or experiment.source
    train, source = (as_drawn(each, experiment.dataset) for each in given)
    images = source.read(range(min(experiment.evaluation.num_samples, len(source))))[source.kind]
    found = reconstructions(experiment, params, images, progress=progress)
    if jax.process_index():
        return {}
    values, latents = math.prod(images.shape[1:]), math.prod(found['latents'].shape[1:])
    num_bytes = float(latents)
    if 'tokens' in found:
        codes = network.codebook_size or math.prod(network.levels)
        num_bytes = math.prod(found['tokens'].shape[1:]) * math.log2(codes) / 8
    what, fitted = 'clip' if is_clip(images.shape[1:]) else 'image', _for_pca(train, round(num_bytes))
    pca = pca_psnr(fitted, images, round(num_bytes))
    figures = {
        'num_samples': len(images),
        'psnr': psnr(images, found['images']),
        'psnr_pca': pca,
        'pca_examples': None if pca is None else len(fitted),
        'psnr_jpeg': jpeg_psnr(images, num_bytes) if what == 'image' else None,  # there is none of clips
        f'bytes_per_{what}': num_bytes,
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


def _for_pca(source: Source, num_components: int) -> np.ndarray | None:
    """Training images or whole clips, as many as PCA can be fitted to in memory; None where they are too few."""
    number = min(len(source), PCA_BYTES // (4 * math.prod(source.image_shape)))
    return source.read(range(number))[source.kind] if number >= PCA_EXAMPLES * num_components else None


def _write(experiment: FirstStage, workdir: Path, figures: dict, images: np.ndarray, again: np.ndarray) -> None:
    what = 'clips' if is_clip(images.shape[1:]) else 'images'
    picture = workdir / 'reconstructions.png'
    _picture(images, again, picture)
    held_out = 'Held-out' if experiment.test is not None else 'Training'
    pictures = {f'{held_out} {what}, their reconstructions, and the differences times {ERROR_SCALE}': picture}
    source, network, task = experiment.source, experiment.task.network, experiment.task
    judged = 'no discriminator' if task.discriminator is None else 'a discriminator of patches'
    perceptual = 'no perceptual distance' if task.perceptual is None else task.perceptual.name
    write_report(
        workdir / 'report.md',
        {name: value for name, value in figures.items() if value is not None},
        title=f'{source.name}: an autoencoder',
        summary=(
            f'Trained for {figures["step"]:,} steps of batch {experiment.training.batch_size} on '
            f'{source.num_examples:,} {what} with {perceptual} and {judged}. PSNR is pooled over '
            f'{figures["num_samples"]:,} {what}, in decibels.{_others(figures, what, images[0].size)}'
        ),
        pictures=pictures | loss_picture(workdir),
        config={
            'bottleneck': network.bottleneck,
            'latent channels': network.latent_channels,
            'factor': network.factor,
            **({'factor in time': network.temporal_factor} if what == 'clips' else {}),
            'seed': experiment.seed,
        },
    )
    part = workdir / 'figures.part'
    part.write_text(json.dumps(figures, indent=2) + '\n')
    os.replace(part, workdir / 'figures.json')


def _others(figures: dict, what: str, num_values: int) -> str:
    """What JPEG and PCA are given, as far as they are there."""
    pca = jpeg = ''
    if figures['psnr_pca'] is not None:
        pca = (
            f' PCA, fitted to {figures["pca_examples"]:,} whole training {what} of {num_values:,} values, has as many '
            'numbers of a byte each as the latents have values, or the tokens bytes.'
        )
    if figures['psnr_jpeg'] is not None:
        jpeg = ' JPEG is given as many bytes.'
    return pca + jpeg


def _picture(images: np.ndarray, again: np.ndarray, path: Path) -> None:
    """Rows of three, the pictures, their reconstructions and the differences: of images one, of clips one each."""
    shown = [a[:SHOWN_CLIPS] if is_clip(a.shape[1:]) else a[None, :SHOWN] for a in (images, again)]
    errors = np.abs(shown[0].astype(int) - shown[1]) * ERROR_SCALE
    rows = np.stack([*shown, np.clip(errors, 0, 255).astype(np.uint8)], axis=1)
    sample_grid(rows.reshape(-1, *images.shape[-3:]), columns=rows.shape[2], path=path)
