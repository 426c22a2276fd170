"""Checkpoints: everything a run needs to go on, in one atomic step, verified when it comes back.

A step holds the train state and a JSON item: the data iterator's position and the checksum of each array. Orbax
restores damaged bytes without a word, so the checksums are compared after every restore. They are sums of integers
taken on the device: independent of the order of summation, hence of mesh and device count, and nothing but two numbers
for each array travels to the host.
"""

import copy
import logging
import os
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from diffjax.core.types import PyTree
from diffjax.training.disk import refused, unanswered, writing
from diffjax.training.places import absolute, half_written, in_bucket

log = logging.getLogger('diffjax')

CHECKPOINTS = 'checkpoints'  # folder of a workdir, or of what training.checkpoints names


class Restored(NamedTuple):
    state: PyTree
    step: int
    notes: dict[str, Any]  # what was handed to `save` as notes
    position: Any  # of the iterator


def _words(a: jax.Array) -> jax.Array:
    """The bytes of an array as unsigned integers, same shape (8-byte types: a trailing axis of two)."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    if a.dtype == bool:
        return a.astype(jnp.uint32)
    width = min(a.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(a, jnp.dtype(f'uint{8 * width}')).astype(jnp.uint32)


@jax.jit
def checksums(tree: PyTree) -> jax.Array:
    """[leaves, 2] uint32: sums of word * odd(position), for two mixings of the position. Any one flipped bit shows."""

    def one(a):
        words = _words(a)
        position = jnp.zeros(words.shape, jnp.uint32)
        for axis, length in enumerate(words.shape):
            position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        mixed = (position + 1) * jnp.uint32(2654435761)
        other = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
        return jnp.stack([jnp.sum(words * (m | 1), dtype=jnp.uint32) for m in (mixed, other)])

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(tree)])


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes with the shardings on which to restore."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def check_shapes(folder, abstract_state: PyTree) -> None:
    """Raises ValueError, before a value is read, where an array there has another shape than is asked for.

    Orbax refuses such an array too, but only amid reading all the others, whose tasks then report errors of their own.
    """
    there = ocp.StandardCheckpointHandler().metadata(folder).tree
    names = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in _leaves(there)}
    for path, leaf in _leaves(abstract_state):
        name = jax.tree_util.keystr(path, simple=True, separator='.')
        found = getattr(names.get(name), 'shape', None)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and found not in (None, leaf.shape):
            raise ValueError(f'{name} is {found} there, {leaf.shape} by the config')


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def sweep(folder) -> None:
    """Removes what saves have left that were killed or met a full disk: it may be the very room that is missing."""
    if jax.process_index() == 0:
        for left in half_written(folder):
            left.rmtree()


class _ToldOnce(logging.Filter):
    """Drops Orbax's own account, of many lines, of an error that ends in `CannotWrite`."""

    def filter(self, record):
        return not (record.exc_info and refused(record.exc_info[1]))


logging.getLogger('absl').addFilter(_ToldOnce())


class Checkpoints:
    """The checkpoints of one folder, on a disk or in a bucket."""

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(absolute(folder), options=options)
        self._saving = None  # the step of the save that nobody has waited for yet
        self._whole = self._manager.latest_step()

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, iterator, notes: dict[str, Any]) -> None:
        """Starts an asynchronous save; the state may be donated as soon as this returns.

        Raises RuntimeError if nothing was written, and CannotWrite if this save or the one before met a full disk.
        """
        self.wait()
        sums = np.asarray(checksums(state)).tolist()
        # Copied, because Orbax writes later, when the caller has changed its notes and moved its iterator.
        check = copy.deepcopy({'checksums': sums, 'data': iterator.get_state(), 'notes': notes})
        self._saving = step
        with self._writing():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    check=ocp.args.JsonSave(check),
                ),
            )
        if not saved:
            raise RuntimeError(f'the checkpoint of step {step} was not written: step {self.latest} is already there')

    def check(self) -> None:
        """Raises what the save under way has met, CannotWrite for a full disk. Waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what has been saved is on disk. Raises what the save has met, CannotWrite for a full disk."""
        if self._saving is None:
            return
        with self._writing():
            self._manager.wait_until_finished()
        self._whole, self._saving = self._saving, None

    @contextmanager
    def _writing(self):
        good = f'the last good checkpoint is step {self._whole}' if self._whole else 'there is no checkpoint yet'
        remedy = 'put that right' if in_bucket(self._manager.directory) else 'make room'
        then = f'{good}: {remedy} and run the command again'
        try:
            with writing(f'the checkpoint of step {self._saving}', self._manager.directory, then):
                yield
        except BaseException:
            self._saving = None  # told once: whoever closes is not told again
            raise

    def restore_newest(self, abstract_state: PyTree, iterator=None, *, before: int | None = None) -> Restored | None:
        """The newest checkpoint that is whole, or the newest before a step; None when there are none at all.

        Moves `iterator`, if given, to where it was. A damaged checkpoint is passed over with a warning. For whoever
        goes on training, which an iterator tells, it is deleted once an older one has been restored, and so is what
        unfinished saves have left. Raises RuntimeError when none of those that are there can be used.
        """
        if iterator is not None:
            sweep(self._manager.directory)
        steps = sorted((step for step in self._manager.all_steps() if before is None or step < before), reverse=True)
        damaged = []
        for step in steps:
            try:
                restored = self._restore(step, abstract_state, iterator)
            except Exception as error:  # Orbax raises Exception, ValueError and KeyError for damage
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ''
                if (why := unanswered(error)) is not None:  # no damage: what cannot be read now must not be deleted
                    raise RuntimeError(f'{self._manager.directory / str(step)} cannot be read now: {why}') from error
                damaged.append((step, f'{type(error).__name__}: {reason}'))
                continue
            for bad, reason in damaged:
                log.warning('checkpoint %d is damaged (%s); going on from checkpoint %d', bad, reason, step)
                if iterator is not None:  # or Orbax drops every save up to the damaged step
                    self._manager.delete(bad)
            self._whole = step
            return restored
        if steps:
            reasons = '; '.join(f'{step}: {reason}' for step, reason in damaged)
            raise RuntimeError(
                f'none of the checkpoints in {self._manager.directory} can be used: they are damaged, or of another '
                f"network than the config's ({reasons})"
            )
        return None

    def _restore(self, step: int, abstract_state: PyTree, iterator) -> Restored:
        check_shapes(self._manager.directory / str(step) / 'state', abstract_state)
        got = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), check=ocp.args.JsonRestore()),
        )
        found, wanted = np.asarray(checksums(got.state)), np.asarray(got.check['checksums'])
        if found.shape != wanted.shape or (found != wanted).any():
            names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(got.state)]
            bad = [name for name, a, b in zip(names, found, wanted) if (a != b).any()]
            raise ValueError(f'checksums differ for {", ".join(bad[:3])}{" ..." if len(bad) > 3 else ""}')
        if iterator is not None:
            iterator.set_state(got.check['data'])
        return Restored(got.state, step, got.check['notes'], got.check['data'])

    def close(self) -> None:
        """Waits for the save under way. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()
