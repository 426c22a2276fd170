"""How the cost of a training step grows with batch, depth, tokens and devices; and that of compiling it with depth.

    python experiments/benchmark_growth.py --out=growth.csv

A DiT on ImageNet's latents, of one device, but for the quantity that varies. Each line is fitted by a power,
seconds = a n^slope. The devices are fake ones of this CPU, which share its cores and one batch: what grows is the cost
of splitting. `scanned` and `unrolled` are the seconds that compiling takes by depth, and `size`, which no busy machine
moves, the instructions of the program that the compiler is given: a scanned trunk is one block whatever its depth.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from benchmark_models import batch_shapes, batches, config_of, open_model
from command_line import values
from stopwatch import append_rows, conditions, time_steps

from diffjax.evaluation import markdown_table
from diffjax.training.estimates import no_cache
from diffjax.training.hlo import parse as parse_program

COLUMNS = 'line', 'n', 'seconds', 'spread', 'size'
VARIED = 'batch', 'depth', 'tokens', 'devices', 'compile'
BASE = {'hidden_size': 96, 'depth': 4, 'num_heads': 4, 'patch_size': 4, 'scan_layers': True}
TOKENS = {16: 8, 64: 4, 256: 2}  # of 32 x 32: the patch


def small_dit(batch_size: int, dtype: str, **network: Any):
    """The experiment of a DiT, all of whose options are BASE's but those that are given."""
    return open_model(config_of('DiT-S/2', **BASE | {'compute_dtype': dtype} | network), batch_size)


def lower(experiment) -> jax.stages.Lowered:
    trainer, raw = experiment.trainer(), batch_shapes(experiment)
    _, shapes, shardings = trainer.init(raw)
    return trainer.step(shardings).lower(shapes, trainer.frozen, raw)


def program_size(lowered: jax.stages.Lowered) -> int:
    """Instructions of the program before the compiler has changed anything."""
    program = parse_program(lowered.compiler_ir('hlo').as_hlo_module().to_string())
    return sum(len(computation) for computation in program.computations.values())


def step_seconds(experiment, options: argparse.Namespace) -> tuple[float, float]:
    """(the median, its spread)."""
    trainer, source = experiment.trainer(), batches(experiment)
    make, _, shardings = trainer.init(batch_shapes(experiment))
    holder, step = [make()], trainer.step(shardings)

    def start():
        holder[0], metrics = step(holder[0], trainer.frozen, next(source))
        return metrics

    times = time_steps(start, options.rounds, options.steps).queued
    return times.median, times.spread


def compile_seconds(lowered: jax.stages.Lowered) -> float:
    with no_cache():
        began = time.perf_counter()
        lowered.compile()
    return time.perf_counter() - began


def measure(varied: str, n: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one point."""
    size, dtype = options.batch_size, options.dtype
    if varied == 'devices':
        return [of_fake_devices(n, options)]
    if varied == 'compile':
        rows = []
        for line, scanned in (('scanned', True), ('unrolled', False)):
            lowered = lower(small_dit(size, dtype, depth=n, scan_layers=scanned))
            rows.append({'line': line, 'n': n, 'seconds': compile_seconds(lowered), 'size': program_size(lowered)})
        return rows
    network = {'depth': {'depth': n}, 'tokens': {'patch_size': TOKENS.get(n)}, 'batch': {}}[varied]
    experiment = small_dit(n if varied == 'batch' else size, dtype, **network)
    seconds, spread = step_seconds(experiment, options)
    return [{'line': varied, 'n': n, 'seconds': seconds, 'spread': spread}]


def of_fake_devices(n: int, options: argparse.Namespace) -> dict[str, Any]:
    """The point in a process of its own: the number of devices is set before JAX starts."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={n}'
    words = [sys.executable, __file__, '--varied=batch', f'--batch={options.batch_size}', '--json']
    words += [f'--{name}={getattr(options, name)}' for name in ('dtype', 'rounds', 'steps')]
    environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    out = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    (row,) = json.loads(out.splitlines()[-1])
    return row | {'line': 'devices', 'n': n}


def fit(points: dict[float, float]) -> tuple[float, float]:
    """(a, slope) of y = a n^slope, by least squares of the logarithms. points: {n: y}, two at least."""
    slope, intercept = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)
    return float(np.exp(intercept)), float(slope)


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each line of at least two points."""
    found = []
    for line in dict.fromkeys(row['line'] for row in rows):
        here = [row for row in rows if row['line'] == line]
        if len({row['n'] for row in here}) < 2:
            continue
        found.append({'line': line, 'from': here[0]['n'], 'to': here[-1]['n']})
        found[-1] |= {'slope of seconds': fit({row['n']: row['seconds'] for row in here})[1], 'slope of size': ''}
        if 'size' in here[0]:
            found[-1]['slope of size'] = fit({row['n']: row['size'] for row in here})[1]
    return found


def whole(text: str) -> list[int]:
    return [int(word) for word in values(text)]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--varied', type=values, default=list(VARIED), help=f'of {", ".join(VARIED)}; default: all')
    parser.add_argument('--batch', type=whole, default=[8, 16, 32, 64], help='sizes of the batch')
    parser.add_argument('--depth', type=whole, default=[2, 4, 8, 16])
    parser.add_argument('--tokens', type=whole, default=[16, 64, 256], help=f'of {", ".join(map(str, TOKENS))}')
    parser.add_argument('--devices', type=whole, default=[1, 2, 4, 8], help='fake ones')
    parser.add_argument('--compile', type=whole, default=[2, 4, 8, 16], help='depths that are compiled')
    parser.add_argument('--batch_size', type=int, default=16, help='where it does not vary; default: %(default)s')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=5, help='in each round; default: %(default)s')
    parser.add_argument('--json', action='store_true', help='print the rows as JSON and nothing else')
    parser.add_argument('--out', type=Path, help='a CSV, written as rows are measured; a picture beside it, as PNG')
    options, rows = parser.parse_args(argv), []
    if unknown := [name for name in options.varied if name not in VARIED]:
        parser.error(f'--varied: unknown {", ".join(unknown)}; valid: {", ".join(VARIED)}')
    if wrong := [n for n in options.tokens if n not in TOKENS]:
        parser.error(f'--tokens: {wrong[0]} does not cut 32 x 32 latents into patches; valid: {list(TOKENS)}')
    when = conditions()
    for varied in options.varied:
        for n in getattr(options, varied):
            try:
                found = measure(varied, n, options)
            except ValueError as error:
                parser.error(f'--{varied}={n}: {error}')
            rows += found
            if options.out:  # at once: what has been measured outlives a point that fails
                append_rows(options.out, [when | {name: row.get(name, '') for name in COLUMNS} for row in found])
    if options.json:
        print(json.dumps(rows))
        return rows
    print(f'{when["device"]}, jax {when["jax"]}, commit {when["commit"]}, {when["date"]}\n')
    print(f'{markdown_table(rows)}\n\n{markdown_table(slopes(rows))}')
    if options.out:
        from benchmark_plots import draw_growth

        print(f'\n{draw_growth(options.out.with_suffix(".png"), rows, slopes(rows))}')
    return rows


if __name__ == '__main__':
    main()
