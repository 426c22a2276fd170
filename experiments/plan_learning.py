"""A plan's free numbers, learned by gradient descent through the sampling loop.

For starts x_0 with known end points x*, the loss is the mean over starts of |x_M - x*|^2, where x_M is what the plan
makes of x_0 in M network calls; its root is the RMS distance of the tables. What is learned is a `FreePlan`: all times
but the first, and every coefficient that a deterministic plan of M calls can have. Two optimisers take turns:

    Adam    on minibatches, with a learning rate that falls as a cosine: it finds the valley
    BFGS    on all training starts at once (SciPy's, a line search in each update): a few dozen numbers in a curved
            valley are what it is made for

Only the gradient with respect to x is asked of the network; its parameters stay as they are.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from diffjax.core.parameterizations import Parameterization
from diffjax.core.sampling import pad
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import Plan
from diffjax.core.solvers.free_plans import FreePlan, follow, free
from diffjax.core.types import PyTree


class Starts(NamedTuple):
    """Noise, by its key; the condition; and where the flow carries the noise. N of each."""

    keys: np.ndarray  # key data, [N, ...]
    labels: np.ndarray  # [N]
    ends: np.ndarray  # [N, ...]

    def take(self, which: Any) -> 'Starts':
        return jax.tree.map(lambda column: column[which], self)


class Problem(NamedTuple):
    """What is sampled, and by which distances a plan is judged."""

    name: str  # of the schedule
    schedule: Schedule
    parameterization: Parameterization  # decides what the network can be asked
    params: PyTree  # of the network
    draw: Callable[[PyTree, Plan, jax.Array, jax.Array], jax.Array]  # (params, plan, keys [B], labels [B]) -> x
    train: Starts
    held_out: Starts
    batch_size: int
    double: bool  # float64, where rounding shall not stand in the way; else float32

    def squares(self, params: PyTree, plan: Plan, starts: Starts) -> jax.Array:
        """|x_M - x*|^2 of each start, [B]."""
        x = self.draw(params, plan, jax.random.wrap_key_data(starts.keys), starts.labels)
        return jnp.sum((x - starts.ends) ** 2, axis=tuple(range(1, x.ndim)))


class Settings(NamedTuple):
    """How long, and how fast."""

    num_updates: int  # of Adam
    num_polish: int  # of BFGS, at most
    learning_rate: float
    seed: int
    num_watched: int = 24  # how often the held-out starts are looked at; nothing is chosen by them


class Learned(NamedTuple):
    plan: Plan  # float64
    curve: list[dict[str, Any]]  # update, optimiser, train_rms, held_out_rms


def common_size(plans: list[Plan], num_evaluations: int) -> tuple[int, int, int]:
    """(rows, remembered, noises) of a table that holds all these plans and any free one of so many evaluations."""
    sizes = [(num_evaluations, num_evaluations, 0)]
    sizes += [(len(plan.t), plan.num_remembered, plan.num_noises) for plan in plans]
    return tuple(max(each) for each in zip(*sizes))


class Distances:
    """Distances |x_M - x*| of plans, all through one compiled program; it counts its traces."""

    def __init__(self, problem: Problem, size: tuple[int, int, int]):
        self._problem, self._size, self.num_traces = problem, size, 0

        def squares(params, plan, starts):
            self.num_traces += 1
            return problem.squares(params, plan, starts)

        self._squares = jax.jit(squares)

    def __call__(self, plan: Plan, starts: Starts) -> np.ndarray:
        """[N], float64."""
        problem, num = self._problem, len(starts.labels)
        plan, parts = pad(plan, *self._size), []
        with precision(problem):
            for begin in range(0, num, problem.batch_size):
                which = np.arange(begin, begin + problem.batch_size) % num  # the last chunk is filled up, and cut
                part = self._squares(problem.params, plan, starts.take(which))
                parts.append(np.asarray(part, np.float64)[: num - begin])
        return np.sqrt(np.concatenate(parts))

    def rms(self, plan: Plan, starts: Starts) -> float:
        return float(np.sqrt(np.mean(self(plan, starts) ** 2)))


def precision(problem: Problem) -> contextlib.AbstractContextManager:
    return jax.enable_x64(problem.double)


def learn(problem: Problem, plan: Plan, distances: Distances, settings: Settings, bar: tqdm) -> Learned:
    """The plan that both optimisers make of `plan`: of all they passed by, the lowest training loss."""
    start, curve = float(plan.t[0]), []
    watch_every = max(1, (settings.num_updates + settings.num_polish) // settings.num_watched)

    def fixed(numbers: FreePlan) -> Plan:
        with jax.enable_x64(True):
            doubled = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), numbers)
            return jax.tree.map(np.asarray, follow(problem.schedule, doubled, start))

    def watch(update: int, optimiser: str, losses: list[float], numbers: FreePlan) -> None:
        bar.update()
        if update % watch_every == 0 or update in (settings.num_updates, settings.num_updates + settings.num_polish):
            rms = {'train_rms': float(np.sqrt(np.mean(losses)))}
            rms['held_out_rms'] = distances.rms(fixed(numbers), problem.held_out)
            curve.append({'update': update, 'optimiser': optimiser} | rms)
            bar.set_postfix_str(f'RMS {rms["train_rms"]:.4f}, held out {rms["held_out_rms"]:.4f}')

    def loss(numbers: FreePlan, params: PyTree, starts: Starts) -> jax.Array:
        return jnp.mean(problem.squares(params, follow(problem.schedule, numbers, start), starts))

    rms = {'train_rms': distances.rms(plan, problem.train), 'held_out_rms': distances.rms(plan, problem.held_out)}
    curve.append({'update': 0, 'optimiser': 'start'} | rms)
    with precision(problem):
        dtype, slope = jnp.float64 if problem.double else jnp.float32, jax.jit(jax.value_and_grad(loss))
        first = jax.tree.map(lambda a: jnp.asarray(a, dtype), free(problem.schedule, plan))
        found = [first, adam(problem, slope, first, settings, watch)]
        found.append(bfgs(problem, slope, found[-1], settings, watch))
    bar.total = bar.n  # BFGS may have ended early
    bar.refresh()
    plans = [plan, *map(fixed, found)]
    return Learned(min(plans, key=lambda each: np.nan_to_num(distances.rms(each, problem.train), nan=np.inf)), curve)


def adam(problem: Problem, slope: Callable, numbers: FreePlan, settings: Settings, watch: Callable) -> FreePlan:
    """Minibatches in a new order each time round. slope: (numbers, params, starts) -> (loss, gradient)."""
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, max(settings.num_updates, 1)))
    rng, order, losses, state = np.random.default_rng(settings.seed), np.zeros(0, int), [], optimizer.init(numbers)

    @jax.jit
    def step(gradient, numbers, state):
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(numbers, update), state

    for update in range(1, settings.num_updates + 1):
        if len(order) < problem.batch_size:
            order = rng.permutation(len(problem.train.labels))
        which, order = order[: problem.batch_size], order[problem.batch_size :]
        value, gradient = slope(numbers, problem.params, problem.train.take(which))
        numbers, state = step(gradient, numbers, state)
        losses = [*losses[-20:], float(value)]
        watch(update, 'adam', losses, numbers)
    return numbers


def bfgs(problem: Problem, slope: Callable, numbers: FreePlan, settings: Settings, watch: Callable) -> FreePlan:
    """All training starts in every update, chunk by chunk: memory is that of one batch."""
    from scipy.optimize import OptimizeResult, minimize

    size, num = problem.batch_size, len(problem.train.labels)
    chunks = [problem.train.take(slice(begin, begin + size)) for begin in range(0, num - size + 1, size)]
    vector, restore = ravel_pytree(numbers)
    count = iter(range(settings.num_updates + 1, settings.num_updates + settings.num_polish + 1))

    def whole(at: np.ndarray) -> tuple[float, np.ndarray]:
        parts = [slope(restore(jnp.asarray(at, vector.dtype)), problem.params, chunk) for chunk in chunks]
        gradients = [np.asarray(ravel_pytree(gradient)[0], np.float64) for _, gradient in parts]
        return float(np.mean([value for value, _ in parts])), np.mean(gradients, 0)

    def after_each(intermediate_result: OptimizeResult) -> None:
        watch(next(count), 'bfgs', [intermediate_result.fun], restore(jnp.asarray(intermediate_result.x, vector.dtype)))

    if not settings.num_polish:
        return numbers
    options = {'maxiter': settings.num_polish, 'gtol': 0.0}
    found = minimize(
        whole, np.asarray(vector, np.float64), jac=True, method='BFGS', callback=after_each, options=options
    )
    return restore(jnp.asarray(found.x, vector.dtype))
