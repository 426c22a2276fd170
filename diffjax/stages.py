"""What comes before diffusion in latents: a first stage, trained or found, and the dataset of its latents.

A config's section `first_stage` (latents.FirstStageSettings) has the config of an autoencoder, which is trained in
WORKDIR/first_stage, or the workdir of one that is there: a run of diffjax's, or published weights that
`python -m diffjax.weights` has imported. Its latents are written once, beside it, or made for every batch.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax import weights
from diffjax.build import open_split
from diffjax.components import section
from diffjax.core.types import PyTree
from diffjax.data import DatasetNotPrepared, EncodingSettings, Source, UnknownDataset, open_source
from diffjax.encoding import FOLDER as LATENTS
from diffjax.encoding import encode_dataset, encoder_of
from diffjax.first_stage import FirstStage, build_first_stage
from diffjax.latents import SUFFIX, FirstStageSettings, Latents, moments
from diffjax.nets import Autoencoder
from diffjax.restoring import on_host, restore_params
from diffjax.settings import ConfigError, DatasetSettings
from diffjax.workdir import read_config, write_json

FOLDER = 'first_stage'  # in a workdir
MOMENTS = 'latent_moments.json'  # of latents that are made for every batch
MOMENT_IMAGES = 2048


class Found(NamedTuple):
    """A first stage as far as it is there."""

    network: Autoencoder
    params: PyTree  # of the network; shapes before it is trained
    trained: bool
    constants: tuple[Any, Any] | None  # (shift, scale) that a published one comes with
    folder: Path  # beside which its latents are kept
    encoding: EncodingSettings
    experiment: FirstStage | None


def open_latents(config: Mapping[str, Any], workdir: str | Path) -> Latents | None:
    """The first stage of a config, as far as it is there; None where the config has none."""
    settings = settings_of(config)
    if settings is None:
        return None
    found = find(settings, Path(workdir))
    dataset = section(DatasetSettings, config, 'dataset')
    encoded = found.folder / LATENTS if settings.encode == 'once' else None
    there = encoded is None or _is_encoded(dataset, encoded)
    standard = found.constants or (_standard(found, dataset, encoded) if found.trained and there else None)
    shift, scale = standard or (0.0, 1.0)
    return Latents(
        network=found.network,
        params=found.params,
        shift=np.float32(shift),
        scale=np.float32(scale),
        folder=encoded,
        ready=standard is not None and there,
        settings=settings,
    )


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
    """Raises ConfigError where there is no autoencoder in the workdir that the settings name."""
    folder = Path(settings.workdir).expanduser() if settings.workdir else workdir / FOLDER
    if (folder / 'network.json').exists():
        there = weights.load(folder)
        if not isinstance(there.network, Autoencoder):
            raise ConfigError(f'first_stage.workdir: {folder} holds a {type(there.network).__name__}, no autoencoder')
        constants = there.network.latent_shift, there.network.latent_scale
        return Found(there.network, there.params, True, constants, workdir, EncodingSettings(), None)
    config = read_config(folder) if settings.workdir else settings.config
    if config is None:
        raise ConfigError(f'first_stage.workdir: {folder} holds neither a run nor imported weights')
    experiment = build_first_stage(config)
    try:
        params = on_host(restore_params(experiment, folder)[0], experiment.mesh)
        trained = (folder / 'figures.json').exists()
    except FileNotFoundError:
        if settings.workdir:
            raise
        params, trained = experiment.trainer().init(experiment.batch_spec)[1].params, False
    network = experiment.task.network
    return Found(network, params['autoencoder'], trained, None, folder, experiment.encoding, experiment)


def _standard(found: Found, dataset: DatasetSettings, encoded: Path | None) -> tuple[Any, Any] | None:
    """(shift, scale) by which latents of this dataset have mean 0 and standard deviation 1. None: not known yet."""
    path = found.folder / MOMENTS
    if (source := open_split(dataset, dataset.split, for_sampling=True)).kind == 'latent':
        known = source.moments
    elif encoded is not None:
        known = open_source(dataset.name + SUFFIX, dataset.split, data_dir=encoded).moments
    else:
        known = json.loads(path.read_text()) if path.exists() else None
    return (np.array(known['mean']), 1 / np.array(known['std'])) if known else None


def _is_encoded(dataset: DatasetSettings, folder: Path) -> bool:
    """Whether latents are there; a dataset that has latents itself needs no others."""
    try:
        source = open_split(dataset, dataset.split, for_sampling=True)
        return source.kind == 'latent' or bool(open_source(source.name + SUFFIX, dataset.split, data_dir=folder))
    except (DatasetNotPrepared, UnknownDataset):
        return False


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
    if settings.encode == 'each_step':
        if not found.constants and not (found.folder / MOMENTS).exists():
            write_json(found.folder / MOMENTS, _measured(found, open_split(dataset, dataset.split, for_sampling=False)))
    elif not _is_encoded(dataset, found.folder / LATENTS):
        announce(f'encoding {dataset.name} into {found.folder / LATENTS}')
        encode_dataset(found.network, found.params, dataset, found.encoding, found.folder, progress=progress)
    return True


def _measured(found: Found, images: Source) -> dict[str, list[float]]:
    size, encoder = found.encoding.batch_size, encoder_of(found.network, found.params)
    whole = range(0, min(MOMENT_IMAGES, len(images)) - size + 1, size)
    parts = [encoder(images.read(range(start, start + size))['image']) for start in whole]
    mean, std = moments(*(np.concatenate([part[name] for part in parts]) for name in ('mean', 'std')))
    return {'mean': mean.tolist(), 'std': std.tolist()}
