"""The parameters of one network in one safetensors file, for networks that no config.json describes."""

import os
from collections.abc import Callable
from pathlib import Path

from diffjax.core.types import PyTree
from diffjax.weights.architecture import Architecture, WeightsError
from diffjax.weights.engine import check_names, expected_shapes, import_tensors
from diffjax.weights.tensors import TensorFile

PICKLES = (b'PK', b'\x80\x02')  # how PyTorch's archives begin, and its older bare pickles


def open_parameters(
    path: str | os.PathLike, architecture: Architecture, *, how: str, ignored: str = ''
) -> Callable[[], PyTree]:
    """A function that reads the parameters of a network from a safetensors file.

    Names and shapes are checked at once, in the file's header. Raises WeightsError, in one line, for what is no such
    file, a pickle included.

    how: where the lines stand by which the published file becomes safetensors. ignored: an ending of names that do
    not matter.
    """
    path = Path(path)
    if path.is_file():
        with open(path, 'rb') as file:
            if file.read(2) in PICKLES:
                raise WeightsError(
                    f'{path} is a pickle, which can run whatever it likes when it is opened; '
                    f'{how} make safetensors of it'
                )
    file = TensorFile(path)
    shapes = {name: spec.shape for name, spec in file.specs.items() if not (ignored and name.endswith(ignored))}
    check_names(architecture.class_name, shapes, expected_shapes(architecture, {}))
    return lambda: import_tensors(architecture, {}, {name: file[name] for name in shapes})
