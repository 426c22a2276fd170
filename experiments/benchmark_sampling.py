"""What drawing samples costs over the network alone, in the same run.

A plan is followed by the sampler of a trained run, with a table padded as that pads it; beside it the same network is
called as often, on as many examples, in a compiled loop that does nothing else. Both run in turns, and the share of
the time outside the network is 1 - alone / sampler, whose median over the rounds a noisy machine moves little.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_models import batch_shapes
from stopwatch import Seconds, in_turns

from diffjax.build import Experiment
from diffjax.run import make_sampler
from diffjax.training.flops import count_flops
from diffjax.training.sharding import batch_sharding, replicated


class Sampling(NamedTuple):
    batch: int  # samples at once, as many on each device
    seconds: Seconds  # of a batch of samples
    outside: float  # the share of them that is spent outside the network
    evaluations: int
    branches: int
    flops: int  # of a batch
    compile_seconds: float


def parameters(experiment: Experiment) -> Any:
    """Drawn ones, on every device."""
    example = jax.eval_shape(experiment.trainer().prepare, batch_shapes(experiment), jax.random.key(0))

    def draw():
        batch = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), example)
        return experiment.task.init(jax.random.key(0), batch)[0]

    return jax.jit(draw, out_shardings=replicated(experiment.mesh))()


def network_alone(experiment: Experiment, size: int):
    """(the network called for each of times [M] on examples of the sampler's number, its arguments x and labels)."""
    model, shape, classes = experiment.task.model, experiment.sample_shape, experiment.task.num_classes

    @jax.jit
    def alone(params, times, x, labels):
        def call(x, t):
            out = model.apply(params, x, jnp.full(len(x), 1000 * t), labels if classes else None)
            return out[..., : x.shape[-1]].astype(x.dtype), ()

        return jax.lax.scan(call, x, times)[0]

    x = np.random.default_rng(0).standard_normal((size, *shape), np.float32)
    labels = (np.arange(size) % max(classes, 1)).astype(np.int32)
    return alone, jax.device_put((x, labels), batch_sharding(experiment.mesh))


def measure_sampling(experiment: Experiment, flops_of: Experiment, rounds: int, seconds: float) -> Sampling:
    """Of one batch. flops_of: the same model, of whose network operations can be counted."""
    sampler, plan, options = make_sampler(experiment), experiment.plan(), experiment.sampling_options()
    params, size = parameters(experiment), sampler.batch_size
    labels = (np.arange(size) % max(experiment.task.num_classes, 1)).astype(np.int32)
    branches = 1 if options['guidance'] is None else 2
    alone, inputs = network_alone(experiment, size * branches)
    times = jnp.asarray(plan.t, jnp.float32)
    began = time.perf_counter()
    sampler(params, plan, labels, **options)
    compiled = time.perf_counter() - began
    contestants = {
        'sampler': lambda: sampler(params, plan, labels, **options),
        'alone': lambda: alone(params, times, *inputs).block_until_ready(),
    }
    taken = {name: np.array(each) for name, each in in_turns(contestants, rounds, seconds).items()}
    plain, shapes = network_alone(flops_of, size * branches)[0], (params, times, *inputs)
    return Sampling(
        batch=size,
        seconds=Seconds(tuple(taken['sampler'])),
        outside=float(np.median(1 - taken['alone'] / taken['sampler'])),
        evaluations=plan.num_evaluations,
        branches=branches,
        flops=count_flops(plain.trace(*shapes).jaxpr),
        compile_seconds=compiled - float(np.median(taken['sampler'])),
    )
