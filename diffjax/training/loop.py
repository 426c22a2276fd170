"""The one training loop: restore, step, log, checkpoint, stop."""

import copy
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from diffjax.core.types import Array, PyTree
from diffjax.data import to_global
from diffjax.tasks import Task
from diffjax.training.averages import Average
from diffjax.training.checkpoints import CHECKPOINTS, Checkpoints, abstract
from diffjax.training.flops import count_flops
from diffjax.training.heap import give_back
from diffjax.training.metrics import Log
from diffjax.training.nonfinite import NonFiniteError, keep_batch, read_again
from diffjax.training.places import check_place, place_of
from diffjax.training.posthoc_ema import SNAPSHOTS, power_profiles
from diffjax.training.processes import stop_requests
from diffjax.training.sharding import Rules, batch_sharding, check_batch, replicated, state_shardings
from diffjax.training.snapshots import Snapshots
from diffjax.training.state import TrainState, init_state
from diffjax.training.step import make_step, skipping

log = logging.getLogger('diffjax')

MAX_AHEAD = 8  # steps started and not done: the device never waits for the host, and SIGTERM for no more than these
KEEP_BARRIERS = {'xla_disable_hlo_passes': 'cse_barrier_expander'}  # on CPUs; see _apart in nets/stacking.py


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how: the `training` section of a config.

    `checkpoints` is the folder that holds the run's checkpoints and snapshots, gs://BUCKET/FOLDER or another of this
    machine's, with the config beside them; '': the workdir, where everything else stays.
    `init_from` is a folder that `python -m diffjax.weights import` wrote: the parameters to start from; '' draws them.
    `ema` names the averages of the parameters: each a decay, or an entry of `training.averages`. Every
    `ema_snapshot_every_steps` steps, and at the end, the power averages among them are kept for `--mode=ema`; 0: never.
    `on_nan`: a step whose loss, gradient or parameters become NaN or infinite stops the run, with its batch kept for a
    replay; `skip` leaves the state as it was before such a step, counts it in the column `skipped`, and stops the run
    after more than `max_skipped_in_a_row`.
    """

    num_steps: int
    batch_size: int
    num_microbatches: int = 1
    log_every_steps: int = 100
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 3
    checkpoints: str = ''
    ema: dict[str, float | Average] = field(default_factory=lambda: {'ema': 0.9999})
    ema_snapshot_every_steps: int = 0
    init_from: str = ''
    on_nan: str = 'stop'
    max_skipped_in_a_row: int = 10

    def __post_init__(self):
        steps = 'num_steps', 'log_every_steps', 'checkpoint_every_steps'
        for name in (*steps, 'batch_size', 'num_microbatches', 'keep_checkpoints'):
            if getattr(self, name) < 1:
                raise ValueError(f'training.{name} must be at least 1, got {getattr(self, name)}')
        for name, decay in self.ema.items():
            if not re.fullmatch(r'\w+', name) or name == 'raw':
                raise ValueError(f"training.ema: averages are called by a word that is not 'raw', got {name!r}")
            if not isinstance(decay, Average) and not 0 < decay < 1:
                raise ValueError(f'training.ema.{name} is a decay between 0 and 1, got {decay}')
        if self.on_nan not in ('stop', 'skip'):
            raise ValueError(f"training.on_nan is 'stop' or 'skip', got {self.on_nan!r}")
        check_place(self.checkpoints)
        if self.max_skipped_in_a_row < 0:
            raise ValueError(f'training.max_skipped_in_a_row is a number of steps, got {self.max_skipped_in_a_row}')
        if self.ema_snapshot_every_steps < 0 or (self.ema_snapshot_every_steps and not power_profiles(self.ema)):
            raise ValueError(
                'training.ema_snapshot_every_steps is a number of steps, 0 for never, and keeps power averages such as '
                f'power:sigma_rel=0.05 in training.ema; got {self.ema_snapshot_every_steps} with {self.ema}'
            )


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
    rules: Rules = ()  # where parameters are kept on it (`sharding`)
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
        shardings = state_shardings(self.mesh, shapes, self.rules)
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
        if self.settings.on_nan == 'skip':
            step = skipping(step)
        everywhere = replicated(self.mesh)
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, everywhere, batch_sharding(self.mesh)),
            out_shardings=(shardings, everywhere),
            compiler_options=KEEP_BARRIERS if jax.default_backend() == 'cpu' else None,
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
        NonFiniteError: naming the step, the last good checkpoint, and where the batch is kept that did it; nothing is
            saved after that step.
        CannotWrite: where the disk is full; the checkpoints before are whole, and the same call goes on from there.
    """
    settings, mesh = trainer.settings, trainer.mesh
    start = iterator.get_state()
    raw = to_global(next(iterator), batch_sharding(mesh))
    iterator.set_state(start)
    make, shapes, shardings = trainer.init(raw)
    place = place_of(workdir, settings.checkpoints)
    checkpoints = Checkpoints(place / CHECKPOINTS, settings.keep_checkpoints)
    restored = checkpoints.restore_newest(abstract(shapes, shardings), iterator)
    state, step, notes = restored[:3] if restored else (make(params), 0, {})
    if step >= settings.num_steps:
        checkpoints.close()
        announce(f'all {step} steps have been trained before')
        return Result(state, step, stopped=False)
    if step:
        announce(f'going on from checkpoint {step}')

    frozen = jax.device_put(trainer.frozen, replicated(mesh))
    # SIGTERM meanwhile ends the process at once, and loses nothing: compiling can take longer than anybody waits.
    compiled = _compile(trainer, state, frozen, raw, shardings, announce)
    with ExitStack() as closing:
        stop_now = closing.enter_context(stop_requests())  # first, hence last: until all is saved
        closing.callback(checkpoints.close)
        snapshots = Snapshots(place / SNAPSHOTS) if settings.ema_snapshot_every_steps else None
        if snapshots is not None:
            closing.callback(snapshots.close)
            snapshots.forget_after(step)
        journal = Log(workdir, step, settings.num_steps)
        closing.callback(journal.close)
        keeper = _Keeper(trainer, Path(workdir), checkpoints, snapshots, journal, iterator, notes, step)
        while step < settings.num_steps:
            state, metrics = compiled(state, frozen, to_global(next(iterator), batch_sharding(mesh)))
            step += 1
            keeper.after(step, state, metrics)
            if stop_now(step):
                keeper.save(step, state)
                return Result(state, step, stopped=True)
        keeper.save(step, state)
        return Result(state, step, stopped=False)


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
    give_back()
    return compiled


class _Keeper:
    """Collects each step's metrics, logs their means, and saves what has been found finite."""

    def __init__(
        self,
        trainer: Trainer,
        workdir: Path,
        checkpoints: Checkpoints,
        snapshots: Snapshots | None,
        journal: Log,
        iterator: Iterator,
        notes: dict,
        step: int,
    ):
        self._settings, self._seed, self._workdir = trainer.settings, trainer.seed, workdir
        self._checkpoints, self._snapshots, self._journal, self._iterator = checkpoints, snapshots, journal, iterator
        self._known = {name: list(values) for name, values in notes.get('pending', {}).items()}  # since the last row
        self._skipped_in_a_row = notes.get('skipped_in_a_row', 0)
        self._flying = []  # (step, device metrics) not looked at yet
        self._looked = step, copy.deepcopy(iterator.get_state())  # up to which step, and where its batches ended
        self._saved = checkpoints.latest
        self._clock, self._clock_step = time.monotonic(), step

    def after(self, step: int, state: TrainState, metrics: dict[str, Array]) -> None:
        self._flying.append((step, metrics))
        if len(self._flying) > MAX_AHEAD:
            jax.block_until_ready(self._flying[-1 - MAX_AHEAD])
        self._journal.advance()
        if step % self._settings.log_every_steps == 0 or step == self._settings.num_steps:
            self._collect()
            self._write_row(step)
        every = self._settings.ema_snapshot_every_steps
        if every and (step % every == 0 or step == self._settings.num_steps):
            self._collect()
            self._snapshots.save(step, {name: state.ema[name] for name in power_profiles(self._settings.ema)})
        if step % self._settings.checkpoint_every_steps == 0 and step < self._settings.num_steps:
            self.save(step, state)

    def save(self, step: int, state: TrainState) -> None:
        """Saves unless this step is saved already. What waits for the next row is saved too: rows survive a resume."""
        self._collect()
        if self._snapshots is not None:
            self._snapshots.wait()  # whoever goes on from this checkpoint makes no earlier snapshot again
        if self._saved != step:
            notes = {'pending': self._known, 'skipped_in_a_row': self._skipped_in_a_row}
            give_back()  # what the save before has left
            self._checkpoints.save(step, state, self._iterator, notes)
            self._saved = step

    def _write_row(self, step: int) -> None:
        now = time.monotonic()
        values = {name: float(np.mean(each)) if each else math.nan for name, each in self._known.items()}
        if 'skipped' in values:
            values['skipped'] = int(sum(self._known['skipped']))
        values['steps_per_second'] = (step - self._clock_step) / (now - self._clock)
        self._journal.write(step, values)
        self._known, self._clock, self._clock_step = {}, now, step

    def _collect(self) -> None:
        """Fetches what has not been looked at; raises at the first bad step, or the first too many."""
        self._checkpoints.check()
        allowed, skipped = self._settings.max_skipped_in_a_row if self._settings.on_nan == 'skip' else 0, []
        for step, metrics in jax.device_get(self._flying):
            bad = [name for name, value in metrics.items() if not np.isfinite(value)]
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
            if self._skipped_in_a_row > allowed:
                raise self._non_finite(step, bad)
            skipped += [step] if bad else []
            for name, value in metrics.items():
                self._known.setdefault(name, []).extend([] if bad and name != 'skipped' else [float(value)])
        if skipped and jax.process_index() == 0:
            log.warning('not finite, and skipped: step %s', ', '.join(map(str, skipped)))
        if self._flying:
            self._looked = self._flying[-1][0], copy.deepcopy(self._iterator.get_state())
        self._flying = []

    def _non_finite(self, step: int, names: list[str]) -> NonFiniteError:
        """The error for a step, its batch read again and kept."""
        looked, position = self._looked
        good = f'the last good checkpoint is step {self._saved}' if self._saved else 'there is no checkpoint yet'
        before = self._skipped_in_a_row - 1
        times = f', after {before} skipped ones in a row' if before else ''
        try:
            batch = read_again(self._iterator, position, step - looked)
            about = {'seed': self._seed, 'checkpoint': self._saved or 0, 'names': names}
            kept = f'its batch is kept in {keep_batch(self._workdir, step, batch, **about)}: see experiments/replay.py'
        except Exception as error:  # whatever a dataset raises: the step that failed comes first
            kept = f'its batch could not be kept ({type(error).__name__}: {error})'
        return NonFiniteError(f'{" and ".join(names)} became NaN or infinite at step {step}{times}; {good}; {kept}')
