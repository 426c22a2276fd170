"""What the sampling loop costs over the network calls alone.

    python experiments/benchmark_sampling.py

A plan of 50 evaluations is followed by the one compiled loop, with a table padded as a trained run's sampler pads it;
beside it the same network is called 50 times in a compiled loop that does nothing else. Both run in turns, and what is
printed is the ratio of their times, whose median over the rounds a noisy machine moves little.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffjax import nets
from diffjax.build import ConfigError
from diffjax.components import component
from diffjax.core import grids, solvers
from diffjax.core.denoisers import network_denoiser
from diffjax.core.parameterizations import Velocity
from diffjax.core.sampling import pad, sample, sample_keys, starting_noise
from diffjax.core.schedules import Flow
from diffjax.evaluation import markdown_table
from diffjax.run import MIN_SIZES

SIZES = {'S/2': (384, 12, 6), 'B/2': (768, 12, 12)}  # of DiT: width, depth, heads (Peebles & Xie 2023, Table 1)
SIDE, CHANNELS, NUM_CLASSES = 32, 4, 1000  # ImageNet 256's latents


def programs(options):
    """(the loop: (params, plan, keys) -> x, the network alone: (params, t [M], keys) -> x, params), compiled."""
    width, depth, heads = SIZES[options.model]
    network = nets.DiT(
        patch_size=2, hidden_size=width, depth=depth, num_heads=heads, out_channels=CHANNELS, num_classes=NUM_CLASSES
    )
    model, shape = nets.as_model(network), (SIDE, SIDE, CHANNELS)
    labels = jnp.arange(options.batch_size) % NUM_CLASSES
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1), labels[:1])

    @jax.jit
    def loop(params, plan, keys):
        def predict(x, t, cond):
            return model.apply(params, x, t, cond)

        denoiser = network_denoiser(predict, Flow(), Velocity())
        return sample(denoiser, plan, starting_noise(plan, keys, shape), labels, keys)[0]

    @jax.jit
    def alone(params, times, keys):
        def call(x, t):
            return model.apply(params, x, jnp.full(len(x), 1000 * t), labels), ()

        x = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return jax.lax.scan(call, x, times)[0]

    return loop, alone, params


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=SIZES, default='S/2', help='of DiT; default: %(default)s')
    parser.add_argument('--batch_size', type=int, default=4)
    parser.add_argument('--num_steps', type=int, default=50)
    parser.add_argument('--solver', default='unipc', help='of one evaluation a step; default: %(default)s')
    parser.add_argument('--rounds', type=int, default=5)
    options = parser.parse_args(argv)
    schedule = Flow()
    try:
        make = component(solvers, options.solver, '--solver', 'schedule', 'grid')
        plan = make(schedule, grids.uniform(schedule, options.num_steps))
    except ConfigError as error:
        parser.error(str(error))
    rows = max(MIN_SIZES[0], len(plan.t))
    padded = jax.tree.map(
        lambda a: jnp.asarray(a, None if a.dtype == bool else jnp.float32), pad(plan, rows, *MIN_SIZES[1:])
    )
    loop, alone, params = programs(options)
    keys, times = sample_keys(jax.random.key(0), options.batch_size), jnp.asarray(plan.t, jnp.float32)
    contestants = {'loop': lambda: loop(params, padded, keys), 'network alone': lambda: alone(params, times, keys)}
    seconds = {name: [] for name in contestants}
    for run in contestants.values():
        run().block_until_ready()  # compiles
    for _ in tqdm(range(options.rounds), unit='round', dynamic_ncols=True, disable=None):
        for name, run in contestants.items():
            began = time.perf_counter()
            run().block_until_ready()
            seconds[name].append(time.perf_counter() - began)
    lines = [
        {'program': name, 'median': f'{np.median(s):.3f} s', 'fastest': f'{min(s):.3f} s'}
        for name, s in seconds.items()
    ]
    ratio = float(np.median(np.array(seconds['loop']) / np.array(seconds['network alone'])))
    print(
        f'DiT-{options.model}, batch {options.batch_size}, {plan.num_evaluations} evaluations of {options.solver} on '
        f'{jax.devices()[0].device_kind}\n\n{markdown_table(lines)}\n\nloop / network alone: {ratio:.3f}'
    )
    return ratio


if __name__ == '__main__':
    main()
