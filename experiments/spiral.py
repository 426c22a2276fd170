"""A spiral diffused to a Gaussian and back: diffjax as a library, in seconds.

    python experiments/spiral.py --out=runs/spiral

An MLP learns to denoise points on a 2-D spiral. The figure shows, from left to right along time,

    forward row     data points with noise added, x_t = alpha(t) x0 + sigma(t) eps
    reverse row     samples on their way from noise to data; a point keeps the colour of where on the spiral it ends
    field row       the probability-flow velocity dx/dt, followed backwards, that carries them

and the figure printed at the end is the sliced 2-Wasserstein distance of the samples to held-out data, beside that of
another draw of data (as near as samples can get) and that of noise. Into --out go spiral.png and spiral.csv.
"""

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging as absl_logging
from tqdm import tqdm

from diffjax import nets
from diffjax.core import grids, solvers, weights
from diffjax.core.denoisers import network_denoiser
from diffjax.core.losses import Loss
from diffjax.core.parameterizations import Velocity
from diffjax.core.sampling import sample, sample_keys, starting_noise
from diffjax.core.schedules import Flow
from diffjax.core.times import Uniform
from diffjax.evaluation import markdown_table

TURNS, RADIUS, THICKNESS = 2.25, 2.2, 0.02
FIRST = 0.17  # where on the curve the points begin, 1 being its end
BATCH_SIZE, CHUNK = 256, 100  # CHUNK: training steps in one call of the compiled function
NUM_POINTS, NUM_COLUMNS, LIMIT = 3000, 6, 2.9


def spiral(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [num, 2] spread evenly along the curve, and where on it they lie, [num] in [FIRST, 1]."""
    place = np.sqrt(rng.uniform(FIRST**2, 1, num))  # arc length grows as the square of the angle
    angle = 2 * np.pi * TURNS * place
    points = RADIUS * place[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return (points + THICKNESS * rng.standard_normal((num, 2))).astype(np.float32), place


def train(data: np.ndarray, num_steps: int, seed: int):
    """(denoiser of the averaged parameters, network's velocity (x [B, 2], t) -> [B, 2], losses [num_steps])."""
    model = nets.as_model(nets.MLP(hidden_size=128, depth=3, out_channels=2))
    loss = Loss(schedule=Flow(), parameterization=Velocity(), times=Uniform(), weight=weights.target)
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, num_steps))
    key = jax.random.key(seed)
    params = model.init(key, jnp.zeros((1, 2)), jnp.zeros(1), None)

    def step(carry, number):
        params, average, state = carry
        pick, noise = jax.random.split(jax.random.fold_in(key, number))
        x0 = jnp.asarray(data)[jax.random.randint(pick, (BATCH_SIZE,), 0, len(data))]

        def objective(params):
            return loss(lambda x, t: model.apply(params, x, t, None), x0, sample_keys(noise, BATCH_SIZE))[0].mean()

        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.01)
        return (params, average, state), value

    run = jax.jit(partial(jax.lax.scan, step), donate_argnums=0)
    carry, losses = (params, jax.tree.map(jnp.copy, params), optimizer.init(params)), []
    for start in tqdm(range(0, num_steps, CHUNK), unit_scale=CHUNK, unit='step', dynamic_ncols=True, disable=None):
        carry, values = run(carry, jnp.arange(start, start + CHUNK))
        losses.append(np.asarray(values))
    predict = partial(model.apply, carry[1])
    return network_denoiser(predict, Flow(), Velocity()), predict, np.concatenate(losses)


def generate(denoiser, num: int, num_steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(times [num_steps + 1], the samples' states at those times [num_steps + 1, num, 2])."""
    grid = grids.uniform(Flow(), num_steps)
    plan = solvers.dpmpp_2m(Flow(), grid)
    keys = sample_keys(jax.random.key(seed + 1), num)
    start = starting_noise(plan, keys, (2,))
    _, states = jax.jit(partial(sample, denoiser, plan, save=lambda x, t: x))(start, None, keys)
    return grid, np.concatenate([start[None], states])


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, num_directions: int = 64) -> float:
    """Root mean square difference of the quantiles of two equally large sets [N, 2], over directions."""
    angle = np.pi * np.arange(num_directions) / num_directions
    directions = np.stack([np.cos(angle), np.sin(angle)])
    return float(np.sqrt(np.mean((np.sort(a @ directions, 0) - np.sort(b @ directions, 0)) ** 2)))


def draw_figure(path: Path, data, place, times, states, velocity) -> None:
    """The three rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wanted = np.linspace(1, 0, NUM_COLUMNS)
    figure = Figure(figsize=(2.1 * NUM_COLUMNS + 0.3, 6.9), layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, NUM_COLUMNS)
    eps = np.random.default_rng(1).standard_normal(data.shape)
    nearest = np.argmin(((states[-1][:, None] - data[None]) ** 2).sum(-1), 1)
    look = {'s': 3.5, 'cmap': 'turbo', 'vmin': FIRST, 'vmax': 1, 'linewidths': 0, 'alpha': 0.75}
    for column, t in enumerate(wanted):
        back = wanted[::-1][column]  # the forward row runs from data to noise
        axes[0, column].scatter(*(Flow().alpha(back) * data + Flow().sigma(back) * eps).T, c=place, **look)
        axes[0, column].set_title(f't = {back:.1f}', fontsize=10)
        state = states[np.argmin(np.abs(times - t))]
        axes[1, column].scatter(*state.T, c=place[nearest], **look)
        axes[1, column].set_title(f't = {t:.1f}', fontsize=10)
        _draw_field(axes[2, column], t, state, velocity)
    for ax in axes.flat:
        ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect='equal')
        for spine in ax.spines.values():
            spine.set_color('0.85')
    for ax, text in zip(
        axes[:, 0], ('forward: data to noise', 'reverse: noise to data', 'the field that carries them')
    ):
        ax.set_ylabel(text, fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_field(ax, t: float, state: np.ndarray, velocity) -> None:
    """Streamlines of -dx/dt, the way samples go, coloured by speed over the samples that are there."""
    line = np.linspace(-LIMIT, LIMIT, 41)
    points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2).astype(np.float32)
    u, v = -np.asarray(velocity(points, t)).reshape(41, 41, 2).transpose(2, 0, 1)
    ax.scatter(*state.T, s=2, color='0.75', linewidths=0)
    speed = np.hypot(u, v)
    style = {'density': 0.9, 'linewidth': 0.7, 'arrowsize': 0.6, 'cmap': 'viridis_r'}
    ax.streamplot(line, line, u, v, color=np.minimum(speed, np.quantile(speed, 0.95)), **style)
    ax.set_title(f't = {t:.1f}', fontsize=10)


def main(argv: list[str] | None = None) -> dict[str, float]:
    absl_logging.set_verbosity(absl_logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='runs/spiral', help='default: %(default)s')
    parser.add_argument('--steps', type=int, default=4000, help='training steps; default: %(default)s')
    parser.add_argument('--sampler_steps', type=int, default=50, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    options = parser.parse_args(argv)
    if min(options.steps, options.sampler_steps) < 1:
        parser.error('--steps and --sampler_steps must be at least 1')

    began, rng = time.monotonic(), np.random.default_rng(options.seed)
    data, _ = spiral(rng, 20_000)
    denoiser, predict, losses = train(data, -(-options.steps // CHUNK) * CHUNK, options.seed)
    times, states = generate(denoiser, NUM_POINTS, options.sampler_steps, options.seed)

    @jax.jit
    def velocity(x, t):
        return predict(x, jnp.full(len(x), 1000.0 * t), None)

    (held_out, place), (another, _) = spiral(rng, NUM_POINTS), spiral(rng, NUM_POINTS)
    sets = {'samples': states[-1], 'another draw of data': another, 'noise': states[0]}
    rows = [{'set': name, 'distance_to_held_out': sliced_wasserstein(x, held_out)} for name, x in sets.items()]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / 'spiral.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_figure(out / 'spiral.png', held_out, place, times, states, velocity)
    print(markdown_table(rows))
    print(f'\nloss {losses[-CHUNK:].mean():.3f}; {time.monotonic() - began:.0f} s; written: {out}/spiral.png')
    return {row['set']: row['distance_to_held_out'] for row in rows}


if __name__ == '__main__':
    main()
