"""Imported parameters for a network that a config describes: the same network, its layers stacked where they are."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax import nets
from diffjax.core.types import PyTree
from diffjax.nets.stacking import stack_layers
from diffjax.weights.architecture import WeightsError
from diffjax.weights.engine import check_names, flat, nested
from diffjax.weights.store import load, read_record

FREE = ('scan_layers', 'remat', 'attention', 'compute_dtype', 'dropout', 'parent', 'name')  # the same parameters
TOLD_BY_SHAPES = ('num_classes', 'out_channels')  # of which a config gives none


def load_for(folder: str | os.PathLike, name: str, options: Mapping[str, Any], shapes: PyTree) -> PyTree:
    """The parameters in `folder` as float32 for the network `name`: nested dicts of arrays like `shapes`.

    Args:
        options: those that the config gives; the others have their defaults.
        shapes: of the parameters of the network, as `jax.eval_shape` tells them.

    Raises WeightsError, before a value is read, where it is another network or of another size.
    """
    record = read_record(folder)
    _check_options(folder, record['network'], name, options)
    there = nested(
        {path: jax.ShapeDtypeStruct(known['shape'], np.float32) for path, known in record['parameters'].items()}
    )
    layers = [key for key in shapes if key not in there and f'{key}_0' in there]

    def arrange(params: PyTree) -> PyTree:
        for key in layers:
            params = stack_layers(params, key)
        return params

    try:
        found = flat(jax.eval_shape(arrange, there))
    except ValueError as error:
        raise WeightsError(f'{folder} has layers that differ, which scan_layers=True cannot stack: {error}') from error
    wanted = flat(shapes)
    check_names(
        f'this config (in {folder})', *({path: a.shape for path, a in tree.items()} for tree in (found, wanted))
    )
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), load(folder).params)
    with jax.default_device(jax.local_devices(backend='cpu')[0]):  # the host: no device has to hold all of them
        return arrange(params)


def _check_options(folder: str | os.PathLike, there: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> None:
    """Compares the settings of two networks, but for those that shapes tell (num_classes, say) and the free ones."""
    if there['name'].lower() != name.lower().replace('_', ''):
        raise WeightsError(f'{folder} holds a {there["name"]}, and the config asks for {name}')
    fields = {field.name: field.default for field in dataclasses.fields(getattr(nets, there['name']))}
    for key, default in fields.items():
        if key in FREE + TOLD_BY_SHAPES or (default is dataclasses.MISSING and key not in options):
            continue
        theirs, ours = (_plain(values.get(key, default)) for values in (there, options))
        if theirs != ours:
            raise WeightsError(f'{folder} holds a {name} with {key}={theirs!r}, and the config has {key}={ours!r}')


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
