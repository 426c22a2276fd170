"""What samplers are compared on: exact denoisers, whose flow and distribution are known, or a trained run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from command_line import Stop
from hand_made import stochastic
from run_measures import Measures, has_test_images

import diffjax
from diffjax.components import component
from diffjax.core import oracles, schedules
from diffjax.core.parameterizations import EDM, Parameterization
from diffjax.core.sampling import sample, sample_keys, starting_noise
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import Plan, ddim
from diffjax.run import balanced_labels, make_sampler, to_output

NUM_DIRECTIONS, REFERENCE_FACTOR = 32, 16  # of the sliced distance: directions; exact samples for each sample
NUM_TRAJECTORIES = 24  # paths that are kept to be drawn, where the data is a plane


class Case(NamedTuple):
    """One sampler: names for the table, and its plan."""

    grid: str
    solver: str
    budget: int
    num_steps: int
    times: np.ndarray
    plan: Plan

    @property
    def stochastic(self) -> bool:
        return stochastic(self.plan)


class Target(NamedTuple):
    """What samplers are asked to sample: one schedule and one denoiser behind one compiled program."""

    name: str  # the schedule's
    schedule: Schedule
    parameterization: Parameterization  # with the next, decides what can be asked
    draw: Callable[[Plan], Any]  # runs the program
    measure: Callable[[Case, Any], dict[str, Any]]  # error and further columns of what was drawn
    count_traces: Callable[[], int]
    floor: float  # what as many perfect samples would show
    learned_variance: bool = False
    calls_per_row: int = 1  # network evaluations for each row of a plan: 2 with guidance
    mixture: oracles.GaussianMixture | None = None
    start: Callable[[], np.ndarray] | None = None  # the oracle's x at t = 1 of the paths that are held against the flow


class SlicedWasserstein:
    """The sliced 2-Wasserstein distance between N samples and a mixture, x: [N, D].

    sqrt(mean over directions and quantiles (q - q*)^2), the mixture's quantiles q* from 16 N exact samples.
    """

    def __init__(self, mixture: oracles.GaussianMixture, num_samples: int, seed: int):
        directions = np.random.default_rng(seed).standard_normal((mixture.means.shape[1], NUM_DIRECTIONS))
        self._directions = directions / np.linalg.norm(directions, axis=0)
        key, other = jax.random.split(jax.random.key(seed + 1))
        reference = np.asarray(mixture.sample(key, REFERENCE_FACTOR * num_samples)[0]) @ self._directions
        self._quantiles = np.quantile(reference, (np.arange(num_samples) + 0.5) / num_samples, axis=0)
        exact = [np.asarray(mixture.sample(k, num_samples)[0]) for k in jax.random.split(other, 4)]
        self.floor = float(np.mean([self(x) for x in exact]))

    def __call__(self, x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((np.sort(x @ self._directions, 0) - self._quantiles) ** 2)))


def oracle_target(name: str, mixture: oracles.GaussianMixture, distance: SlicedWasserstein, options) -> Target:
    """An exact denoiser on a schedule, in float64: rounding does not stand in the way of small errors.

    What it draws is (start, end, paths); paths [M, P, 2] only where the data is a plane.
    """
    schedule = component(schedules, name, '--schedules')()
    denoiser, shape, traces, ends = mixture.denoiser(schedule), mixture.means.shape[1:], [], {}
    keep = (lambda x, t: x[:NUM_TRAJECTORIES]) if shape == (2,) else None

    @jax.jit
    def follow(plan, keys):
        traces.append(name)  # runs when traced, not when called
        start = starting_noise(plan, keys, shape)
        return start, *sample(denoiser, plan, start, None, keys, save=keep)

    def keys():
        return sample_keys(jax.random.key(options.seed), options.num_samples)

    def draw(plan):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, follow(plan, keys()))

    def start():
        with jax.enable_x64(True):
            plan = ddim(schedule, [1.0, 0.0])
            return np.asarray(starting_noise(plan, keys(), shape), np.float64)[: options.num_paths]

    def measure(case, drawn):
        x, distribution = drawn[1], distance(drawn[1])
        if case.stochastic:
            return {'error': distribution, 'error_kind': 'distribution', 'distribution_error': distribution}
        end = float(case.times[-1])
        if end not in ends:
            ends[end] = mixture.flow(schedule, start(), 1.0, end, tolerance=1e-10)
        error = rms(x[: options.num_paths], ends[end])
        return {'error': error, 'error_kind': 'flow', 'distribution_error': distribution}

    return Target(
        name=name,
        schedule=schedule,
        parameterization=EDM(),  # like it, an exact denoiser knows x0 and eps at both ends
        draw=draw,
        measure=measure,
        count_traces=lambda: len(traces),
        floor=distance.floor,
        mixture=mixture,
        start=start,
    )


def rms(x: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square distance of two sets of points, [N, D]."""
    return float(np.sqrt(np.mean(np.sum((x - truth) ** 2, 1))))


def oracle_targets(options) -> list[Target]:
    mixture = component(oracles, options.oracle, '--oracle')()
    distance = SlicedWasserstein(mixture, options.num_samples, options.seed)
    return [oracle_target(name, mixture, distance, options) for name in options.schedules]


def workdir_target(options) -> Target:
    """A trained run against its test images."""
    run = diffjax.load(options.workdir)
    experiment, num = run.experiment, options.num_samples
    if not has_test_images(experiment):
        raise Stop(f'{options.workdir} has no test images: the Frechet distance over pixels needs them')
    chunks = -(-num // experiment.sampler.batch_size)
    experiment = replace(experiment, sampler=replace(experiment.sampler, batch_size=-(-num // chunks)))
    sampler, task, objective = make_sampler(experiment), experiment.task, experiment.task.objective
    sampling, labels = experiment.sampling_options(), balanced_labels(num, task.num_classes)
    measures = Measures(experiment)

    def draw(plan):
        return to_output(experiment, sampler(run.params, plan, labels, **sampling, seed=options.seed))

    def measure(case, images):
        figures = measures(images, labels)
        return {'error': figures.pop('frechet_distance'), 'error_kind': 'frechet', **figures}

    return Target(
        name=type(objective.schedule).__name__.lower(),
        schedule=objective.schedule,
        parameterization=objective.parameterization,
        learned_variance=objective.bound_scale is not None,
        draw=draw,
        measure=measure,
        calls_per_row=1 if sampling['guidance'] is None else 2,
        count_traces=lambda: sampler.num_traces,
        floor=measures.of_real(num),
    )
