"""Parameters kept on disk by step: the snapshots of averages that a run leaves, and what is made of them afterwards.

A step holds one item for each named tree, and the checksums of its arrays, which are compared when it comes back (see
`training.checkpoints`). A step is whole or not there: it is written elsewhere and renamed, in a bucket ended by a file
that says so.
"""

import logging
import os

import numpy as np
import orbax.checkpoint as ocp

from diffjax.core.types import PyTree
from diffjax.training.checkpoints import checksums, sweep
from diffjax.training.disk import writing
from diffjax.training.places import absolute

log = logging.getLogger('diffjax')


class DamagedSnapshot(ValueError):
    """What is on disk is not what was written."""


class Snapshots:
    """The trees of one folder, by step and name."""

    def __init__(self, folder: str | os.PathLike):
        apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix='snapshots')  # from the run's checkpoints
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, enable_async_checkpointing=True, multiprocessing_options=apart
        )
        self.folder = absolute(folder)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def forget_after(self, step: int) -> None:
        """Deletes what a run wrote beyond the checkpoint from which it now goes on, to write it again."""
        sweep(self._manager.directory)
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def save(self, step: int, trees: dict[str, PyTree]) -> None:
        """Starts an asynchronous save; the trees may be donated as soon as this returns. A step is written once."""
        if step in self.steps:
            return
        items = {f'tree_{name}': ocp.args.StandardSave(tree) for name, tree in trees.items()}
        sums = {name: np.asarray(checksums(tree)).tolist() for name, tree in trees.items()}
        with self._writing(step):
            saved = self._manager.save(step, args=ocp.args.Composite(check=ocp.args.JsonSave(sums), **items))
        if not saved:
            raise RuntimeError(f'the snapshot of step {step} was not written: {self.folder} holds {self.steps}')

    def restore(self, step: int, name: str, abstract_tree: PyTree) -> PyTree:
        """One tree of a step, on the shardings of `abstract_tree`. Raises DamagedSnapshot where it is not whole."""
        item = f'tree_{name}'
        try:
            args = {item: ocp.args.StandardRestore(abstract_tree), 'check': ocp.args.JsonRestore()}
            got = self._manager.restore(step, args=ocp.args.Composite(**args))
            wanted = np.asarray(got.check[name])
        except Exception as error:  # Orbax raises Exception, ValueError and KeyError for damage
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise DamagedSnapshot(f'{self.folder / str(step)} cannot be read ({reason})') from error
        found = np.asarray(checksums(got[item]))
        if found.shape != wanted.shape or (found != wanted).any():
            raise DamagedSnapshot(f'{self.folder / str(step)} is damaged: its checksums differ')
        return got[item]

    def wait(self) -> None:
        """Until what has been saved is on disk. Raises CannotWrite."""
        with self._writing(self.steps[-1] if self.steps else 0):
            self._manager.wait_until_finished()

    def _writing(self, step: int):
        then = 'make room and run the command again: it goes on from the newest checkpoint'
        return writing(f'the snapshot of step {step}', self.folder, then)

    def close(self) -> None:
        self.wait()
        self._manager.close()
