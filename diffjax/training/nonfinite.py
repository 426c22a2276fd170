"""A step whose loss or gradient is not finite, and the batch that the run then keeps for a replay.

A run looks at its metrics at logged steps only, so that the host never waits for the device in between. Step k may
then be long past, and its batch gone. It is read again: the stream of batches is a function of its position, the loop
notes its position at each look, and only a run that fails pays, with at most `log_every_steps` batches read twice.
Keeping the batches until the next look would cost as many in memory all the time (5 GB for 100 batches of 256 images
of 256 x 256); a position is a few bytes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.training.disk import writing

FOLDER = 'nonfinite'  # in a workdir


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


class Kept(NamedTuple):
    """A batch that was kept for replay."""

    step: int
    batch: dict[str, np.ndarray]  # as read, the parts of all processes in order: [B, ...]
    seed: int
    checkpoint: int  # the newest one before; 0: the start
    names: list[str]  # of the metrics that were not finite
    path: Path


def read_again(iterator: Iterator, position: Any, num_batches: int) -> dict[str, np.ndarray]:
    """This process's part of the batch that comes `num_batches` after a position, 1 for the next."""
    iterator.set_state(position)
    for _ in range(num_batches):
        batch = next(iterator)
    return {name: _local(array) for name, array in batch.items()}


def _local(array: np.ndarray | jax.Array) -> np.ndarray:
    """What this process has of an array whose leading axis is split, in order."""
    if isinstance(array, np.ndarray):
        return array
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def keep_batch(
    workdir: Path, step: int, batch: Mapping[str, np.ndarray], *, seed: int, checkpoint: int, names: list[str]
) -> Path:
    """Writes this process's part of a batch, and what a replay has to know: WORKDIR/nonfinite/STEP-PROCESS.npz.

    Raises CannotWrite.
    """
    path = Path(workdir) / FOLDER / f'{step:08d}-{jax.process_index():04d}.npz'
    about = {'step': step, 'seed': seed, 'checkpoint': checkpoint, 'names': names}
    about['process_count'] = jax.process_count()
    arrays = {f'batch/{name}': array for name, array in batch.items()}
    with writing(f'the batch of step {step}', path, 'the dataset has it still'):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    return path


def read_kept(workdir: Path, step: int | None = None) -> Kept:
    """The batch that a run has kept, of the step given, or of the newest. Raises FileNotFoundError."""
    folder = Path(workdir) / FOLDER
    there = sorted({int(path.name.partition('-')[0]) for path in folder.glob('*-*.npz')})
    if not there or (step is not None and step not in there):
        found = f'only of {", ".join(map(str, there))}' if there else 'nor of any other'
        raise FileNotFoundError(f'{folder} keeps no batch{"" if step is None else f" of step {step}"}, {found}')
    step = there[-1] if step is None else step
    paths, abouts, parts = sorted(folder.glob(f'{step:08d}-*.npz')), [], []
    for path in paths:
        with np.load(path, allow_pickle=False) as stored:
            abouts.append(json.loads(str(stored['about'])))
            parts.append({name.removeprefix('batch/'): stored[name] for name in stored if name.startswith('batch/')})
    about = abouts[0]
    if len(parts) != about['process_count']:
        raise FileNotFoundError(
            f'{folder} keeps parts of {len(parts)} processes of {about["process_count"]} at step {step}'
        )
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Kept(step, batch, about['seed'], about['checkpoint'], about['names'], paths[0])
