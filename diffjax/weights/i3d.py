"""Inception-I3D in PyTorch's names: `i3d_pretrained_400.pt` of VideoGPT, and `rgb_imagenet.pt` of pytorch-i3d.

The first holds the weights of TensorFlow Hub's `deepmind/i3d-kinetics-400/1`, with which published Frechet video
distances are measured; VideoGPT made it. The second holds those that DeepMind released with the paper: the same
network trained another time, whose distances compare among themselves alone.

Both are pickles, which can run whatever they like when they are opened. They become safetensors with PyTorch at hand:

    state = torch.load('i3d_pretrained_400.pt', weights_only=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, 'i3d.safetensors')

`i3d_torchscript.pt` of StyleGAN-V computes what the first does, but is a program and no table of these names.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffjax.core.types import PyTree
from diffjax.nets.i3d import MIN_FRAMES, SIZE, unit_names
from diffjax.weights.architecture import Architecture
from diffjax.weights.rules import Layout, Leaf, array
from diffjax.weights.single_files import open_parameters

COUNTER = '.num_batches_tracked'  # of training; some copies hold it, none needs it
CONV = Layout(lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2))  # OITHW <-> THWIO
POINTWISE = Layout(lambda a: a[:, :, 0, 0, 0].transpose(1, 0), lambda a: a.transpose(1, 0)[:, :, None, None, None])


def table(options: Mapping[str, Any]) -> list[Leaf]:
    del options  # there is one
    rows = array('logits_kernel', 'logits.conv3d.weight', POINTWISE) + array('logits_bias', 'logits.conv3d.bias')
    for ours in unit_names():
        theirs = ours.replace('/', '.')
        rows += array(f'{ours}/kernel', f'{theirs}.conv3d.weight', CONV)
        rows += array(f'{ours}/scale', f'{theirs}.bn.weight') + array(f'{ours}/bias', f'{theirs}.bn.bias')
        rows += array(f'{ours}/mean', f'{theirs}.bn.running_mean') + array(f'{ours}/var', f'{theirs}.bn.running_var')
    return rows


ARCHITECTURE = Architecture(
    class_name='Inception-I3D',
    network='I3D',
    to_options=lambda config: {},
    to_config=lambda options: {},
    table=table,
    inputs=lambda options: (jax.ShapeDtypeStruct((1, MIN_FRAMES, SIZE, SIZE, 3), np.uint8),),
)


def open_weights(path: str | os.PathLike) -> Callable[[], PyTree]:
    """A function that reads the parameters of `nets.I3D` from a safetensors file.

    Names and shapes are checked at once, in the file's header. Raises WeightsError, in one line, for what is no such
    file, a pickle included.
    """
    return open_parameters(path, ARCHITECTURE, how='two lines in diffjax/weights/i3d.py', ignored=COUNTER)
