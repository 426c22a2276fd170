"""Inception-I3D as the Frechet video distance (FVD) is measured with it: GoogLeNet inflated to space and time.

Carreira & Zisserman 2017 (arXiv:1705.07750, figure 3). Unterthiner et al. 2018 (arXiv:1812.01717) measure FVD between
its 400 logits. The widths of the mixed blocks are GoogLeNet's (Szegedy et al. 2014, arXiv:1409.4842, table 1), whose
5 x 5 became 3 x 3 x 3.

A unit is a convolution, batch normalisation with the stored moments (eps 0.001), and ReLU:

    y = max(0, (conv(x) - mean) / sqrt(var + eps) scale + bias)                                                     (1)

Borders are TensorFlow's 'SAME': n positions become ceil(n / stride), and of an odd number of zeros the larger half
comes last, in time as in space. At the end the averages over space, of every two neighbouring frames that are left,
become logits, and FVD takes the mean of these over time. That head is linear, so it is a mean of features first:

    pool = mean_t (h_t + h_{t+1}) / 2,     logits = pool W + b                                                      (2)

Names are those of the PyTorch copies. 12,697,264 trainable parameters, the scales counted, which the original does not
have (they are 1), and 111.2 GFLOPs (multiply-adds) for 64 frames of 224 x 224.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets import resizing
from diffjax.nets.layers import check_choice, check_rank

SIZE = 224
MIN_FRAMES = 9  # the fewest of which two are left for (2)
NUM_CLASSES = 400
EPSILON = 1e-3
RESIZES = ('tensorflow', 'pytorch')


class Unit(NamedTuple):
    """A unit (1). kernel, stride: of time, height and width alike."""

    name: str
    features: int
    kernel: int = 1
    stride: int = 1


class Pool(NamedTuple):
    """The maximum of a window, of time, height and width."""

    window: tuple[int, int, int]
    stride: tuple[int, int, int]


class Mixed(NamedTuple):
    """Four branches beside each other, their channels joined; the features of the units."""

    name: str
    b0: int
    b1a: int
    b1b: int
    b2a: int
    b2b: int
    b3b: int

    def branches(self) -> list[list[Unit | Pool]]:
        return [
            [Unit('b0', self.b0)],
            [Unit('b1a', self.b1a), Unit('b1b', self.b1b, 3)],
            [Unit('b2a', self.b2a), Unit('b2b', self.b2b, 3)],
            [Pool((3, 3, 3), (1, 1, 1)), Unit('b3b', self.b3b)],
        ]


STEPS = [
    Unit('Conv3d_1a_7x7', 64, 7, 2),
    Pool((1, 3, 3), (1, 2, 2)),
    Unit('Conv3d_2b_1x1', 64),
    Unit('Conv3d_2c_3x3', 192, 3),
    Pool((1, 3, 3), (1, 2, 2)),
    Mixed('Mixed_3b', 64, 96, 128, 16, 32, 32),
    Mixed('Mixed_3c', 128, 128, 192, 32, 96, 64),
    Pool((3, 3, 3), (2, 2, 2)),
    Mixed('Mixed_4b', 192, 96, 208, 16, 48, 64),
    Mixed('Mixed_4c', 160, 112, 224, 24, 64, 64),
    Mixed('Mixed_4d', 128, 128, 256, 24, 64, 64),
    Mixed('Mixed_4e', 112, 144, 288, 32, 64, 64),
    Mixed('Mixed_4f', 256, 160, 320, 32, 128, 128),
    Pool((2, 2, 2), (2, 2, 2)),
    Mixed('Mixed_5b', 256, 160, 320, 32, 128, 128),
    Mixed('Mixed_5c', 384, 192, 384, 48, 128, 128),
]


def unit_names() -> list[str]:
    """The path of every unit, as in 'Mixed_5b/b1a'."""
    names = []
    for step in STEPS:
        if isinstance(step, Unit):
            names.append(step.name)
        elif isinstance(step, Mixed):
            inner = itertools.chain(*step.branches())
            names += [f'{step.name}/{unit.name}' for unit in inner if isinstance(unit, Unit)]
    return names


class I3DFeatures(NamedTuple):
    """What evaluation uses, float32; equation (2)."""

    pool: Any  # [B, 1024]
    logits: Any  # [B, 400], before the softmax: the features of FVD


class I3D(nn.Module, kw_only=True):
    """Features of clips: `x: [B, T, H, W, 3 or 1]` in 0..255, of any size and dtype, T >= 9 -> `I3DFeatures`.

    Grey clips are taken as RGB with three equal channels. Frames come to `size` x `size`, whatever their shape, and
    0..255 to -1..1.

    resize: bilinear, without antialiasing, and without aligned corners.
        'tensorflow'  pixel i at i H / size: `resize_bilinear` of TensorFlow 1, in the reference implementation
        'pytorch'     pixel i at (i + 1/2) H / size - 1/2: `interpolate(align_corners=False)` in PyTorch's copies

    Figures under different resizes, sizes or numbers of frames do not compare.
    """

    resize: str = 'tensorflow'
    size: int = SIZE

    def __post_init__(self):
        check_choice('resize', self.resize, RESIZES)
        if self.size < 1:
            raise ValueError(f'size is at least 1, got {self.size}')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> I3DFeatures:
        check_rank('I3D', x, '[B, T, H, W, 3]')
        if x.shape[-1] not in (1, 3):
            raise ValueError(f'I3D takes x of shape [B, T, H, W, 3], or 1 for grey, got {tuple(x.shape)}')
        batch, frames = x.shape[:2]
        if frames < MIN_FRAMES:
            raise ValueError(f'I3D takes clips of at least {MIN_FRAMES} frames, got {frames}')
        h = jnp.asarray(x, jnp.float32).reshape(batch * frames, *x.shape[2:])
        h = resizing.resize(h, self.size, getattr(resizing, self.resize)) / 127.5 - 1
        h = jnp.broadcast_to(h, (*h.shape[:3], 3)).reshape(batch, frames, self.size, self.size, 3)
        h = _run(STEPS, h)
        h = jnp.mean(h, (2, 3))
        pool = jnp.mean((h[:, :-1] + h[:, 1:]) / 2, 1)
        weights = self.param('logits_kernel', nn.initializers.lecun_normal(), (h.shape[-1], NUM_CLASSES))
        bias = self.param('logits_bias', nn.initializers.zeros, (NUM_CLASSES,))
        return I3DFeatures(pool, jnp.matmul(pool, weights, precision='highest') + bias)


class ConvUnit(nn.Module):
    """Equation (1): `x: [B, T, H, W, C] -> [B, T', H', W', features]`."""

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, features, kernel, stride = self.unit
        weights = self.param('kernel', nn.initializers.he_normal(), (kernel,) * 3 + (x.shape[-1], features))
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale, bias = self.param('scale', ones, (features,)), self.param('bias', zeros, (features,))
        mean, var = self.param('mean', zeros, (features,)), self.param('var', ones, (features,))
        scale = scale * jax.lax.rsqrt(var + EPSILON)
        h = jax.lax.conv_general_dilated(
            x,
            weights,
            (stride,) * 3,
            'SAME',
            dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
            precision='highest',  # as in nets/inception.py
        )
        return nn.relu(h * scale + (bias - mean * scale))


class _Block(nn.Module):
    mixed: Mixed

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([_run(branch, x) for branch in self.mixed.branches()], axis=-1)


def _run(steps: list[Unit | Pool | Mixed], x: jax.Array) -> jax.Array:
    """Steps one after the other."""
    for step in steps:
        if isinstance(step, Pool):
            x = _maximum(x, step)
        else:
            x = (ConvUnit if isinstance(step, Unit) else _Block)(step, name=step.name)(x)
    return x


def _maximum(x: jax.Array, pool: Pool) -> jax.Array:
    """The maximum along one axis after the other, by slices: XLA does not vectorise `reduce_window` on CPUs."""
    borders = jax.lax.padtype_to_pads(x.shape[1:4], pool.window, pool.stride, 'SAME')
    for axis, (window, stride, border) in enumerate(zip(pool.window, pool.stride, borders), start=1):
        padding = [(0, 0)] * x.ndim
        padding[axis] = border
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        length = (padded.shape[axis] - window) // stride * stride + 1
        slices = (jax.lax.slice_in_dim(padded, i, i + length, stride, axis) for i in range(window))
        x = functools.reduce(jnp.maximum, slices)
    return x
