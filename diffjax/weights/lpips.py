"""LPIPS upon VGG-16 (Zhang et al. 2018), from the files that torchvision and the package lpips publish.

Both are pickles, which can run whatever they like when they are opened. They become one safetensors file with PyTorch
at hand:

    vgg = torch.load('vgg16-397923af.pth', weights_only=True)              # of torchvision
    lin = torch.load('lpips/weights/v0.1/vgg.pth', weights_only=True)      # of lpips
    state = {k: v for k, v in vgg.items() if k.startswith('features.')} | lin
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, 'lpips_vgg.safetensors')
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffjax.core.types import PyTree
from diffjax.nets.vgg import GROUPS, MIN_SIZE
from diffjax.weights.architecture import Architecture
from diffjax.weights.rules import Layout, Leaf, array, conv
from diffjax.weights.single_files import open_parameters

CHANNELS = Layout(lambda a: a.reshape(a.shape[1]), lambda a: a.reshape(1, -1, 1, 1))  # [1, C, 1, 1] <-> [C]


def table(options: Mapping[str, Any]) -> list[Leaf]:
    del options  # there is one
    rows, place, number = [], 0, 0  # torchvision counts convolutions, ReLUs and maxima alike
    for i, group in enumerate(GROUPS):
        for _ in group:
            rows += conv(f'vgg/conv_{number}', f'features.{place}')
            place, number = place + 2, number + 1
        place += 1
        rows += array(f'weight_{i}', f'lin{i}.model.1.weight', CHANNELS)
    return rows


def _inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct((1, MIN_SIZE, MIN_SIZE, 3), np.float32),) * 2


ARCHITECTURE = Architecture('LPIPS on VGG-16', 'LPIPS', lambda config: {}, lambda options: {}, table, _inputs)


def open_weights(path: str | os.PathLike) -> Callable[[], PyTree]:
    """A function that reads the parameters of `nets.LPIPS`; the file's names and shapes are checked at once.

    Raises WeightsError, in one line, for what is no such file, a pickle included.
    """
    return open_parameters(path, ARCHITECTURE, how='four lines in diffjax/weights/lpips.py')
