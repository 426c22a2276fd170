"""The one training loop: restore, step, log, checkpoint, stop."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffjax.core.types import Array, PyTree
from diffjax.data import to_global
from diffjax.tasks import Task
from diffjax.training.averages import Average
from diffjax.training.checkpoints import Checkpoints, abstract
from diffjax.training.flops import count_flops
from diffjax.training.metrics import Log
from diffjax.training.posthoc_ema import SNAPSHOTS, power_profiles
from diffjax.training.sharding import batch_sharding, check_batch, replicated, state_shardings
from diffjax.training.snapshots import Snapshots
from diffjax.training.state import TrainState, init_state
from diffjax.training.step import make_step

log = logging.getLogger('diffjax')


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how: the `training` section of a config.

    `init_from` is a folder that `python -m diffjax.weights import` wrote: the parameters to start from; '' draws them.
    `ema` names the averages of the parameters: each a decay, or an entry of `training.averages`. Every
    `ema_snapshot_every_steps` steps, and at the end, the power averages among them are kept for `--mode=ema`; 0: never.
    """

    num_steps: int
    batch_size: int
    num_microbatches: int = 1
    log_every_steps: int = 100
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 3
    ema: dict[str, float | Average] = field(default_factory=lambda: {'ema': 0.9999})
    ema_snapshot_every_steps: int = 0
    init_from: str = ''

    def __post_init__(self):
        for name in ('num_steps', 'batch_size', 'num_microbatches', 'log_every_steps', 'checkpoint_every_steps'):
            if getattr(self, name) < 1:
                raise ValueError(f'training.{name} must be at least 1, got {getattr(self, name)}')
        for name, decay in self.ema.items():
            if not isinstance(decay, Average) and not 0 < decay < 1:
                raise ValueError(f'training.ema.{name} is a decay between 0 and 1, got {decay}')
        if self.ema_snapshot_every_steps < 0 or (self.ema_snapshot_every_steps and not power_profiles(self.ema)):
            raise ValueError(
                'training.ema_snapshot_every_steps is a number of steps, 0 for never, and keeps power averages such as '
                f'power:sigma_rel=0.05 in training.ema; got {self.ema_snapshot_every_steps} with {self.ema}'
            )


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


class Result(NamedTuple):
    state: TrainState
    step: int
    stopped: bool  # by SIGTERM, before the end


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A task with all that training it needs, sharded over a mesh."""

    task: Task
    optimizer: optax.GradientTransformation
    settings: Settings
    prepare: Callable[[PyTree, Array], PyTree]  # (raw batch, key) -> the task's batch, on the device
    mesh: Mesh
    seed: int = 0
    frozen: PyTree = ()
    encode: Callable[[PyTree, PyTree, Array], PyTree] | None = None  # (frozen, batch, key) -> the batch, encoded

    def __post_init__(self):
        check_batch(self.settings.batch_size, self.settings.num_microbatches, self.mesh)

    def init(self, raw: PyTree) -> tuple[Callable[[], TrainState], PyTree, PyTree]:
        """(function that makes the state at step 0 in place, its shapes, its shardings). raw: a batch or its shapes.

        The function draws the parameters, or takes them: make(params).
        """
        prepared = jax.eval_shape(self.prepare, raw, jax.random.key(0))
        if self.encode is not None:
            prepared = jax.eval_shape(self.encode, self.frozen, prepared, jax.random.key(0))

        def make(params=None):
            batch = jax.tree.map(lambda s: jax.numpy.zeros((1, *s.shape[1:]), s.dtype), prepared)
            return init_state(self.task, self.optimizer, self.settings.ema, batch, self.seed, params)

        shapes = jax.eval_shape(make)
        shardings = state_shardings(self.mesh, shapes)
        return jax.jit(make, out_shardings=shardings), shapes, shardings

    def step(self, shardings: PyTree) -> Callable:
        """The jitted step: (state, frozen, raw batch) -> (state, metrics), the state donated."""
        step = make_step(
            self.task,
            self.optimizer,
            prepare=self.prepare,
            encode=self.encode,
            profiles=self.settings.ema,
            num_microbatches=self.settings.num_microbatches,
        )
        everywhere = replicated(self.mesh)
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, everywhere, batch_sharding(self.mesh)),
            out_shardings=(shardings, everywhere),
        )


def train(
    trainer: Trainer,
    iterator: Iterator,
    workdir: Path,
    *,
    params: PyTree = None,
    announce: Callable[[str], None] = print,
) -> Result:
    """Trains to the end, or from where the workdir's newest checkpoint stands.

    Args:
        iterator: a Grain iterator of raw batches (this process's part of each), whose position is checkpointed.
        params: where a run without a checkpoint starts; None draws them.
        announce: is told what a person wants to see before the bar starts.

    Raises:
        NonFiniteError: naming the step and the last good checkpoint; nothing is saved after that step.
    """
    settings, mesh = trainer.settings, trainer.mesh
    start = iterator.get_state()
    raw = to_global(next(iterator), batch_sharding(mesh))
    iterator.set_state(start)
    make, shapes, shardings = trainer.init(raw)
    checkpoints = Checkpoints(Path(workdir) / 'checkpoints', settings.keep_checkpoints)
    restored = checkpoints.restore_newest(abstract(shapes, shardings), iterator)
    state, step, notes = restored or (make(params), 0, {})
    if step >= settings.num_steps:
        checkpoints.close()
        announce(f'all {step} steps have been trained before')
        return Result(state, step, stopped=False)
    if step:
        announce(f'going on from checkpoint {step}')

    frozen = jax.device_put(trainer.frozen, replicated(mesh))
    with _sigterm() as signalled:  # before compiling, which can take minutes: a signal then stops after one step
        compiled = _compile(trainer, state, frozen, raw, shardings, announce)
        journal = Log(workdir, step, settings.num_steps)
        snapshots = Snapshots(Path(workdir) / SNAPSHOTS) if settings.ema_snapshot_every_steps else None
        if snapshots is not None:
            snapshots.forget_after(step)
        keeper = _Keeper(settings, checkpoints, snapshots, journal, notes.get('pending', {}), step)
        try:
            while step < settings.num_steps:
                state, metrics = compiled(state, frozen, to_global(next(iterator), batch_sharding(mesh)))
                step += 1
                keeper.after(step, state, metrics, iterator)
                if _agreed(signalled, step, settings.log_every_steps):
                    keeper.save(step, state, iterator)
                    return Result(state, step, stopped=True)
            keeper.save(step, state, iterator)
            return Result(state, step, stopped=False)
        finally:
            journal.close()
            if snapshots is not None:
                snapshots.close()
            checkpoints.close()


def _compile(trainer: Trainer, state: TrainState, frozen: PyTree, raw: PyTree, shardings: PyTree, announce: Callable):
    """The step as a program, its cost announced."""
    traced = trainer.step(shardings).trace(state, frozen, raw)
    num_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    announce(
        f'parameters: {num_parameters:,}   batch: {trainer.settings.batch_size}   '
        f'FLOPs per step: {count_flops(traced.jaxpr):.3g}'
    )
    began = time.monotonic()
    compiled = traced.lower().compile()
    announce(f'compiled in {time.monotonic() - began:.1f} s')
    return compiled


class _Keeper:
    """Collects each step's metrics, logs their means, and saves what has been found finite."""

    def __init__(
        self,
        settings: Settings,
        checkpoints: Checkpoints,
        snapshots: Snapshots | None,
        journal: Log,
        pending: dict,
        step: int,
    ):
        self._settings, self._checkpoints, self._snapshots, self._journal = settings, checkpoints, snapshots, journal
        self._known = {name: list(values) for name, values in pending.items()}  # host floats since the last row
        self._flying = []  # (step, device metrics) not looked at yet
        self._saved = self._checkpoints.latest
        self._clock, self._clock_step = time.monotonic(), step

    def after(self, step: int, state: TrainState, metrics: dict[str, Array], iterator) -> None:
        self._flying.append((step, metrics))
        self._journal.advance()
        if step % self._settings.log_every_steps == 0 or step == self._settings.num_steps:
            self._collect()
            now = time.monotonic()
            values = {name: float(np.mean(each)) for name, each in self._known.items()}
            values['steps_per_second'] = (step - self._clock_step) / (now - self._clock)
            self._journal.write(step, values)
            self._known, self._clock, self._clock_step = {}, now, step
        every = self._settings.ema_snapshot_every_steps
        if every and (step % every == 0 or step == self._settings.num_steps):
            self._collect()
            self._snapshots.save(step, {name: state.ema[name] for name in power_profiles(self._settings.ema)})
        if step % self._settings.checkpoint_every_steps == 0 and step < self._settings.num_steps:
            self.save(step, state, iterator)

    def save(self, step: int, state: TrainState, iterator) -> None:
        """Saves unless this step is saved already. What waits for the next row is saved too: rows survive a resume."""
        self._collect()
        if self._snapshots is not None:
            self._snapshots.wait()  # whoever goes on from this checkpoint makes no earlier snapshot again
        if self._saved != step:
            self._checkpoints.save(step, state, iterator, {'pending': self._known})
            self._saved = step

    def _collect(self) -> None:
        """Fetches what has not been looked at, and raises at the first step that is not finite."""
        for step, metrics in jax.device_get(self._flying):
            bad = [name for name, value in metrics.items() if not np.isfinite(value)]
            if bad:
                good = (
                    f'the last good checkpoint is step {self._saved}' if self._saved else 'there is no checkpoint yet'
                )
                raise NonFiniteError(f'{" and ".join(bad)} became NaN or infinite at step {step}; {good}')
            for name, value in metrics.items():
                self._known.setdefault(name, []).append(float(value))
        self._flying = []


@contextmanager
def _sigterm():
    """A list that holds the signal once SIGTERM has come; the old handler is put back afterwards."""
    received = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread, where no handler can be set
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _agreed(signalled: list, step: int, log_every_steps: int) -> bool:
    """Whether all processes shall stop now. Several ask each other at logged steps, where they wait anyway."""
    if jax.process_count() == 1:
        return bool(signalled)
    if step % log_every_steps:
        return False
    return bool(multihost_utils.process_allgather(np.asarray(bool(signalled))).any())
