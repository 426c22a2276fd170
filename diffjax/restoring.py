"""From a workdir's checkpoints back to parameters, for every kind of experiment.

An experiment has here what a `Trainer` needs to know the shapes of its state: `trainer()`, `batch_spec`, `training` and
`params_name`, the average of the parameters that it is used with.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffjax.core.types import PyTree
from diffjax.training.checkpoints import CHECKPOINTS, Checkpoints, abstract
from diffjax.training.places import place_of
from diffjax.training.posthoc_ema import is_reconstructed, read_reconstructed
from diffjax.training.sharding import replicated
from diffjax.training.state import TrainState


def restore(experiment: Any, workdir: str | os.PathLike, *, before: int | None = None) -> tuple[TrainState, int]:
    """The train state of the newest whole checkpoint, or of the newest before a step, and its step.

    Raises FileNotFoundError when there is none.
    """
    place = place_of(workdir, experiment.training.checkpoints)
    folder = place / CHECKPOINTS
    if not folder.is_dir():
        raise FileNotFoundError(f'{place} holds no checkpoint yet: train it first')
    _, shapes, shardings = experiment.trainer().init(experiment.batch_spec)
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore_newest(abstract(shapes, shardings), before=before)
    checkpoints.close()
    if restored is None:
        which = 'checkpoint yet: train it first' if before is None else f'checkpoint before step {before}'
        raise FileNotFoundError(f'{place} holds no {which}')
    return restored.state, restored.step


def restore_params(experiment: Any, workdir: str | os.PathLike) -> tuple[PyTree, int]:
    """The parameters that the experiment is used with, of a checkpoint or a reconstructed average, and their step."""
    name = experiment.params_name
    if is_reconstructed(name):
        _, shapes, shardings = experiment.trainer().init(experiment.batch_spec)
        return read_reconstructed(Path(workdir), name, abstract(shapes.params, shardings.params))
    state, step = restore(experiment, workdir)
    return sampling_params(experiment, state), step


def on_host(params: PyTree, mesh: Mesh) -> PyTree:
    """The same as NumPy arrays, whole on every process, however they are split over the mesh."""
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(params)
    return jax.tree.map(np.asarray, whole)


def sampling_params(experiment: Any, state: TrainState) -> PyTree:
    """The profile of averaged parameters that the experiment is used with."""
    name = experiment.params_name or next(iter(state.ema), 'raw')
    return state.params if name == 'raw' else state.ema[name]
