"""What comes before diffusion in latents: a first stage, trained or found, and the dataset of its latents.

A config's section `first_stage` (latents.FirstStageSettings) has the config of an autoencoder, which is trained in
WORKDIR/first_stage, or the workdir of one that is there: a run of diffjax's, or published weights that
`python -m diffjax.weights` has imported. Its latents are written once, beside it, or made for every batch. By which
numbers they are standardised stays in the workdir of what learns in them, with the digest of the autoencoder's
parameters: latents of another one, or of another state of it, are told apart.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax import weights
from diffjax.build import open_split
from diffjax.clips import as_drawn
from diffjax.components import parse_component, section
from diffjax.core.types import PyTree
from diffjax.data import DatasetNotPrepared, EncodingSettings, Source, UnknownDataset, open_source
from diffjax.encoding import FOLDER as LATENTS
from diffjax.encoding import encode_dataset, encoder_of, encoder_record, on_process_0
from diffjax.first_stage import FirstStage, build_first_stage
from diffjax.json_files import read_json, write_json
from diffjax.latents import FirstStageSettings, Latents, latent_shape, latents_name, moments
from diffjax.nets import Autoencoder
from diffjax.restoring import on_host, restore_params
from diffjax.results import finished
from diffjax.settings import ConfigError, DatasetSettings
from diffjax.training.sharding import make_mesh
from diffjax.workdir import read_config

FOLDER = 'first_stage'  # in a workdir
STANDARD = 'latent_moments.json'  # in the workdir of what learns in latents
MOMENT_EXAMPLES = 2048  # of which they are measured, where every batch is encoded


class Found(NamedTuple):
    """A first stage as far as it is there."""

    network: Autoencoder
    params: PyTree  # of the network, on the host; shapes before it is trained
    trained: bool
    constants: tuple[Any, Any] | None  # (shift, scale) that a published one comes with
    folder: Path  # beside which its latents are kept
    encoding: EncodingSettings
    experiment: FirstStage | None


def open_latents(config: Mapping[str, Any], workdir: str | Path) -> Latents | None:
    """The first stage of a config, as far as it is there; None where the config has none.

    Raises ConfigError where the latents on disk are another autoencoder's.
    """
    settings = settings_of(config)
    if settings is None:
        return None
    found, dataset = find(settings, Path(workdir)), section(DatasetSettings, config, 'dataset')
    standard, there = None, False
    if found.trained:
        standard = _standard(found, dataset, Path(workdir))
        there = settings.encode == 'each_step' or _is_encoded(found, dataset)
    shift, scale = standard or (0.0, 1.0)
    return Latents(
        network=found.network,
        params=found.params,
        shift=np.float32(shift),
        scale=np.float32(scale),
        folder=found.folder / LATENTS if settings.encode == 'once' else None,
        decodes=standard is not None,
        ready=standard is not None and there,
        settings=settings,
    )


def open_ready(config: Mapping[str, Any], workdir: str | Path, *, for_sampling: bool) -> Latents | None:
    """As `open_latents`, of a run that has been trained.

    Raises ConfigError where the first stage is not there, or, but for sampling, its latents.
    """
    latents = open_latents(config, workdir)
    if latents is not None and not (latents.decodes if for_sampling else latents.ready):
        missing = 'its latents are' if latents.decodes else f'it, or {Path(workdir) / STANDARD}, is'
        raise ConfigError(f'first_stage: {missing} not there; --mode=train makes what is missing, and goes on')
    return latents


def settings_of(config: Mapping[str, Any]) -> FirstStageSettings | None:
    """The section `first_stage`; None without one, or where it names no first stage."""
    if not config.get('first_stage'):
        return None
    settings = section(FirstStageSettings, config, 'first_stage')
    if settings.workdir or settings.config:
        return settings
    if settings != FirstStageSettings():
        raise ConfigError(
            'first_stage has settings and no first stage: give it the workdir of an autoencoder, or the config of one '
            'that is trained first'
        )
    return None


def find(settings: FirstStageSettings, workdir: Path) -> Found:
    """Raises ConfigError where there is no autoencoder in the workdir that the settings name, or no trained one."""
    folder = Path(settings.workdir).expanduser() if settings.workdir else workdir / FOLDER
    encoding = section(EncodingSettings, {'encoding': settings.encoding}, 'encoding')
    if (folder / 'network.json').exists():
        there = weights.load(folder)
        if not isinstance(there.network, Autoencoder):
            raise ConfigError(f'first_stage.workdir: {folder} holds a {type(there.network).__name__}, no autoencoder')
        constants = there.network.latent_shift, there.network.latent_scale
        return Found(there.network, there.params, True, constants, workdir, encoding, None)
    config = read_config(folder) if settings.workdir else settings.config
    if config is None:
        raise ConfigError(f'first_stage.workdir: {folder} holds neither a run nor imported weights')
    if 'training' not in config:
        raise ConfigError(f'first_stage.config is the config of an autoencoder, and lacks training: {list(config)}')
    trained = finished(folder, config['training']['num_steps'])
    if settings.workdir and not trained:
        raise ConfigError(f'first_stage.workdir: {folder} is not finished: train it first, by --workdir={folder}')
    experiment = build_first_stage(_for_use(config) if trained else config)
    if trained:
        params = on_host(restore_params(experiment, folder)[0], experiment.mesh)
    else:
        params = experiment.trainer().init(experiment.batch_spec)[1].params
    encoding = encoding if settings.encoding else experiment.encoding
    network = experiment.task.network
    return Found(network, params['autoencoder'], trained, None, folder, encoding, experiment)


def _for_use(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that asks for nothing but the parameters: no mesh of its own, no files that training alone reads."""
    devices = make_mesh().size
    training = config['training'] | {'batch_size': devices, 'num_microbatches': 1, 'init_from': ''}
    name, options = parse_component(config['task'], 'task')
    task = {'name': name, **options, 'perceptual': 'none'}
    return {**config, 'mesh': {'data': -1, 'fsdp': 1}, 'training': training, 'task': task}


def _standard(found: Found, dataset: DatasetSettings, workdir: Path) -> tuple[Any, Any] | None:
    """(shift, scale) of what is learned; None: not known yet.

    Of a dataset of latents they are dataset.latent_scale, or its own moments; of images those of the published
    autoencoder, or the moments that were measured when learning began.
    """
    source = open_split(dataset, dataset.split, for_sampling=True)
    if source.kind == 'latent' and dataset.latent_scale:
        return 0.0, dataset.latent_scale
    if source.kind == 'latent' and source.moments:
        return _from(source.moments)
    if source.kind == 'latent':
        raise ConfigError(
            f'dataset.latent_scale = 0 takes the moments of a dataset that --mode=encode has made, and {source.name} '
            'has none: give the number, such as 0.18215'
        )
    if found.constants:
        return found.constants
    if (known := read_json(workdir / STANDARD)) is None:
        return None
    if known.get('encoder') != _record(found):
        raise ConfigError(f'{workdir} learned in latents of another autoencoder than the one in {found.folder} now')
    return _from(known)


def _from(known: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(known['mean']), 1 / np.array(known['std'])


def _record(found: Found) -> dict[str, Any]:
    """What tells an encoder from others, as it comes back from JSON."""
    return json.loads(json.dumps(encoder_record(found.network, found.params)))


def _is_encoded(found: Found, dataset: DatasetSettings) -> bool:
    """Whether latents are there; a dataset that has latents itself needs no others."""
    source = open_split(dataset, dataset.split, for_sampling=True)
    if source.kind == 'latent':
        return True
    folder = found.folder / LATENTS
    try:
        latents = open_source(latents_name(source.name), dataset.split, data_dir=folder)
    except (DatasetNotPrepared, UnknownDataset):
        return False
    if latents.encoder != _record(found):
        raise ConfigError(
            f'{folder / latents.name} holds latents of another autoencoder than the one in {found.folder} now: remove '
            'them, and they are made anew'
        )
    cut = as_drawn(source, dataset)
    shapes = latent_shape(found.network, cut.image_shape), latents.image_shape
    wanted, there = (
        f'{list(shape)}{f" of {rate:g} frames a second" if rate else ""}'
        for shape, rate in zip(shapes, (cut.frame_rate, latents.frame_rate))
    )
    if wanted != there:
        raise ConfigError(
            f'{folder / latents.name} holds latents {there}, and the section dataset asks for {wanted}: remove them, '
            'and they are made anew'
        )
    return True


def make_ready(
    config: Mapping[str, Any],
    workdir: Path,
    train: Callable[[Mapping[str, Any], FirstStage, Path], bool],
    announce: Callable[[str], None],
    *,
    progress: bool,
) -> bool:
    """Trains the first stage and encodes the images, where that has not been done; False where training was stopped.

    train: (config, experiment, workdir) -> whether it came to its end.
    """
    settings = settings_of(config)
    found = find(settings, workdir)
    if not found.trained:
        announce(f'the first stage, in {found.folder}')
        if not train(settings.config, found.experiment, found.folder):
            return False
        found = find(settings, workdir)
    dataset = section(DatasetSettings, config, 'dataset')
    images = as_drawn(open_split(dataset, dataset.split, for_sampling=True), dataset)
    if images.kind == 'latent':
        return True
    if settings.encode == 'once' and not _is_encoded(found, dataset):
        announce(f'encoding {dataset.name} into {found.folder / LATENTS}')
        splits = {split.partition('[')[0] for split in (dataset.split, dataset.test_split) if split}
        encoding = replace(found.encoding, dataset='', data_dir='', out='', splits=','.join(sorted(splits)))
        encode_dataset(found.network, found.params, dataset, encoding, found.folder, progress=progress)
    if not found.constants and not (workdir / STANDARD).exists():
        on_process_0(lambda: _write_standard(found, images, workdir, settings))
    return True


def _write_standard(found: Found, images: Source, workdir: Path, settings: FirstStageSettings) -> None:
    if settings.encode == 'once':
        known = open_source(latents_name(images.name), images.split, data_dir=found.folder / LATENTS).moments
    else:
        known = _measured(found, images)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / STANDARD, {**known, 'encoder': _record(found), 'dataset': images.name})


def _measured(found: Found, images: Source) -> dict[str, list[float]]:
    size, encoder = found.encoding.batch_size, encoder_of(found.network, found.params)
    count = min(MOMENT_EXAMPLES, len(images))
    parts = [encoder(images.read(range(at, min(at + size, count)))[images.kind]) for at in range(0, count, size)]
    mean, std = moments(*(np.concatenate([part[name] for part in parts]) for name in ('mean', 'std')))
    return {'mean': mean.tolist(), 'std': std.tolist()}
