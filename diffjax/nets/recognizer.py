"""Small networks that recognise what a picture or a clip shows: labels for classifying, features for measuring.

Residual stages of two 3x3 convolutions, each stage at half the size of the one before, then the mean over positions and
a linear layer. With `coordinates` each pixel says where it is (Liu et al. 2018, arXiv:1807.03247), which a mean over
positions would not know otherwise. The feature maps serve as a perceptual distance (`perceptual_distance`) where
published ones are not at hand, and the mean of the last as features for a Frechet distance. A clip is seen frame by
frame by such stages, which answer for each frame, and then by convolutions over time, which answer for the whole.

    d(a, b) = sum over layers l of the mean over positions of |w_l (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)|^2        (1)

is LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1), with w = 1 for each layer divided by their number here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets.layers import check_rank

__all__ = ['Recognizer', 'ClipRecognizer']

CHANGES = 8.0  # the scale of features of change in `ClipRecognizer.summary`


class Recognizer(nn.Module, kw_only=True):
    """`x: [B, H, W, C] in [-1, 1] -> logits [B, num_outputs]`; `features` gives the map of each stage.

    channels: of each stage; H and W are multiples of 2^(stages - 1), times first_stride.
    first_stride: 2 halves the size in the first stage already, whose full size costs most.
    coordinates: whether two channels of the input say where it is: y and x, -1 to 1 from the first pixel to the last.
    """

    num_outputs: int
    channels: Sequence[int] = (16, 32, 64, 96)
    num_groups: int = 8
    first_stride: int = 1
    coordinates: bool = False

    def __post_init__(self):
        check_stages(self.first_stride, self.channels, self.num_groups)
        super().__post_init__()

    def setup(self):
        self.stages = stages(self.first_stride, self.channels, self.num_groups)
        self.head = nn.Dense(self.num_outputs)

    def __call__(self, x: Array) -> jax.Array:
        return self.head(self.embed(x))

    def embed(self, x: Array) -> jax.Array:
        """The mean over positions of the last feature map: [B, channels[-1]]."""
        return self.features(x)[-1].mean((1, 2))

    def features(self, x: Array) -> list[jax.Array]:
        """The map after each stage, [B, H / (first_stride 2^i), W / (first_stride 2^i), channels[i]]."""
        check_rank('Recognizer', x, '[B, H, W, C]')
        maps, h = [], with_coordinates(jnp.asarray(x)) if self.coordinates else jnp.asarray(x)
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps


class ClipRecognizer(nn.Module, kw_only=True):
    """`x: [B, T, H, W, C] in [-1, 1] -> logits [B, T * num_frame_outputs + rest]`, `num_outputs` of them.

    Those of the frames come first, from one to the next, each made of its frame alone. `summary` gives what others
    want to know of clips with any number of frames.

    num_kinds: so many of the outputs of a frame, the first, say which kinds of bodies are there.
    num_choices: so many of all outputs, the last, say how many bodies there are.
    channels, num_groups, first_stride: of the stages that see single frames, as in `Recognizer`; pixels say where they
        are. H and W are multiples of 2^stages, times first_stride: a frame is answered for by the means over the
        quarters of its last map.
    temporal_channels: of the 3x3x3 convolutions after them, each at half the frames of the one before.
    """

    num_outputs: int
    num_frames: int
    num_frame_outputs: int
    num_kinds: int
    num_choices: int
    channels: Sequence[int] = (16, 32, 64)
    temporal_channels: Sequence[int] = (64, 64)
    num_groups: int = 8
    first_stride: int = 2

    def __post_init__(self):
        check_stages(self.first_stride, self.channels, self.num_groups)
        if not self.temporal_channels or any(c % self.num_groups for c in self.temporal_channels):
            raise ValueError(
                f'temporal_channels are those of at least one convolution, multiples of num_groups={self.num_groups}; '
                f'got {tuple(self.temporal_channels)}'
            )
        super().__post_init__()

    def setup(self):
        self.stages = stages(self.first_stride, self.channels, self.num_groups)
        self.over_time = [TimeStage(width, self.num_groups) for width in self.temporal_channels]
        self.frame_head = nn.Dense(self.num_frame_outputs)
        self.head = nn.Dense(self.num_outputs - self.num_frames * self.num_frame_outputs)

    def __call__(self, x: Array) -> jax.Array:
        maps = self.maps(x)
        each = self.frame_head(quarters(maps))
        return jnp.concatenate([each.reshape(len(each), -1), self.head(self.of_clips(maps))], -1)

    def summary(self, x: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features [B, temporal_channels[-1] + channels[-1]], logits of the number of bodies [B, num_choices], and of
        the kinds that are in each frame [B, T, num_kinds].

        Half of the features are what the number is told from. They know what is shown, and hardly how: among real clips
        no answer asks whether frames go together. The others do: means of |maps_{t+1} - maps_t|, scaled so that both
        halves vary alike over real moving digits.
        """
        maps = self.maps(x)
        whole = self.of_clips(maps)
        changes = jnp.abs(maps[:, 1:] - maps[:, :-1]).sum(1) / max(maps.shape[1] - 1, 1)
        kinds = self.frame_head(quarters(maps))[..., : self.num_kinds]
        features = jnp.concatenate([whole, CHANGES * changes.mean((1, 2))], -1)
        return features, self.head(whole)[:, -self.num_choices :], kinds

    def maps(self, x: Array) -> jax.Array:
        """[B, T, h, w, channels[-1]], of each frame."""
        check_rank('ClipRecognizer', x, '[B, T, H, W, C]')
        h = with_coordinates(jnp.asarray(x).reshape(-1, *x.shape[2:]))
        for stage in self.stages:
            h = stage(h)
        return h.reshape(*x.shape[:2], *h.shape[1:])

    def of_clips(self, h: jax.Array) -> jax.Array:
        for stage in self.over_time:
            h = stage(h)
        return h.mean((1, 2, 3))


def check_stages(first_stride: int, channels: Sequence[int], num_groups: int) -> None:
    if first_stride not in (1, 2) or not channels or any(c % num_groups for c in channels):
        raise ValueError(
            'first_stride is 1 or 2, and channels are those of at least one stage, multiples of num_groups; got '
            f'first_stride={first_stride}, channels={tuple(channels)}, num_groups={num_groups}'
        )


def stages(first_stride: int, channels: Sequence[int], num_groups: int) -> list['Stage']:
    strides = [first_stride, *[2] * (len(channels) - 1)]
    return [Stage(width, num_groups, stride) for width, stride in zip(channels, strides)]


def with_coordinates(x: jax.Array) -> jax.Array:
    """Two more channels, y and x, -1 to 1 from the first pixel to the last: [B, H, W, C] -> [B, H, W, C + 2]."""
    places = jnp.meshgrid(*(jnp.linspace(-1, 1, size, dtype=x.dtype) for size in x.shape[1:3]), indexing='ij')
    return jnp.concatenate([x, jnp.broadcast_to(jnp.stack(places, -1), (*x.shape[:3], 2))], -1)


def quarters(maps: jax.Array) -> jax.Array:
    """The means over the four quarters of a map, beside each other: [..., H, W, C] -> [..., 4 C], H and W even."""
    *batch, height, width, channels = maps.shape
    means = maps.reshape(*batch, 2, height // 2, 2, width // 2, channels).mean((-4, -2))
    return means.reshape(*batch, 4 * channels)


class Stage(nn.Module):
    """Two convolutions, the second around a shortcut: `[B, H, W, C] -> [B, H / stride, W / stride, features]`."""

    features: int
    num_groups: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Conv(self.features, (3, 3), self.stride, padding=((1, 1), (1, 1)), name='conv_in')(x)
        h = nn.silu(nn.GroupNorm(self.num_groups, use_fast_variance=False, name='norm_in')(h))
        y = nn.Conv(self.features, (3, 3), padding=((1, 1), (1, 1)), name='conv_out')(h)
        return h + nn.silu(nn.GroupNorm(self.num_groups, use_fast_variance=False, name='norm_out')(y))


class TimeStage(nn.Module):
    """A convolution over space and time: `[B, T, H, W, C] -> [B, ceil(T / 2), H, W, features]`."""

    features: int
    num_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Conv(self.features, (3, 3, 3), (2, 1, 1), padding=((1, 1), (1, 1), (1, 1)), name='conv')(x)
        return nn.silu(nn.GroupNorm(self.num_groups, use_fast_variance=False, name='norm')(h))


def perceptual_distance(
    a: Sequence[jax.Array], b: Sequence[jax.Array], weights: Sequence[Array] | None = None
) -> jax.Array:
    """Equation (1) of two lists of feature maps: [B], in float32. weights: w_l^2, [C_l] for each; None: 1 / layers."""

    def direction(f: jax.Array) -> jax.Array:
        f = f.astype(jnp.float32)
        return f / (jnp.sqrt(jnp.sum(f**2, axis=-1, keepdims=True) + 1e-20) + 1e-10)

    weights = weights if weights is not None else [jnp.ones(f.shape[-1]) / len(a) for f in a]
    each = [((direction(f) - direction(g)) ** 2 @ w).mean((1, 2)) for f, g, w in zip(a, b, weights, strict=True)]
    return sum(each)
