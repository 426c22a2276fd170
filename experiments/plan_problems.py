"""What a plan can be learned on: an exact denoiser on a schedule, or a trained run.

Starts are numbered: start i has the noise that sample i has when samples are drawn with the same seed. The end point x*
of a start is

    oracle    where the exact probability flow carries it from t = 1 (SciPy's DOP853, tolerance 1e-8)
    run       where a plan of 200 network calls carries it: Heun's method in the angle arctan(sigma / alpha), 100 steps
              on the config's own grid, with the config's guidance
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from plan_learning import Problem, Starts
from run_measures import Measures, has_test_images

import diffjax
from diffjax.build import build_plan
from diffjax.components import component
from diffjax.core import oracles, schedules
from diffjax.core.parameterizations import EDM
from diffjax.core.sampling import sample, sample_keys, starting_noise
from diffjax.core.solvers import Plan
from diffjax.run import Run, balanced_labels, to_output

REFERENCE_SOLVER, REFERENCE_STEPS = 'heun:coordinate=angle', 100
TOLERANCE = 1e-8  # of an oracle's exact flow


def split(keys: jax.Array, labels: np.ndarray, ends: np.ndarray, num_train: int) -> tuple[Starts, Starts]:
    """(training, held out)."""
    starts = Starts(np.asarray(jax.random.key_data(keys)), labels, ends)
    return starts.take(slice(num_train)), starts.take(slice(num_train, None))


def oracle_problem(name: str, options: Any) -> Problem:
    """An exact denoiser in float64."""
    schedule, mixture = component(schedules, name, '--schedules')(), component(oracles, options.oracle, '--oracle')()
    denoiser, shape, num = mixture.denoiser(schedule), mixture.means.shape[1:], options.num_train + options.num_held_out

    def draw(params, plan, keys, labels):
        return sample(denoiser, plan, starting_noise(plan, keys, shape), None, keys)[0]

    with jax.enable_x64(True):
        keys = sample_keys(jax.random.key(options.seed), num)
        noise = np.asarray(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys))
    top = float(schedule.sigma(np.float64(1.0)))
    ends = mixture.flow(schedule, top * noise, 1.0, 0.0, tolerance=TOLERANCE)
    train, held_out = split(keys, np.zeros(num, np.int32), ends, options.num_train)
    return Problem(
        name=name,
        schedule=schedule,
        parameterization=EDM(),  # like it, an exact denoiser knows x0 and eps at both ends
        params=(),
        draw=draw,
        train=train,
        held_out=held_out,
        batch_size=options.batch_size,
        double=True,
    )


class RunProblem(NamedTuple):
    """A trained run, what is learned on it, and how its samples are measured."""

    run: Run
    problem: Problem
    reference: Plan
    labels: np.ndarray
    seed: int

    def sampled(self, plan: Plan) -> np.ndarray:
        """All starts through the run's own sampler, as `sample` and `evaluate` call it: [N, ...]."""
        run = self.run
        return run.sampler(run.params, plan, self.labels, **run.experiment.sampling_options(), seed=self.seed)

    def sampled_from_file(self, path: str) -> np.ndarray:
        """The same with `sampler.solver=PATH`."""
        settings = replace(self.run.experiment.sampler, solver=path)
        return self.sampled(build_plan(settings, self.run.experiment.task))

    def sampler_settings(self) -> dict[str, Any]:
        """What of the config's sampler, beside the plan, the end points hang on."""
        sampler = self.run.experiment.sampler
        return {'guidance': sampler.guidance} | sampler.chosen

    def about_the_reference(self) -> str:
        """What the end points are, and how near to the flow's."""
        experiment, held_out = self.run.experiment, self.problem.held_out
        settings = replace(experiment.sampler, solver=REFERENCE_SOLVER, num_steps=REFERENCE_STEPS // 2)
        gap = self.sampled(build_plan(settings, experiment.task))[-len(held_out.labels) :] - held_out.ends
        rms = np.sqrt(np.mean(np.sum(gap**2, tuple(range(1, gap.ndim)))))
        return (
            f'End points: {REFERENCE_SOLVER} on the grid {experiment.sampler.grid} in {REFERENCE_STEPS} steps '
            f'({self.reference.num_evaluations} evaluations); half the steps end at an RMS distance of {rms:.2g}.'
        )


def run_problem(options: Any) -> RunProblem:
    """A trained run on one device, in float32."""
    run = diffjax.load(options.workdir)
    experiment, task, objective = run.experiment, run.experiment.task, run.experiment.task.objective
    settings = experiment.sampling_options()
    negative = settings['negative_label'] if settings['negative_label'] >= 0 else task.num_classes
    num = options.num_train + options.num_held_out
    labels = np.random.default_rng(options.seed).permutation(balanced_labels(num, task.num_classes))

    def draw(params, plan, keys, labels):
        baseline = jax.numpy.full_like(labels, negative)
        shape, guidance, transforms = experiment.sample_shape, settings['guidance'], settings['transforms']
        return task.sample(params, (), plan, guidance, labels, keys, shape, baseline, transforms)

    reference = build_plan(replace(experiment.sampler, solver=REFERENCE_SOLVER, num_steps=REFERENCE_STEPS), task)
    problem = Problem(
        name=type(objective.schedule).__name__.lower(),
        schedule=objective.schedule,
        parameterization=objective.parameterization,
        params=jax.device_put(run.params, jax.devices()[0]),
        draw=draw,
        train=Starts((), (), ()),
        held_out=Starts((), (), ()),
        batch_size=options.batch_size,
        double=False,
    )
    made = RunProblem(run, problem, reference, labels, options.seed)
    keys = sample_keys(jax.random.key(options.seed), num)
    train, held_out = split(keys, labels, made.sampled(reference), options.num_train)
    return made._replace(problem=problem._replace(train=train, held_out=held_out))


def sample_figures(run: Run, plans: dict[str, Plan], seed: int) -> dict[str, dict[str, float]]:
    """Frechet distance to the test images and class accuracy of `evaluation.num_samples` samples by each plan.

    Their noise is of another seed than the starts'. {} where the run has no test images.
    """
    experiment = run.experiment
    if not has_test_images(experiment) or not experiment.evaluation.num_samples:
        return {}
    labels = balanced_labels(experiment.evaluation.num_samples, experiment.task.num_classes)
    measures, figures = Measures(experiment), {}
    for name, plan in plans.items():
        x = run.sampler(run.params, plan, labels, **experiment.sampling_options(), seed=seed)
        found = measures(to_output(experiment, x), labels)
        figures[name] = found | {'frechet_ratio': found['frechet_distance'] / measures.of_real()}
    return figures
