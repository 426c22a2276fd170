"""Diffusion in latents against diffusion in pixels: one transformer, one training time, the autoencoder's counted.

    python experiments/latent_vs_pixel.py --config=configs/ldm_shapes.py --minutes=15 --out=runs/latent_vs_pixel

The config's network is trained in the latents of its first stage, and in pixels with patches for as many tokens and
with smaller ones, each for so many minutes: a step is timed first, and the number of steps follows. What the first
stage took to train, and to encode the images, is subtracted from its row. A pixel model is also sampled with as many
operations as a latent sample costs, by fewer steps. The same command again goes on where it was stopped.

Pixel models predict x0: noise in a large patch is more numbers than a narrow transformer carries (JiT, Li & He 2025,
arXiv:2511.13720). --targets=x0,velocity shows both.

Into --out go report.md, rows.csv, costs.csv, samples.png (a line of pictures for each row) and a folder for each row.
"""

import argparse
import copy
import itertools
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ablate import load_config
from absl import logging as absl_logging
from command_line import Stop
from timed_training import (
    call_flops,
    check_same_study,
    num_steps_for,
    of_length,
    shown,
    train_whole,
    trained_seconds,
    write_csv,
)

from diffjax.build import ConfigError, Experiment, build
from diffjax.encoding import encoder_of
from diffjax.evaluation.pictures import sample_grid
from diffjax.evaluation.report import write_report
from diffjax.main import train_experiment
from diffjax.nets import DiT
from diffjax.restoring import restore_params
from diffjax.results import measure
from diffjax.stages import find, make_ready, open_latents, settings_of
from diffjax.training.flops import count_flops

SHOWN = 12
TARGETS = {  # of pixel models, each with a loss like that of the velocity, bounded at low noise as JiT's is
    'velocity': {'target': 'velocity', 'weight': 'target', 'times': 'uniform'},
    'x0': {'target': 'x0', 'weight': 'v', 'times': 'uniform:low=0.05'},
}
COSTS = ((1, 3), (2, 4), (4, 8), (8, 16))  # factor by which sides shrink, channels: the numbers of published ones


class Row(NamedTuple):
    name: str
    config: dict[str, Any]
    folder: Path
    spent: float  # seconds that the first stage has taken


def rows_of(config: dict[str, Any], out: Path, spent: float, targets: list[str]) -> list[Row]:
    """The latent model and its pixel counterparts: patches for as many tokens, and half as large, of each target."""
    latents = open_latents(config, out)
    patch = config['network']['patch_size'] * latents.network.factor
    rows = [Row('latents', config, out / 'latents', spent)]
    tokens = {'pixels, as many tokens': patch, 'pixels, four times the tokens': patch // 2}
    for (name, size), target in itertools.product(tokens.items(), targets):
        pixels = {key: copy.deepcopy(value) for key, value in config.items() if key != 'first_stage'}
        pixels['network']['patch_size'] = size
        if target != config['target']:
            pixels |= TARGETS[target]
        rows.append(Row(f'{name}, {target}', pixels, out / f'pixels_patch{size}_{target}', 0.0))
    return rows


def experiment_of(config: dict[str, Any], out: Path) -> Experiment:
    return build(config, latents=open_latents(config, out) if 'first_stage' in config else None)


def run_row(row: Row, seconds: float, out: Path) -> Experiment:
    """Trains for what is left of the seconds, measures, and returns the experiment."""
    if row.spent >= seconds:
        raise Stop(f'the first stage took {row.spent:.0f} s of {seconds:.0f}: give more --minutes')
    num_steps = num_steps_for(seconds - row.spent, row.folder, experiment_of(row.config, out))
    config = of_length(row.config, num_steps)
    experiment = experiment_of(config, out)
    print(f'{row.name}: {num_steps} steps', flush=True)
    train_whole(config, experiment, row.folder)
    return experiment


def decode_flops(experiment: Experiment) -> int:
    latents = experiment.latents
    if latents is None:
        return 0
    z = jnp.zeros((1, *experiment.sample_shape))
    return count_flops(
        jax.make_jaxpr(lambda p: latents.network.apply({'params': p}, z, method='decode'))(latents.params)
    )


def figures_of(row: Row, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """A line of the table."""
    found = json.loads((folder / 'figures.json').read_text())
    call, patch = call_flops(experiment), row.config['network']['patch_size']
    height, width, channels = experiment.sample_shape
    return {
        'model': row.name,
        'values': height * width * channels,
        'tokens': height * width // patch**2,
        'steps': found['step'],
        'trained_s': row.spent + trained_seconds(row.folder),
        'of_that_first_stage_s': row.spent,
        'evaluations': found['evaluations_per_sample'],
        'gflops_per_call': call / 1e9,
        'gflops_per_sample': (found['evaluations_per_sample'] * call + decode_flops(experiment)) / 1e9,
        'seconds_per_sample': found['seconds_per_sample'],
        'frechet_distance': found['frechet_distance'],
        'frechet_ratio': found.get('frechet_ratio'),
        'precision': found.get('precision'),
        'recall': found.get('recall'),
        'features': found['features'],
    }


def at_equal_operations(row: Row, experiment: Experiment, gflops: float) -> tuple[Row, Experiment, Path] | None:
    """The same model, sampled in so few steps that a sample costs no more than `gflops`; None where it does anyway."""
    sampler, call = experiment.sampler, call_flops(experiment) / 1e9
    per_step = experiment.plan().num_evaluations / sampler.num_steps
    num_steps = max(int(gflops / call / per_step), 1)
    if num_steps >= sampler.num_steps:
        return None
    fewer = replace(experiment, sampler=replace(sampler, num_steps=num_steps))
    folder = row.folder / f'{num_steps}steps'
    if not (folder / 'figures.json').exists():
        folder.mkdir(exist_ok=True)
        params, step = restore_params(experiment, row.folder)
        measure(fewer, params, folder, step, seed=0, progress=sys.stderr.isatty())
    return row._replace(name=f'{row.name}; operations per sample as in latents'), fewer, folder


def cost_rows(config: dict[str, Any], side: int, batch_size: int = 8) -> list[dict[str, Any]]:
    """One DiT of patch size 2 on smaller and smaller latents: what a call of the denoiser costs."""
    options = {key: value for key, value in config['network'].items() if key != 'name'} | {'patch_size': 2}
    rows = []
    for factor, channels in COSTS:
        if side % (2 * factor):
            break
        network = DiT(**options, num_classes=0, out_channels=channels)
        shape = (batch_size, side // factor, side // factor, channels)
        x, t = jnp.zeros(shape), jnp.zeros(batch_size)
        params = jax.jit(network.init)(jax.random.key(0), x, t, None)
        flops = count_flops(jax.make_jaxpr(lambda p: network.apply(p, x, t, None))(params)) / batch_size  # noqa: B023
        call = jax.jit(lambda p: network.apply(p, x, t, None)).lower(params).compile()  # noqa: B023
        taken = []
        for _ in range(6):
            began = time.perf_counter()
            jax.block_until_ready(call(params))
            taken.append(time.perf_counter() - began)
        rows.append(
            {
                'factor': factor,
                'values': math.prod(shape[1:]),
                'tokens': (shape[1] // 2) * (shape[2] // 2),
                'gflops_per_call': flops / 1e9,
                'seconds_per_call': min(taken[1:]) / batch_size,
            }
        )
    for row in rows:
        row |= {f'{key}_ratio': rows[0][f'{key}_per_call'] / row[f'{key}_per_call'] for key in ('gflops', 'seconds')}
    return rows


def encode_seconds(config: dict[str, Any], out: Path) -> float:
    """What encoding all training images takes, from a few batches."""
    found = find(settings_of(config), out)
    images = build(config, latents=open_latents(config, out)).images
    size, encode = found.encoding.batch_size, encoder_of(found.network, found.params)
    batch, taken = images.read(range(size))['image'], []
    for _ in range(5):
        began = time.perf_counter()
        encode(batch)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:])) * len(images) / size


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    out, config = Path(options.out), load_config(options.config)
    if 'first_stage' not in config:
        raise Stop(f'{options.config} has no section first_stage: give one that learns in latents')
    targets = options.targets.split(',')
    if unknown := [target for target in targets if target not in TARGETS]:
        raise Stop(f'--targets are some of {", ".join(TARGETS)} with commas between them, got {unknown[0]!r}')
    if options.data_dir:
        config['dataset']['data_dir'] = config['first_stage']['config']['dataset']['data_dir'] = options.data_dir
    check_same_study(out, {'config': config, 'minutes': options.minutes})
    if not make_ready(config, out, train_experiment, print, progress=sys.stderr.isatty()):
        raise Stop('stopped; the same command goes on from there')
    spent = trained_seconds(find(settings_of(config), out).folder) + encode_seconds(config, out)
    table, pictures = [], []
    for row in rows_of(config, out, spent, targets):
        experiment = run_row(row, 60 * options.minutes, out)
        parts = [(row, experiment, row.folder)]
        if table and (fewer := at_equal_operations(row, experiment, table[0]['gflops_per_sample'])):
            parts.append(fewer)
        for part in parts:
            table.append(figures_of(*part))
            images = np.load(part[2] / 'samples.npz', allow_pickle=False)['arr_0']
            pictures.append(images[:SHOWN])
            print(f'  {part[0].name}: Frechet distance {table[-1]["frechet_distance"]:.4g}', flush=True)
    costs = cost_rows(config, build(config, latents=open_latents(config, out)).image_shape[0])
    write_csv(out / 'rows.csv', table), write_csv(out / 'costs.csv', costs)
    sample_grid(np.concatenate(pictures), columns=SHOWN, path=out / 'samples.png')
    best, pixels = table[0], min(table[1:], key=lambda line: line['frechet_distance'])
    write_report(
        out / 'report.md',
        {'frechet_distance_latents': best['frechet_distance'], 'frechet_distance_pixels': pixels['frechet_distance']},
        title='Latents against pixels',
        summary=(
            f'A transformer of {config["network"]["depth"]} layers of {config["network"]["hidden_size"]}, trained for '
            f"{options.minutes:g} minutes in latents (the autoencoder's {spent:.0f} s counted) and in pixels. "
            f'{config["evaluation"]["num_samples"]:,} samples against the test split; none selected.'
        ),
        pictures={'A line of samples for each row of the table, in its order': out / 'samples.png'},
        tables={'Models': [shown(row) for row in table], 'A call of the denoiser': [shown(row) for row in costs]},
        config={'config': options.config, 'minutes': options.minutes},
    )
    print('\n'.join(str(shown(row)) for row in (*table, *costs)) + f'\nwritten: {out}/report.md')
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/ldm_shapes.py', help='default: %(default)s')
    parser.add_argument('--minutes', type=float, default=15.0, help='of training for each row; default: %(default)s')
    parser.add_argument('--targets', default='x0', help='of the pixel models; default: %(default)s')
    parser.add_argument('--data_dir', default='', help='where the dataset lies; default: as the config says')
    parser.add_argument('--out', default='runs/latent_vs_pixel', help='default: %(default)s')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        return compare(parse(argv))
    except (Stop, ConfigError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
