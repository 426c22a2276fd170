"""Inception-v3 as Frechet distances are measured with it: the network of 2015, its quirks kept.

Szegedy et al. 2016 (arXiv:1512.00567), in the graph `classify_image_graph_def.pb` of 2015-12-05 that Heusel et al. 2017
(FID, arXiv:1706.08500) and ADM's evaluator (Dhariwal & Nichol 2021, arXiv:2105.05233) use. It differs from later
Inception-v3: 1008 classes; averages of 3 x 3 count only the pixels inside the image; the last block pools by maximum.

A unit is a convolution, batch normalisation with the stored moments (eps 0.001), and ReLU:

    y = max(0, (conv(x) - mean) / sqrt(var + eps) scale + bias)                                                     (1)

Blocks run branches beside each other and join their channels; they are written below as tables. Names are those of the
PyTorch copies (pytorch-fid, torch-fidelity). 23,850,960 trainable parameters and 5.71 GFLOPs (multiply-adds) an image.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets import resizing
from diffjax.nets.layers import check_choice, check_rank

SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # of 192, so that 17 x 17 x 7 = 2023 features are about as many as the 2048 (Nash et al. 2021)
EPSILON = 1e-3


class Unit(NamedTuple):
    """A unit (1). kernel: one side, or height and width. Those with a stride, and two of the stem, see no border."""

    name: str
    features: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padding: str = 'SAME'


class Split(NamedTuple):
    """Units beside each other on one input, their channels joined."""

    units: tuple[Unit, ...]


AVERAGE, MAXIMUM, SHRINK = 'average', 'maximum', 'shrink'  # pooling of 3 x 3; `shrink` is a maximum with stride 2


def _mixed_a(pool_features: int) -> list[list]:
    return [
        [Unit('branch1x1', 64)],
        [Unit('branch5x5_1', 48), Unit('branch5x5_2', 64, 5)],
        [Unit('branch3x3dbl_1', 64), Unit('branch3x3dbl_2', 96, 3), Unit('branch3x3dbl_3', 96, 3)],
        [AVERAGE, Unit('branch_pool', pool_features)],
    ]


def _mixed_c(features: int) -> list[list]:
    row, column = (1, 7), (7, 1)
    return [
        [Unit('branch1x1', 192)],
        [Unit('branch7x7_1', features), Unit('branch7x7_2', features, row), Unit('branch7x7_3', 192, column)],
        [
            Unit('branch7x7dbl_1', features),
            Unit('branch7x7dbl_2', features, column),
            Unit('branch7x7dbl_3', features, row),
            Unit('branch7x7dbl_4', features, column),
            Unit('branch7x7dbl_5', 192, row),
        ],
        [AVERAGE, Unit('branch_pool', 192)],
    ]


def _mixed_e(pool: str) -> list[list]:
    def crossed(name):
        return Split((Unit(f'{name}a', 384, (1, 3)), Unit(f'{name}b', 384, (3, 1))))

    return [
        [Unit('branch1x1', 320)],
        [Unit('branch3x3_1', 384), crossed('branch3x3_2')],
        [Unit('branch3x3dbl_1', 448), Unit('branch3x3dbl_2', 384, 3), crossed('branch3x3dbl_3')],
        [pool, Unit('branch_pool', 192)],
    ]


STEM = [
    Unit('Conv2d_1a_3x3', 32, 3, 2, 'VALID'),
    Unit('Conv2d_2a_3x3', 32, 3, 1, 'VALID'),
    Unit('Conv2d_2b_3x3', 64, 3),
    SHRINK,
    Unit('Conv2d_3b_1x1', 80),
    Unit('Conv2d_4a_3x3', 192, 3, 1, 'VALID'),
    SHRINK,
]
BLOCKS = {
    'Mixed_5b': _mixed_a(32),
    'Mixed_5c': _mixed_a(64),
    'Mixed_5d': _mixed_a(64),
    'Mixed_6a': [
        [Unit('branch3x3', 384, 3, 2, 'VALID')],
        [Unit('branch3x3dbl_1', 64), Unit('branch3x3dbl_2', 96, 3), Unit('branch3x3dbl_3', 96, 3, 2, 'VALID')],
        [SHRINK],
    ],
    'Mixed_6b': _mixed_c(128),
    'Mixed_6c': _mixed_c(160),
    'Mixed_6d': _mixed_c(160),
    'Mixed_6e': _mixed_c(192),
    'Mixed_7a': [
        [Unit('branch3x3_1', 192), Unit('branch3x3_2', 320, 3, 2, 'VALID')],
        [
            Unit('branch7x7x3_1', 192),
            Unit('branch7x7x3_2', 192, (1, 7)),
            Unit('branch7x7x3_3', 192, (7, 1)),
            Unit('branch7x7x3_4', 192, 3, 2, 'VALID'),
        ],
        [SHRINK],
    ],
    'Mixed_7b': _mixed_e(AVERAGE),
    'Mixed_7c': _mixed_e(MAXIMUM),
}
SPATIAL = 'Mixed_6d', 'branch1x1'  # `mixed_6/conv` of the graph


def unit_names() -> list[str]:
    """The path of every unit, as in 'Mixed_5b/branch1x1'."""
    names = [step.name for step in STEM if isinstance(step, Unit)]
    for block, branches in BLOCKS.items():
        for step in (step for branch in branches for step in branch if not isinstance(step, str)):
            names += [f'{block}/{unit.name}' for unit in (step.units if isinstance(step, Split) else (step,))]
    return names


class InceptionFeatures(NamedTuple):
    """What evaluation uses, float32."""

    pool: Any  # [B, 2048] the last averages: `pool_3`
    spatial: Any  # [B, 2023] 17 x 17 x 7 of `mixed_6/conv`, in the order height, width, channel
    logits_unbiased: Any  # [B, 1008] without the last layer's bias, as in the Inception Score
    logits: Any  # [B, 1008]


class ConvUnit(nn.Module):
    """Equation (1): `x: [B, H, W, C] -> [B, H', W', features]`."""

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, features, kernel, stride, padding = self.unit
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        weights = self.param('kernel', nn.initializers.he_normal(), (height, width, x.shape[-1], features))
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale, bias = self.param('scale', ones, (features,)), self.param('bias', zeros, (features,))
        mean, var = self.param('mean', zeros, (features,)), self.param('var', ones, (features,))
        scale = scale * jax.lax.rsqrt(var + EPSILON)
        h = jax.lax.conv_general_dilated(
            x,
            weights,
            (stride, stride),
            padding,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            precision='highest',  # 19 or 8 bits, the default of GPUs and TPUs, move distances in the third digit
        )
        return nn.relu(h * scale + (bias - mean * scale))


class Inception(nn.Module, kw_only=True):
    """Features of images: `x: [B, H, W, 3]` in 0..255, of any size and dtype -> `InceptionFeatures`.

    resize: how images come to 299 x 299.
        'tensorflow'  bilinear, pixel i at i H / 299, no antialiasing: TensorFlow 1, ADM, torch-fidelity
        'pytorch'     bilinear, pixel i at (i + 1/2) H / 299 - 1/2, no antialiasing: pytorch-fid
        'pillow'      bicubic with antialiasing, not rounded: clean-fid (Parmar et al. 2022, arXiv:2104.11222)

    Figures under different resizes do not compare.
    """

    resize: str = 'tensorflow'

    def __post_init__(self):
        check_choice('resize', self.resize, resizing.__all__)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> InceptionFeatures:
        check_rank('Inception', x, '[B, H, W, 3]')
        if x.shape[-1] != 3:
            raise ValueError(f'Inception takes x of shape [B, H, W, 3], got {tuple(x.shape)}')
        h = resizing.resize(jnp.asarray(x, jnp.float32), SIZE, getattr(resizing, self.resize))
        # pytorch-fid scales 0..255 to -1..1, all others as the graph does.
        h = h / 127.5 - 1 if self.resize == 'pytorch' else (h - 128) / 128
        h = _run(STEM, h, {})
        kept: dict[str, jax.Array] = {}
        for name, branches in BLOCKS.items():
            h = _Block(branches, name=name)(h, kept if name == SPATIAL[0] else {})
        pool = jnp.mean(h, (1, 2))
        spatial = kept[SPATIAL[1]][..., :SPATIAL_CHANNELS].reshape(len(h), -1)
        weights = self.param('fc_kernel', nn.initializers.lecun_normal(), (h.shape[-1], NUM_CLASSES))
        bias = self.param('fc_bias', nn.initializers.zeros, (NUM_CLASSES,))
        unbiased = jnp.matmul(pool, weights, precision='highest')
        return InceptionFeatures(pool, spatial, unbiased, unbiased + bias)


class _Block(nn.Module):
    branches: list[list]

    @nn.compact
    def __call__(self, x: jax.Array, kept: dict[str, jax.Array]) -> jax.Array:
        return jnp.concatenate([_run(branch, x, kept) for branch in self.branches], axis=-1)


def _run(steps: list, x: jax.Array, kept: dict[str, jax.Array]) -> jax.Array:
    """Steps one after the other; `kept` collects what each unit puts out."""
    for step in steps:
        if isinstance(step, Unit):
            x = kept[step.name] = ConvUnit(step, name=step.name)(x)
        elif isinstance(step, Split):
            x = jnp.concatenate([ConvUnit(unit, name=unit.name)(x) for unit in step.units], axis=-1)
        else:
            x = _pool(x, step)
    return x


def _shifted(x: jax.Array, stride: int) -> list[jax.Array]:
    """The nine pixels under a window of 3 x 3, each as an array of all windows inside x."""
    batch, height, width, channels = x.shape
    last = (height - 3) // stride * stride + 1, (width - 3) // stride * stride + 1

    def take(i, j):
        return jax.lax.slice(x, (0, i, j, 0), (batch, i + last[0], j + last[1], channels), (1, stride, stride, 1))

    return [take(i, j) for i in range(3) for j in range(3)]


def _pool(x: jax.Array, kind: str) -> jax.Array:
    """Pooling of 3 x 3, by slices: XLA vectorises them on CPUs, and does not vectorise `reduce_window`."""
    if kind == SHRINK:
        return functools.reduce(jnp.maximum, _shifted(x, 2))
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    if kind == MAXIMUM:
        return functools.reduce(jnp.maximum, _shifted(jnp.pad(x, border, constant_values=-jnp.inf), 1))
    inside = np.pad(np.ones((1, *x.shape[1:3], 1), np.float32), border)
    counts = sum(inside[:, i : i + x.shape[1], j : j + x.shape[2]] for i in range(3) for j in range(3))
    return sum(_shifted(jnp.pad(x, border), 1)) / counts
