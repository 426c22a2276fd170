"""Training steps and sampling of our configs: rate, use of the machine, memory, compilation, work of the host.

    python experiments/benchmark.py                                         on a CPU, four minutes: the digits' networks
    python experiments/benchmark.py --models=DiT-B/2,DiT-XL/2 --what=train,sample --compare=torch --out=speed.csv

What is trained is the step of `diffjax.main`, with its averages and metrics, on random bytes or latents that are copied
to the device for every step; what samples is the sampler of a trained run. MFU is the model's operations (2 m n k of
each product, nothing that remat repeats) each second, over what the fastest matrix product of the same run reaches.

    step        time of a step in a row of steps that are queued without waiting; the median over the rounds, with half
                of the quartiles' distance
    waited      the same when the host waits for each step
    host        until the host has started one step, the next batch's copy included, on an idle device
    outside     of sampling: the share of the time that is spent outside the network
    memory      the device's peak while it trains, where it tells; else what the compiler plans

Rows go to a CSV with --out, with date, commit and versions, and onto a roofline beside it.
"""

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any

import jax
from benchmark_models import LARGE, MODELS, SMALL, Work, batch_shapes, batches, config_of, count_work, open_model
from benchmark_sampling import measure_sampling
from command_line import Stop, values
from stopwatch import Peak, append_rows, conditions, measure_peak, time_steps

from diffjax.build import Experiment
from diffjax.evaluation import markdown_table
from diffjax.nets import count_parameters
from diffjax.training.estimates import no_cache
from diffjax.training.sharding import replicated

WHAT = 'train', 'sample'
CPU_SAMPLES = 32  # at once, where no number is given
SHOWN = (
    'model',
    'what',
    'by',
    'batch',
    'examples/s',
    'step, ms',
    'spread',
    'TFLOP/s',
    'MFU',
    'memory, GB',
    'compile, s',
)
SHOWN += 'waited, ms', 'host, ms', 'outside'
MEASURED = (*SHOWN, 'memory by', 'parameters, M', 'FLOPs', 'bytes', 'dtype', 'remat', 'attention')  # columns of the CSV


def network_options(options: argparse.Namespace) -> dict[str, Any]:
    return {'compute_dtype': options.dtype, 'remat': options.remat, 'attention': options.attention}


def row_of(
    experiment: Experiment, config: dict[str, Any], peak: Peak, flops: float, figures: dict[str, Any]
) -> dict[str, Any]:
    """All columns, those that are not measured empty."""
    rate, network = flops / figures['step, ms'] * 1e3 / experiment.mesh.size, config['network']
    told = {'dtype': network.get('compute_dtype', 'float32'), 'remat': network.get('remat', 'none')}
    told |= {'attention': network.get('attention', 'auto'), 'by': 'diffjax', 'FLOPs': flops}
    figures = told | {'TFLOP/s': rate / 1e12, 'MFU': rate / peak.flops} | figures
    return {name: figures.get(name, '') for name in MEASURED}


def train_row(name: str, options: argparse.Namespace, peak: Peak, work: Work) -> dict[str, Any]:
    config = config_of(name, **network_options(options))
    experiment = open_model(config, options.batch_size)
    trainer, raw, before = experiment.trainer(), batch_shapes(experiment), device_peak()
    make, shapes, shardings = trainer.init(raw)
    frozen, source = jax.device_put(trainer.frozen, replicated(experiment.mesh)), batches(experiment)
    began = time.perf_counter()
    with no_cache():
        step = trainer.step(shardings).lower(shapes, frozen, raw).compile()
    compiled = time.perf_counter() - began
    holder = [make()]

    def start():
        holder[0], metrics = step(holder[0], frozen, next(source))
        return metrics

    times, planned = time_steps(start, options.rounds, options.steps), step.memory_analysis()
    needed = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    memory, by = needed + planned.temp_size_in_bytes, 'compiler'
    if (after := device_peak()) > before:  # it knows no peak but that of all models so far
        memory, by = after, 'device'
    size = experiment.training.batch_size
    figures = {
        'model': name,
        'what': 'train',
        'batch': size,
        'examples/s': size / times.queued.median,
        'step, ms': 1e3 * times.queued.median,
        'spread': times.queued.spread,
        'waited, ms': 1e3 * times.waited.median,
        'host, ms': 1e3 * times.host.median,
        'memory, GB': memory / 1e9,
        'memory by': by,
        'compile, s': compiled,
        'bytes': work.traffic,
        'parameters, M': count_parameters(shapes.params) / 1e6,
    }
    return row_of(experiment, config, peak, work.flops, figures)


def device_peak() -> int:
    """Bytes in use at the worst time so far on the first device; 0 where the backend does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


def sample_row(name: str, options: argparse.Namespace, peak: Peak) -> dict[str, Any]:
    config = config_of(name, **network_options(options))
    sampler = {
        'solver': options.solver,
        'grid': 'uniform',
        'num_steps': options.num_steps,
        'guidance': options.guidance,
    }
    most = CPU_SAMPLES if jax.default_backend() == 'cpu' else config['sampler']['batch_size']
    sampler |= {'batch_size': options.batch_size or min(most, config['sampler']['batch_size'])}
    experiment = open_model(config, sampler=sampler)
    plain = open_model(config_of(name, compute_dtype=options.dtype, attention='xla'), sampler=sampler)
    with no_cache():
        found = measure_sampling(experiment, plain, options.rounds, options.seconds)
    figures = {
        'model': name,
        'what': f'sample {found.evaluations} x {found.branches}',
        'batch': found.batch,
        'examples/s': found.batch / found.seconds.median,
        'step, ms': 1e3 * found.seconds.median,
        'spread': found.seconds.spread,
        'outside': found.outside,
        'compile, s': found.compile_seconds,
    }
    return row_of(experiment, config, peak, found.flops, figures)


def torch_row(name: str, options: argparse.Namespace, peak: Peak, ours: dict[str, Any]) -> dict[str, Any]:
    """The same model and batch in PyTorch; its work counts as ours."""
    from benchmark_torch import torch_times

    network = config_of(name, **network_options(options))['network']
    theirs = torch_times(network, ours['batch'], options.rounds, options.steps)
    rate = ours['FLOPs'] / theirs.queued.median
    same = 'model', 'what', 'batch', 'FLOPs', 'bytes', 'dtype', 'parameters, M'
    figures = {key: ours[key] for key in same} | {
        'by': theirs.by,
        'examples/s': ours['batch'] / theirs.queued.median,
        'step, ms': 1e3 * theirs.queued.median,
        'spread': theirs.queued.spread,
        'TFLOP/s': rate / 1e12,
        'MFU': rate / peak.flops,
        'compile, s': theirs.compile_seconds,
    }
    figures |= {'memory, GB': theirs.memory / 1e9, 'memory by': 'device'} if theirs.memory else {}
    return {key: figures.get(key, '') for key in MEASURED}


def measure(name: str, options: argparse.Namespace, peak: Peak) -> list[dict[str, Any]]:
    """The rows of one model; what it held is given back before the next."""
    rows = []
    if 'train' in options.what:
        work = count_work(name, options.batch_size, **network_options(options))
        rows.append(train_row(name, options, peak, work))
        if options.compare and name.startswith('DiT-'):
            gc.collect()
            rows.append(torch_row(name, options, peak, rows[0]))
    if 'sample' in options.what:
        rows.append(sample_row(name, options, peak))
    gc.collect()
    jax.clear_caches()
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', help=f'of {", ".join(MODELS)}; default: {LARGE}; on CPUs {SMALL}')
    parser.add_argument('--what', type=values, default=list(WHAT), help='train, sample, or both; default: both')
    parser.add_argument(
        '--batch_size', type=int, default=0, help=f"default: the config's; samples on CPUs: {CPU_SAMPLES}"
    )
    parser.add_argument('--dtype', default='', help="of large products: float32, bfloat16; default: the config's")
    parser.add_argument('--remat', default='', help="none, dots or full; default: the config's")
    parser.add_argument('--attention', default='', help="auto, xla, cudnn or splash; default: the config's")
    parser.add_argument('--solver', default='unipc', help='of sampling, one evaluation a step; default: %(default)s')
    parser.add_argument('--num_steps', type=int, default=50, help='of sampling; default: %(default)s')
    parser.add_argument('--guidance', type=float, default=4.0, help='of sampling; 1: none; default: %(default)s')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=10, help='of training in each round; default: %(default)s')
    parser.add_argument('--seconds', type=float, default=2.0, help='of sampling in each round; default: %(default)s')
    parser.add_argument('--compare', choices=['torch'], help='torch.compile of the same DiT beside it, in this run')
    parser.add_argument('--out', type=Path, help='a CSV to which rows are appended; a roofline beside it, as PNG')
    options = parser.parse_args(argv)
    if unknown := [name for name in options.what if name not in WHAT]:
        parser.error(f'--what: unknown {", ".join(unknown)}; valid: {", ".join(WHAT)}')
    if min(options.rounds, options.steps, options.num_steps, options.batch_size + 1) < 1:
        parser.error('--rounds, --steps and --num_steps are at least 1, --batch_size at least 0')
    if options.compare:
        os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # the device's memory is shared
        try:
            import torch  # noqa: F401
        except ImportError:
            parser.error("--compare=torch: torch is not installed: pip install -e '.[parity]'")
    options.models = values(options.models or (SMALL if jax.default_backend() == 'cpu' else LARGE))
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f'--models: unknown {", ".join(unknown)}; valid: {", ".join(MODELS)}')
    options.fail = parser.error
    return options


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options, rows, when = parse(argv), [], conditions()
    dtypes = {}
    try:
        for name in options.models:
            dtype = config_of(name, **network_options(options))['network'].get('compute_dtype', 'float32')
            if dtype not in dtypes:
                dtypes[dtype] = measure_peak(dtype)
                print(f'{dtype}: {dtypes[dtype].flops / 1e12:.4g} TFLOP/s ({dtypes[dtype].of}), ', end='')
                print(f'{dtypes[dtype].bandwidth / 1e9:.4g} GB/s copied', flush=True)
            found = measure(name, options, dtypes[dtype])
            peak = {'peak, TFLOP/s': dtypes[dtype].flops / 1e12, 'peak of': dtypes[dtype].of}
            peak['copy, GB/s'] = dtypes[dtype].bandwidth / 1e9
            rows += [when | row | peak for row in found]
            if options.out:
                append_rows(options.out, rows[-len(found) :])  # what is measured is kept, whatever comes
    except (Stop, ValueError) as error:
        options.fail(str(error))
    print(f'{when["device"]} x {when["devices"]}, jax {when["jax"]}, commit {when["commit"]}, {when["date"]}\n')
    print(markdown_table([{name: row[name] for name in SHOWN} for row in rows]))
    if options.out:
        from benchmark_plots import draw_roofline

        print(f'\n{draw_roofline(options.out.with_suffix(".png"), rows)}')
    return rows


if __name__ == '__main__':
    main()
