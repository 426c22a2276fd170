"""A recogniser as one safetensors file: its parameters in float16, and in the metadata which network they are of.

`SHAPES` is the one that comes with the package, trained on the embedded shapes; the two commands that made it stand in
configs/recognizer_shapes.py.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.core.types import PyTree
from diffjax.nets.recognizer import Recognizer
from diffjax.weights.architecture import WeightsError
from diffjax.weights.engine import check_names, flat, nested
from diffjax.weights.tensors import JSON_ERRORS, Spec, TensorFile, TensorWriter

SHAPES = Path(__file__).with_name('shapes_recognizer.safetensors')
KEY = 'diffjax.Recognizer'  # of the metadata: the network's fields and its `in_channels`, in JSON
FIELDS = ('num_outputs', 'channels', 'num_groups', 'first_stride', 'coordinates')
MAX_WIDTH = 2**14  # of what a file may ask for


class OpenedRecognizer(NamedTuple):
    network: Recognizer
    in_channels: int
    load: Callable[[], PyTree]  # the parameters, float32


def write_recognizer(path: str | os.PathLike, network: Recognizer, params: PyTree) -> None:
    """Writes the file, in the place of one that may be there."""
    path = Path(path)
    with np.errstate(over='ignore'):  # told below
        leaves = {name: np.asarray(a, np.float16) for name, a in flat(params).items()}
    if huge := [name for name, a in leaves.items() if not np.isfinite(a).all()]:
        raise WeightsError(f'{path}: {huge[0]} has values that float16 does not hold')
    taken = leaves['stages_0/conv_in/kernel'].shape[2] - 2 * network.coordinates
    fields = {name: getattr(network, name) for name in FIELDS} | {'channels': list(network.channels)}
    metadata = {KEY: json.dumps(fields | {'in_channels': taken})}
    part = path.with_name(f'{path.name}.part')
    part.unlink(missing_ok=True)
    specs = {name: Spec(a.shape, a.dtype) for name, a in leaves.items()}
    with TensorWriter(part, specs, metadata) as writer:
        for name, a in leaves.items():
            writer.write(name, a)
    os.replace(part, path)


def open_recognizer(path: str | os.PathLike = SHAPES) -> OpenedRecognizer:
    """The network of a file and what reads its parameters; names and shapes are checked at once.

    Raises WeightsError, in one line, for what is no file of `write_recognizer`.
    """
    file = TensorFile(path)
    network, in_channels = _network(file)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, in_channels), np.float32))
    expected = {name: a.shape for name, a in flat(shapes['params']).items()}
    check_names(f'a recogniser ({path})', {name: spec.shape for name, spec in file.specs.items()}, expected)

    def load() -> PyTree:
        leaves = {name: np.asarray(file[name], np.float32) for name in file}
        if wrong := [name for name, a in leaves.items() if not np.isfinite(a).all()]:
            raise WeightsError(f'{path}: {wrong[0]} holds NaN or infinity')
        return nested(leaves)

    return OpenedRecognizer(network, in_channels, load)


def _network(file: TensorFile) -> tuple[Recognizer, int]:
    wrong = f'{file.path}: its metadata describes no recogniser; runs of configs/recognizer_shapes.py write such files'
    try:
        fields = json.loads(file.metadata[KEY])
        _check_fields(fields)
        in_channels = fields.pop('in_channels')
        return Recognizer(**{**fields, 'channels': tuple(fields['channels'])}), in_channels
    except (KeyError, *JSON_ERRORS) as error:
        raise WeightsError(wrong) from error


def _check_fields(fields: Any) -> None:
    """Raises ValueError unless they are those of a network, and of no enormous one."""
    if not isinstance(fields, Mapping) or sorted(fields) != sorted((*FIELDS, 'in_channels')):
        raise ValueError('other fields')
    channels = fields['channels']
    if not isinstance(channels, list) or not 0 < len(channels) <= 16 or type(fields['coordinates']) is not bool:
        raise ValueError('channels is a list, coordinates true or false')
    numbers = [fields[name] for name in ('num_outputs', 'num_groups', 'first_stride', 'in_channels')]
    if any(type(n) is not int or not 0 < n <= MAX_WIDTH for n in (*numbers, *channels)):
        raise ValueError('sizes that are none')
