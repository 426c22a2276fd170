"""--mode=encode: a dataset of images or clips becomes one of latents, by a first stage that was trained or imported."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from diffjax.build import open_split
from diffjax.clips import as_drawn
from diffjax.core.types import PyTree
from diffjax.data import EncodingSettings, from_uint8, write_encoded
from diffjax.latents import encode, latent_shape, latents_name
from diffjax.nets import Autoencoder
from diffjax.settings import ConfigError, DatasetSettings

FOLDER = 'latents'  # in a workdir


def encode_dataset(
    network: Autoencoder,
    params: PyTree,
    dataset: DatasetSettings,
    settings: EncodingSettings,
    workdir: Path,
    *,
    progress: bool = False,
) -> Path:
    """Writes `<dataset>_latents` with `mean` and `std` of each posterior (`tokens` too of codes), as float16.

    Of each clip the first frames are encoded, as many and as far apart as `dataset` says (`clips.as_drawn`).
    Returns its folder. Killed and started again it goes on, to the same bytes. See `data.write_encoded` for errors.
    """
    dataset = dataclasses.replace(
        dataset, name=settings.dataset or dataset.name, data_dir=settings.data_dir or dataset.data_dir
    )
    splits = [part.strip() for part in settings.splits.split(',')] if settings.splits else []
    splits = splits or [split for split in (dataset.split, dataset.test_split) if split]
    if bad := [split for split in splits if not split.isidentifier()]:
        raise ConfigError(f'encoding.splits are names of whole splits with commas between them, got {bad[0]!r}')
    sources = {split: as_drawn(open_split(dataset, split, for_sampling=False), dataset) for split in splits}
    if wrong := [source for source in sources.values() if source.kind == 'latent']:
        raise ConfigError(f'encoding: {wrong[0].name} has latents already')
    for source in sources.values():
        latent_shape(network, source.image_shape)  # checks it
    total = sum(len(source) for source in sources.values())
    with tqdm(total=total, unit='example', disable=not progress, dynamic_ncols=True) as bar:
        return write_encoded(
            Path(settings.out).expanduser() if settings.out else workdir / FOLDER,
            latents_name(dataset.name),
            sources,
            encoder_of(network, params),
            settings,
            encoder=encoder_record(network, params),
            process=(jax.process_index(), jax.process_count()),
            wait=_wait,
            progress=bar.update,
        )


def encoder_of(network: Autoencoder, params: PyTree):
    """uint8 [B, (T,) H, W, C] -> float16 `mean` and `std`, and `tokens` of codes, by the devices of this process."""
    mesh = Mesh(np.array(jax.local_devices()), ('images',))
    split, everywhere = NamedSharding(mesh, PartitionSpec('images')), NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, in_shardings=(everywhere, split), out_shardings=split)
    def run(params, images):
        mean, std, tokens = encode(network, params, from_uint8(images))
        found = {'mean': mean.astype(jnp.float16), 'std': std.astype(jnp.float16)}
        return found | ({} if tokens is None else {'tokens': tokens})

    placed = jax.device_put(params, everywhere)

    def encoder(images):
        missing = -len(images) % mesh.size
        images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
        return {name: np.asarray(a)[: len(images) - missing] for name, a in run(placed, images).items()}

    return encoder


def digest(params: PyTree) -> str:
    """SHA-256 of parameters and their names."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def encoder_record(network: Autoencoder, params: PyTree) -> dict[str, Any]:
    """What tells an encoder from others."""
    return {'network': _described(network), 'sha256': digest(params)}


def on_process_0(write: Callable[[], None]) -> None:
    """Every process comes out when process 0 has written."""
    if jax.process_index() == 0:
        write()
    _wait()


def _described(network: Autoencoder) -> dict[str, Any]:
    fields = (f.name for f in dataclasses.fields(network) if f.name not in ('parent', 'name'))
    return {name: getattr(network, name) for name in fields}


def _wait() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('encoding')
