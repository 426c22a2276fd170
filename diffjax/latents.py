"""A first stage as a diffusion experiment uses it: pictures to standardised latents, and samples back to pictures.

Clips are pictures with an axis more: `[T, H, W, C]`, and their latents `[t, h, w, c]`.

What diffusion learns is x0 = (z - shift) scale, for each channel, of latents z drawn from the posterior: of mean 0 and
standard deviation 1 over the training images, where the first stage was trained here (Rombach et al. 2022, appendix G,
and Karras et al. 2024, section 2.2, for each channel), or by the constants that a published one comes with.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.clips import as_drawn
from diffjax.core.types import PyTree
from diffjax.data import Source, open_source, to_uint8
from diffjax.nets import Autoencoder
from diffjax.nets.autoencoder import Gaussian
from diffjax.nets.tiling import decode_tiles
from diffjax.settings import ConfigError, DatasetSettings

SUFFIX = '_latents'


@dataclass(frozen=True, kw_only=True)
class FirstStageSettings:
    """The `first_stage` section of a config that learns in latents."""

    workdir: str = ''  # of an autoencoder that has been trained, or imported by python -m diffjax.weights
    config: Mapping[str, Any] | None = None  # without one: of that which is trained first, in WORKDIR/first_stage
    encoding: Mapping[str, Any] = field(default_factory=dict)  # settings of --mode=encode, beside the first stage's
    encode: str = 'once'  # the pictures become a dataset of latents; 'each_step': every batch is encoded
    tile: int = 0  # latents are decoded in squares of so many positions, all frames of each; 0: whole
    overlap: int = 2  # of these squares at least, in positions
    batch_size: int = 64  # of images, or clips, decoded at once

    def __post_init__(self):
        if self.encode not in ('once', 'each_step'):
            raise ConfigError(f"first_stage.encode is 'once' or 'each_step', got {self.encode!r}")
        if self.tile < 0 or self.batch_size < 1 or (self.tile and not 0 <= self.overlap < self.tile):
            raise ConfigError(
                'first_stage.tile is 0 or more, overlap at least 0 and below tile, batch_size at least 1; got '
                f'{self.tile}, {self.overlap} and {self.batch_size}'
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """What is needed of a first stage: when it `decodes`, it is trained; when it is `ready`, its latents are there."""

    network: Autoencoder
    params: PyTree  # on the host
    shift: np.ndarray  # [C]
    scale: np.ndarray  # [C]
    folder: Path | None  # of encoded datasets; None: every batch is encoded
    decodes: bool
    ready: bool
    settings: FirstStageSettings

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[(t,) h, w, c] of latents -> of the image or clip they stand for."""
        *frames, height, width, _ = shape
        factor, times = self.network.factor, self.network.temporal_factor
        return *((t - 1) * times + 1 for t in frames), height * factor, width * factor, self.network.out_channels

    def source(self, source: Source, dataset: DatasetSettings) -> Source:
        """What is read of a split of images or clips: itself where each batch is encoded, or else its latents.

        A blank one stands in their place where it has not been encoded yet.
        """
        if self.folder is None:
            return source
        if self.ready:
            return open_source(latents_name(source.name), source.split, data_dir=self.folder)
        cut = as_drawn(source, dataset)
        blank = np.zeros(latent_shape(self.network, cut.image_shape), np.float16)
        record = {'mean': blank, 'std': blank, 'label': 0}
        return Source(
            name=latents_name(source.name),
            split=source.split,
            kind='latent',
            image_shape=blank.shape,
            num_classes=source.num_classes,
            num_bytes=2 * blank.nbytes,
            records=(record,),
            frame_rate=cut.frame_rate,
        )

    def encode(self, frozen: PyTree, batch: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """A batch of pictures in [-1, 1] -> the same of standardised latents, drawn. frozen: `params`."""
        mean, std, _ = encode(self.network, frozen, batch['x0'])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(mean)))
        z = mean + std * jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(keys)
        return {**batch, 'x0': (z - self.shift) * self.scale}

    def decode(self, x0: np.ndarray) -> np.ndarray:
        """Standardised latents [N, (t,) h, w, c] -> uint8 images or clips, `settings.batch_size` at once."""
        decode, num_devices = self._decoder
        size = -(-self.settings.batch_size // num_devices) * num_devices  # always, so that nothing compiles again
        parts = []
        for start in range(0, len(x0), size):
            part = x0[start : start + size]
            padded = np.resize(part, (size, *part.shape[1:]))
            parts.append(np.asarray(decode(padded))[: len(part)])
        return np.concatenate(parts)

    @functools.cached_property
    def _decoder(self) -> tuple[Callable[[np.ndarray], jax.Array], int]:
        """Decodes a batch on all devices of this process, which share it; and their number."""
        tile, overlap, network = self.settings.tile, self.settings.overlap, self.network
        mesh = Mesh(np.array(jax.local_devices()), ('images',))
        split, everywhere = NamedSharding(mesh, PartitionSpec('images')), NamedSharding(mesh, PartitionSpec())

        @functools.partial(jax.jit, in_shardings=(everywhere, split), out_shardings=split)
        def run(params, x0):
            def decode(z):
                return network.apply({'params': params}, z, method='decode')

            z = network.apply({'params': params}, x0 / self.scale + self.shift, method='nearest')
            if tile and max(z.shape[-3:-1]) > tile:
                return to_uint8(decode_tiles(decode, z, tile=tile, overlap=overlap, factor=network.factor))
            return to_uint8(decode(z))

        params = jax.device_put(self.params, everywhere)
        return lambda x0: run(params, x0), mesh.size


def latent_shape(network: Autoencoder, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[(T,) H, W, C] of an image or a clip -> [(t,) h, w, c] of its latents. Raises ConfigError for what has none."""
    *frames, height, width, channels = shape
    factor, times, for_clips = network.factor, network.temporal_factor, network.frames > 1
    if for_clips != bool(frames):
        raise ConfigError(
            f'an autoencoder with frames={network.frames} takes {"clips" if for_clips else "images"}, and the dataset '
            f'has {"clips" if frames else "images"} {list(shape)}, for which it has frames={3 if frames else 1}'
        )
    if channels != network.out_channels or height % factor or width % factor:
        raise ConfigError(
            f'this autoencoder takes pictures of {network.out_channels} channels whose sides are multiples of '
            f'{factor}, and those of the dataset are {list(shape)}'
        )
    if wrong := [number for number in frames if (number - 1) % times]:
        raise ConfigError(
            f'this autoencoder takes clips of 1 more than a multiple of {times} frames, and those of the dataset have '
            f'{wrong[0]}; dataset.num_frames = {wrong[0] - (wrong[0] - 1) % times} would fit'
        )
    channels = network.latent_channels if network.bottleneck == 'kl' else network.code_channels
    return *((number - 1) // times + 1 for number in frames), height // factor, width // factor, channels


def latents_name(images: str) -> str:
    """Of a dataset of images -> of its latents: `name/config:1.0.0` -> `name_config_latents`."""
    return images.partition(':')[0].replace('/', '_') + SUFFIX


def encode(network: Autoencoder, params: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(mean, standard deviation, tokens) of the latents of pictures in [-1, 1].

    Codes are their own mean, and do not vary; tokens: None where there are no codes.
    """
    code = network.apply({'params': params}, x, method='encode')
    if isinstance(code, Gaussian):
        return code.mean, code.std, None
    return code.codes, jnp.zeros_like(code.codes), code.tokens


def moments(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) of each channel of latents drawn from N(mean, std^2): [C], [C]."""
    mean, std = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (mean, std))
    centre = mean.mean(0)
    return centre, np.sqrt((mean**2 + std**2).mean(0) - centre**2)
