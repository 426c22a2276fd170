"""A recogniser as one safetensors file: its parameters in float16, and in the metadata which network they are of.

`SHAPES` and `MOVING_DIGITS` come with the package, trained on the embedded shapes and the embedded moving digits; the
commands that made them stand in configs/recognizer_shapes.py and configs/recognizer_clips.py.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.core.types import PyTree
from diffjax.nets.recognizer import ClipRecognizer, Recognizer
from diffjax.weights.architecture import WeightsError
from diffjax.weights.engine import check_names, flat, nested
from diffjax.weights.tensors import JSON_ERRORS, Spec, TensorFile, TensorWriter

SHAPES = Path(__file__).with_name('shapes_recognizer.safetensors')
MOVING_DIGITS = SHAPES.with_name('moving_digits_recognizer.safetensors')
KEY = 'diffjax.{}'  # of the metadata, with the network's name: its fields and its `in_channels`, in JSON
COMMON = ('num_outputs', 'channels', 'num_groups', 'first_stride')
FIELDS = {
    Recognizer: (*COMMON, 'coordinates'),
    ClipRecognizer: (*COMMON, 'num_frames', 'num_frame_outputs', 'num_kinds', 'num_choices', 'temporal_channels'),
}
MAX_WIDTH = 2**14  # of what a file may ask for


class OpenedRecognizer(NamedTuple):
    network: Recognizer | ClipRecognizer
    in_channels: int
    load: Callable[[], PyTree]  # the parameters, float32


def write_recognizer(path: str | os.PathLike, network: Recognizer | ClipRecognizer, params: PyTree) -> None:
    """Writes the file, in the place of one that may be there."""
    path = Path(path)
    with np.errstate(over='ignore'):  # told below
        leaves = {name: np.asarray(a, np.float16) for name, a in flat(params).items()}
    if huge := [name for name, a in leaves.items() if not np.isfinite(a).all()]:
        raise WeightsError(f'{path}: {huge[0]} has values that float16 does not hold')
    taken = leaves['stages_0/conv_in/kernel'].shape[2] - 2 * getattr(network, 'coordinates', True)
    values = {name: getattr(network, name) for name in FIELDS[type(network)]}
    fields = {name: list(value) if isinstance(value, Sequence) else value for name, value in values.items()}
    metadata = {KEY.format(type(network).__name__): json.dumps(fields | {'in_channels': taken})}
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
    size = (network.num_frames, 64, 64) if isinstance(network, ClipRecognizer) else (64, 64)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *size, in_channels), np.float32))
    expected = {name: a.shape for name, a in flat(shapes['params']).items()}
    check_names(f'a recogniser ({path})', {name: spec.shape for name, spec in file.specs.items()}, expected)

    def load() -> PyTree:
        leaves = {name: np.asarray(file[name], np.float32) for name in file}
        if wrong := [name for name, a in leaves.items() if not np.isfinite(a).all()]:
            raise WeightsError(f'{path}: {wrong[0]} holds NaN or infinity')
        return nested(leaves)

    return OpenedRecognizer(network, in_channels, load)


def _network(file: TensorFile) -> tuple[Recognizer | ClipRecognizer, int]:
    wrong = f'{file.path}: its metadata describes no recogniser; runs of configs/recognizer_shapes.py write such files'
    try:
        kind = next((kind for kind in FIELDS if KEY.format(kind.__name__) in file.metadata), Recognizer)
        fields = json.loads(file.metadata[KEY.format(kind.__name__)])
        _check_fields(fields, FIELDS[kind])
        in_channels = fields.pop('in_channels')
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return kind(**given), in_channels
    except (KeyError, *JSON_ERRORS) as error:
        raise WeightsError(wrong) from error


def _check_fields(fields: Any, names: tuple[str, ...]) -> None:
    """Raises ValueError unless they are those of a network, and of no enormous one."""
    if not isinstance(fields, Mapping) or sorted(fields) != sorted((*names, 'in_channels')):
        raise ValueError('other fields')
    lists = [fields[name] for name in names if name.endswith('channels')]
    if any(not isinstance(each, list) or not 0 < len(each) <= 16 for each in lists):
        raise ValueError('channels is a list')
    if 'coordinates' in names and type(fields['coordinates']) is not bool:
        raise ValueError('coordinates is true or false')
    numbers = [fields[name] for name in fields if name != 'coordinates' and not isinstance(fields[name], list)]
    if any(type(n) is not int or not 0 < n <= MAX_WIDTH for n in (*numbers, *(n for each in lists for n in each))):
        raise ValueError('sizes that are none')
    if 'num_frames' in names and fields['num_outputs'] <= fields['num_frames'] * fields['num_frame_outputs']:
        raise ValueError('fewer outputs than its frames have')
