"""Inception-v3 of 2015 in PyTorch's names: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid and torch-fidelity.

That file is a pickle, which can run whatever it likes when it is opened. It becomes safetensors with PyTorch at hand:

    state = torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, 'inception.safetensors')
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffjax.core.types import PyTree
from diffjax.nets.inception import SIZE, unit_names
from diffjax.weights.architecture import Architecture
from diffjax.weights.rules import CONV, LINEAR, Leaf, array
from diffjax.weights.single_files import open_parameters

COUNTER = '.num_batches_tracked'  # of training; some copies hold it, none needs it


def table(options: Mapping[str, Any]) -> list[Leaf]:
    del options  # there is one Inception
    rows = array('fc_kernel', 'fc.weight', LINEAR) + array('fc_bias', 'fc.bias')
    for ours in unit_names():
        theirs = ours.replace('/', '.')
        rows += array(f'{ours}/kernel', f'{theirs}.conv.weight', CONV)
        rows += array(f'{ours}/scale', f'{theirs}.bn.weight') + array(f'{ours}/bias', f'{theirs}.bn.bias')
        rows += array(f'{ours}/mean', f'{theirs}.bn.running_mean') + array(f'{ours}/var', f'{theirs}.bn.running_var')
    return rows


ARCHITECTURE = Architecture(
    class_name='Inception-v3 (2015)',
    network='Inception',
    to_options=lambda config: {},
    to_config=lambda options: {},
    table=table,
    inputs=lambda options: (jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.uint8),),
)


def open_weights(path: str | os.PathLike) -> Callable[[], PyTree]:
    """A function that reads the parameters of `nets.Inception` from a safetensors file.

    Names and shapes are checked at once, in the file's header. Raises WeightsError, in one line, for what is no such
    file, a pickle included.
    """
    return open_parameters(path, ARCHITECTURE, how='two lines in diffjax/weights/inception.py', ignored=COUNTER)
