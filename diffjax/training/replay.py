"""A step that was not finite, made again as it was, and where in it the first such value arises.

What a step draws is a function of the seed and its number; the batch is the one that the run has kept
(`training.nonfinite`); the state comes from the newest checkpoint before, by the steps in between. All of it is the
same to the bit, so the replayed step is the one that failed. It then runs once more operation by operation, under
JAX's own checks.
"""

import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import PyTree
from diffjax.training.checkpoints import CHECKPOINTS, Checkpoints, abstract
from diffjax.training.loop import Trainer
from diffjax.training.nonfinite import Kept, read_kept
from diffjax.training.places import place_of
from diffjax.training.sharding import batch_sharding, replicated


class Origin(NamedTuple):
    """The first operation with a value that is not finite."""

    operation: str  # the primitive, such as log
    value: str  # nan or inf
    frames: list[str]  # our lines on the way to it, the innermost last


class Replayed(NamedTuple):
    step: int
    names: list[str]  # of the metrics that are not finite in the replay
    batch: list[str]  # what is not finite in the batch, in the state before the step, and in the parameters after it
    before: list[str]
    after: list[str]
    origins: list[Origin]


def replay(
    trainer: Trainer,
    iterator: Iterator,
    workdir: Path,
    *,
    step: int | None = None,
    params: PyTree = None,
    jump: bool = False,
    announce: Callable[[str], None] = print,
) -> Replayed:
    """Makes the step again whose batch the run in a workdir has kept, and says what it finds.

    Args:
        step: which one; None the newest that is kept.
        params: where the run began, if not from drawn ones.
        jump: takes the parameters of the checkpoint for those before the step, instead of training up to it: quicker,
            and enough where the batch alone is to blame.

    Raises FileNotFoundError where no batch is kept. Nothing in the workdir changes.
    """
    kept = read_kept(workdir, step)
    announce(f'step {kept.step}: {" and ".join(kept.names)} became NaN or infinite; its batch: {kept.path}')
    raw = jax.device_put(kept.batch, batch_sharding(trainer.mesh))
    frozen = jax.device_put(trainer.frozen, replicated(trainer.mesh))
    # What is skipped or kept at the end of the step hides what came out of it.
    bare = replace(trainer, settings=replace(trainer.settings, on_nan='stop'))
    state, shardings = _state_before(trainer, kept, iterator, frozen, raw, workdir, params, jump, announce)

    batch, before = unclean(kept.batch), unclean(state)
    announce(f'the batch: {_listed(batch)}')
    announce(f'the state before the step: {_listed(before)}')
    one = bare.step(shardings)
    origins = find_origins(lambda: one(state, frozen, raw))
    state, metrics = one(state, frozen, raw)
    names = [name for name, value in metrics.items() if not np.isfinite(value)]
    after = unclean(state.params)
    announce(f'not finite in the replay: {", ".join(names) or "nothing"}')
    for found in origins:
        meant = ' (some are meant, as in masks)' if found.value == 'inf' else ''
        announce('\n  '.join([f'the first {found.value}{meant} comes out of {found.operation}', *found.frames]))
    announce(f'the parameters after the step: {_listed(after)}')
    return Replayed(kept.step, names, batch, before, after, origins)


def _state_before(trainer, kept: Kept, iterator, frozen, raw, workdir, params, jump, announce) -> tuple:
    """(the state before the kept step, its shardings)."""
    make, shapes, shardings = trainer.init(raw)
    place = place_of(workdir, trainer.settings.checkpoints)
    checkpoints = Checkpoints(place / CHECKPOINTS, trainer.settings.keep_checkpoints)
    restored = checkpoints.restore_newest(abstract(shapes, shardings), before=kept.step)
    checkpoints.close()
    state, start = (restored.state, restored.step) if restored else (make(params), 0)
    if jump:
        announce(f'the parameters are those of {f"checkpoint {start}" if start else "the start"}')
        return state._replace(step=jnp.int32(kept.step - 1)), shardings
    announce(f'from {f"checkpoint {start}" if start else "the start"} by {kept.step - 1 - start} steps')
    if restored:
        iterator.set_state(restored.position)
    compiled = trainer.step(shardings)
    for _ in range(start + 1, kept.step):
        state, _ = compiled(state, frozen, jax.device_put(next(iterator), batch_sharding(trainer.mesh)))
    there = next(iterator)
    if differing := [name for name in kept.batch if not _same(there[name], kept.batch[name])]:
        announce(f'{", ".join(differing)} of the batch is not what the dataset has there: it was read or kept damaged')
    return state, shardings


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes()


def unclean(tree: PyTree, limit: int = 5) -> list[str]:
    """A line for each leaf with values that are not finite: its path, how many of how many, the first one's index."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        bad = ~np.isfinite(np.asarray(leaf).astype(np.float64))
        if bad.any():
            first = ', '.join(map(str, np.argwhere(bad)[0]))
            name = jax.tree_util.keystr(path, simple=True, separator='.')
            found.append(f'{name}: {bad.sum():,} of {bad.size:,}, the first at [{first}]')
    return found[:limit] + ([f'and {len(found) - limit} more'] if len(found) > limit else [])


def _listed(lines: list[str]) -> str:
    return '; '.join(lines) or 'finite'


def find_origins(run: Callable[[], object]) -> list[Origin]:
    """The first operations of a function that give a NaN, and an infinite value; run one by one, loops unrolled."""
    found = []
    for value, check in (('nan', jax.debug_nans), ('inf', jax.debug_infs)):
        try:
            with jax.disable_jit(), check(True):
                run()
        except FloatingPointError as error:
            named = re.search(r'encountered in (\S+)', str(error))
            found.append(Origin(named[1].rstrip('.') if named else str(error), value, _frames(error)))
    return found


def _frames(error: BaseException, at_most: int = 4) -> list[str]:
    """Lines outside of libraries, of an error or of its cause, which for a backward pass tells of the forward one."""
    while error is not None:
        frames = [
            f'{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}'
            for frame in traceback.extract_tb(error.__traceback__)
            if 'site-packages' not in frame.filename and frame.filename != __file__
        ]
        if frames:
            return frames[-at_most:]
        error = error.__cause__
    return []
