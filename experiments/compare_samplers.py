"""Samplers compared: error against network evaluations, every solver through one compiled program.

    python experiments/compare_samplers.py --oracle=gmm2d
    python experiments/compare_samplers.py --workdir=runs/digits --num_samples=720 --grids=uniform,karras

Every solver on every grid at every number of steps is a plan; plans are padded to one size and are arguments, so that
each schedule of an oracle, or the trained run, is compiled once. The number of traces is counted and printed.

What `error` is depends on what is asked:

    --oracle    the denoiser is exact, so all of the error is the solver's.
                Deterministic solvers: root mean square distance |x - x*| between where the solver and where the exact
                probability flow carry the same starting noise (error_kind 'flow').
                Stochastic solvers have no such end point. Their error is of another kind ('distribution'), the sliced
                2-Wasserstein distance to the mixture,  sqrt( mean over directions and quantiles (q - q*)^2 ),      (1)
                which is measured for all of them in the column distribution_error and has a plot of its own. As many
                exact samples are not at distance 0 either: what they show is printed and drawn as a floor.
    --workdir   Frechet distance between the samples and the test images over raw pixels, network and solver together.
                Its floor is that of as many real train images.

Into --out go results.csv, errors.png, report.md, and with an oracle distributions.png.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

import diffjax
from diffjax.build import ConfigError, component
from diffjax.core import grids, oracles, schedules, solvers
from diffjax.core.parameterizations import EDM, Parameterization
from diffjax.core.sampling import check_plan, pad, sample, sample_keys, starting_noise
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import Plan
from diffjax.data import read_all
from diffjax.evaluation import fit_svc, frechet_distance_of_statistics, markdown_table, statistics
from diffjax.evaluation.features import pixels
from diffjax.run import balanced_labels, make_sampler, to_output

VARIANTS = {  # the settings of a solver that are methods of their own; a solver that is not listed has one
    'ddpm': ('variance=small', 'variance=large'),
    'ddim': ('eta=0', 'eta=0.5'),  # eta=1 is ddpm with the small variance
    'euler': ('coordinate=t',),  # in sigma/alpha it is ddim
    'heun': ('coordinate=sigma/alpha', 'coordinate=t', 'coordinate=angle'),
}
GRIDS, SCHEDULES = ['uniform', 'logsnr', 'karras'], ['flow', 'cosine', 'vp', 'edm']
BEST_COLUMNS = ('solver', 'grid', 'num_steps', 'num_evaluations', 'error')
COLUMNS = ('schedule', 'grid', 'solver', 'num_steps', 'num_evaluations', 'error', 'seconds_per_sample')
NUM_DIRECTIONS, REFERENCE_FACTOR = 32, 16  # of Eq. 1: directions; exact samples for each sample


class Stop(Exception):
    """Ends the comparison with one line for the user."""


class Case(NamedTuple):
    """One sampler: names for the table, and its plan."""

    grid: str
    solver: str
    num_steps: int
    times: np.ndarray
    plan: Plan

    @property
    def stochastic(self) -> bool:
        return bool(self.plan.to_x[:, self.plan.to_x.shape[1] - self.plan.num_noises :].any())


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


class SlicedWasserstein:
    """Eq. 1 between N samples and a mixture, whose quantiles come from 16 N exact samples. x: [N, D]."""

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
    """An exact denoiser on a schedule, in float64: rounding does not stand in the way of small errors."""
    schedule = component(schedules, name, '--schedules')()
    denoiser, shape, traces, ends = mixture.denoiser(schedule), mixture.means.shape[1:], [], {}

    @jax.jit
    def follow(plan, keys):
        traces.append(name)  # runs when traced, not when called
        start = starting_noise(plan, keys, shape)
        return start, sample(denoiser, plan, start, None, keys)[0]

    def draw(plan):
        with jax.enable_x64(True):
            keys = sample_keys(jax.random.key(options.seed), options.num_samples)
            return jax.tree.map(np.asarray, follow(plan, keys))

    def measure(case, drawn):
        start, x = drawn
        distribution = distance(x)
        if case.stochastic:
            return {'error': distribution, 'error_kind': 'distribution', 'distribution_error': distribution}
        first, last = float(case.times[0]), float(case.times[-1])
        if (first, last) not in ends:
            ends[first, last] = mixture.flow(schedule, start[: options.num_paths], first, last, tolerance=1e-10)
        gap = x[: options.num_paths] - ends[first, last]
        error = float(np.sqrt(np.mean(np.sum(gap**2, 1))))
        return {'error': error, 'error_kind': 'flow', 'distribution_error': distribution}

    return Target(
        name=name,
        schedule=schedule,
        parameterization=EDM(),  # like it, an exact denoiser knows x0 and eps at both ends
        draw=draw,
        measure=measure,
        count_traces=lambda: len(traces),
        floor=distance.floor,
    )


def oracle_targets(options) -> list[Target]:
    mixture = getattr(oracles, options.oracle)()
    distance = SlicedWasserstein(mixture, options.num_samples, options.seed)
    return [oracle_target(name, mixture, distance, options) for name in options.schedules]


def workdir_target(options) -> Target:
    """A trained run against its test images."""
    run = diffjax.load(options.workdir)
    experiment, num = run.experiment, options.num_samples
    if experiment.source.kind != 'image' or experiment.test is None:
        raise Stop(f'{options.workdir} has no test images: the Frechet distance over pixels needs them')
    chunks = -(-num // experiment.sampler.batch_size)
    experiment = replace(experiment, sampler=replace(experiment.sampler, batch_size=-(-num // chunks)))
    sampler, task, objective = make_sampler(experiment), experiment.task, experiment.task.objective
    sampling, labels = experiment.sampling_options(), balanced_labels(num, task.num_classes)
    train, reference = read_all(experiment.source), statistics(pixels(read_all(experiment.test)['image']))
    classify = fit_svc(train['image'], train['label']) if experiment.evaluation.classifier == 'svc' else None

    def draw(plan):
        return to_output(experiment, sampler(run.params, plan, labels, **sampling, seed=options.seed))

    def measure(case, images):
        error = frechet_distance_of_statistics(statistics(pixels(images)), reference)
        extra = {} if classify is None else {'class_accuracy': float(np.mean(classify(images) == labels))}
        return {'error': error, 'error_kind': 'frechet', **extra}

    return Target(
        name=type(objective.schedule).__name__.lower(),
        schedule=objective.schedule,
        parameterization=objective.parameterization,
        learned_variance=objective.bound_scale is not None,
        draw=draw,
        measure=measure,
        calls_per_row=1 if sampling['guidance'] is None else 2,
        count_traces=lambda: sampler.num_traces,
        floor=frechet_distance_of_statistics(statistics(pixels(train['image'][:num])), reference),
    )


def solver_specs(wanted: list[str], *, learned_variance: bool) -> list[str]:
    """'heun' becomes its variants, 'heun:coordinate=t' stays; [] is every solver there is."""
    specs = []
    for name in wanted or solvers.__all__:
        variants = VARIANTS.get(name, ()) + (('variance=learned',) if learned_variance and name == 'ddpm' else ())
        specs += [f'{name}:{variant}' for variant in variants] or [name]
    return specs


def plan_cases(target: Target, options) -> tuple[list[Case], dict[tuple[str, str, str], list[int]]]:
    """(what can be run, {(grid, solver, reason): numbers of steps} of what cannot)."""
    cases, skipped, learned = [], {}, target.learned_variance
    specs = solver_specs(options.solvers, learned_variance=learned)
    for grid_spec in options.grids:
        make_grid = component(grids, grid_spec, '--grids', 'schedule', 'num_steps')
        for spec in specs:
            make_plan = component(solvers, spec, '--solvers', 'schedule', 'grid')
            for num_steps in options.steps:
                try:
                    times = make_grid(target.schedule, num_steps)
                    plan = make_plan(target.schedule, times)
                    check_plan(plan, target.schedule, target.parameterization, learned_variance=learned)
                except ValueError as error:
                    skipped.setdefault((grid_spec, spec, ' '.join(str(error).split())), []).append(num_steps)
                else:
                    cases.append(Case(grid_spec, spec, num_steps, times, plan))
    return cases, skipped


def run_cases(target: Target, cases: list[Case], num_samples: int, bar: tqdm) -> Iterator[dict[str, Any]]:
    """One row of the CSV for each case; all plans in tables of one size."""
    sizes = [(len(case.plan.t), case.plan.num_remembered, case.plan.num_noises) for case in cases]
    size = tuple(max(each) for each in zip(*sizes))
    target.draw(pad(cases[0].plan, *size))  # compiles
    for case in cases:
        began = time.perf_counter()
        drawn = target.draw(pad(case.plan, *size))
        seconds = time.perf_counter() - began
        values = (target.name, case.grid, case.solver, case.num_steps, case.plan.num_evaluations * target.calls_per_row)
        measured = target.measure(case, drawn)
        row = dict(zip(COLUMNS, (*values, measured.pop('error'), seconds / num_samples)))
        yield row | measured
        bar.update(case.plan.num_evaluations)


def pivot(rows: list[dict], steps: list[int]) -> list[dict]:
    """For each grid and solver one row, for each number of steps one column of errors; * marks the distribution's."""
    table = {}
    for row in rows:
        line = table.setdefault((row['grid'], row['solver']), {})
        line[row['num_steps']] = f'{row["error"]:.3g}' + ('*' if row['error_kind'] == 'distribution' else '')
    columns = {f'{n} steps': n for n in steps}
    cells = {key: {title: line.get(n, 'skipped') for title, n in columns.items()} for key, line in table.items()}
    return [{'grid': grid, 'solver': solver} | line for (grid, solver), line in cells.items()]


def best_by_budget(rows: list[dict], budgets: list[int]) -> list[dict]:
    """The combination of lowest error within each number of evaluations, where there is an error to an end point."""
    lines = []
    for budget in budgets:
        if within := [r for r in rows if r['error_kind'] != 'distribution' and r['num_evaluations'] <= budget]:
            best = min(within, key=lambda r: r['error'])
            lines.append({'at most': f'{budget} evaluations'} | {k: best[k] for k in BEST_COLUMNS})
    return lines


def draw_plot(path: Path, rows: list[dict], column: str, ylabel: str, floors: dict[str, float]) -> None:
    """Small multiples, one line for each solver: a column for each schedule and a row for each grid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    names, tables, specs = (list(dict.fromkeys(row[k] for row in rows)) for k in COLUMNS[:3])
    panels = [(s, g) for g in tables for s in names]
    height, width = (len(tables), len(names)) if len(names) > 1 else (1, len(tables))
    figure = Figure(figsize=(3.1 * width + 2.2, 2.7 * height + 0.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, width, sharex=True, sharey=True, squeeze=False)
    ticks = sorted({row['num_steps'] for row in rows} | {2 * max(row['num_steps'] for row in rows)})
    for ax, panel in zip(axes.flat, panels):
        for i, spec in enumerate(specs):
            here = [row for row in rows if (row['schedule'], row['grid'], row['solver']) == (*panel, spec)]
            points = sorted((row['num_evaluations'], row[column]) for row in here)
            thickness = 2.8 - 1.8 * i / len(specs)  # lines that coincide stay visible
            ax.plot(*(zip(*points) if points else ((), ())), linewidth=thickness, label=spec, **look(spec, specs))
        if panel[0] in floors:
            ax.axhline(floors[panel[0]], color='0.4', linewidth=1, linestyle=(0, (4, 3)), label='perfect samples')
        ax.set(xscale='log', yscale='log')
        ax.set_title(f'{panel[0]}, {panel[1]} grid', fontsize=10)
        ax.set_xticks(ticks, ticks)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
    figure.supxlabel('network evaluations', fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def look(spec: str, specs: list[str]) -> dict[str, Any]:
    """A solver has its colour, in every plot the same; its variants differ in line and marker."""
    from matplotlib import colormaps

    name, known = spec.partition(':')[0], sorted(solvers.__all__)
    variant = [s for s in specs if s.partition(':')[0] == name].index(spec) % 4
    index = known.index(name) if name in known else 0
    color = colormaps['tab10'](index) if len(known) <= 10 else colormaps['turbo'](index / (len(known) - 1))
    return {'color': color, 'linestyle': ('-', '--', ':', '-.')[variant], 'marker': 'osD^'[variant], 'markersize': 3.5}


def report(rows: list[dict], skipped: dict, floors: dict, notes: list[str], options) -> str:
    """Everything as Markdown: what the terminal shows and report.md keeps."""
    parts = ['# Samplers compared', *notes]
    for name in dict.fromkeys(row['schedule'] for row in rows):
        here = [row for row in rows if row['schedule'] == name]
        parts += [f'## {name}', markdown_table(pivot(here, options.steps))]
        if best := best_by_budget(here, options.steps):
            parts += ['Lowest error within a budget:', markdown_table(best)]
        what = 'as many exact samples show a distance (*) of' if options.oracle else 'as many real train images show'
        parts += [f'For scale: {what} {floors[name]:.3g}.']
    for (name, grid, spec, reason), steps in skipped.items():
        parts += [f'Skipped: {spec} on {grid} on the schedule {name}, steps {", ".join(map(str, steps))}: {reason}']
    return '\n\n'.join(parts) + '\n'


def compare(options) -> list[dict[str, Any]]:
    """Runs everything, writes results.csv, the plots and report.md, prints the report; the rows of the CSV."""
    began, out = time.monotonic(), Path(options.out)
    targets = [workdir_target(options)] if options.workdir else oracle_targets(options)
    plans = [plan_cases(target, options) for target in targets]
    skipped = {(t.name, *key): steps for t, (_, skips) in zip(targets, plans) for key, steps in skips.items()}
    if not any(cases for cases, _ in plans):
        raise Stop(f'nothing can be run; the first reason: {next(iter(skipped))[-1]}')
    out.mkdir(parents=True, exist_ok=True)
    rows, total = [], sum(case.plan.num_evaluations for cases, _ in plans for case in cases)
    with tqdm(total=total, unit='evaluation', dynamic_ncols=True, disable=None) as bar:
        for target, (cases, _) in zip(targets, plans):
            rows += run_cases(target, cases, options.num_samples, bar) if cases else []
    with open(out / 'results.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    floors = {target.name: target.floor for target in targets}
    notes = [
        f'{len(rows)} samplers, {options.num_samples} samples each, {len(targets)} schedule(s), '
        f'**{sum(t.count_traces() for t in targets)} compilation(s)** in all; {time.monotonic() - began:.0f} s.',
        'Error: root mean square distance to the exact flow; * sliced Wasserstein distance to the exact distribution '
        '(stochastic solvers, which have no end point). The two kinds do not compare.'
        if options.oracle
        else 'Error: Frechet distance to the test images over raw pixels.',
    ]
    text = report(rows, skipped, floors, notes, options)
    (out / 'report.md').write_text(text)
    plots(out, rows, floors, bool(options.oracle))
    print(text + f'\nwritten: {out}/results.csv, {out}/report.md and plots')
    return rows


def plots(out: Path, rows: list[dict], floors: dict[str, float], oracle: bool) -> None:
    """errors.png, and for an oracle distributions.png: the two kinds of error never share axes."""
    if not oracle:
        draw_plot(out / 'errors.png', rows, 'error', 'Frechet distance to the test images', floors)
        return
    if paths := [row for row in rows if row['error_kind'] == 'flow']:
        draw_plot(out / 'errors.png', paths, 'error', 'RMS distance to the exact flow', {})
    draw_plot(out / 'distributions.png', rows, 'distribution_error', 'sliced Wasserstein distance', floors)


def values(text: str) -> list[str]:
    """'a,b' -> [a, b]; where a value holds commas, | separates: 'uniform:start=0.9,end=0.1|karras'."""
    return [part.strip() for part in text.split('|' if '|' in text else ',') if part.strip()]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--oracle', choices=oracles.__all__, help='exact denoisers; needs no training')
    what.add_argument('--workdir', help='a trained run')
    parser.add_argument('--grids', type=values, default=GRIDS, help='default: %(default)s')
    parser.add_argument('--schedules', type=values, default=SCHEDULES, help='of the oracle; default: %(default)s')
    every = 'heun is all its variants, heun:coordinate=t one; | separates where a value holds commas; default: all'
    parser.add_argument('--solvers', type=values, default=[], help=every)
    parser.add_argument('--steps', type=values, default=['5', '10', '20', '50'], help='default: %(default)s')
    parser.add_argument(
        '--num_samples', type=int, default=None, help='default: 4096 for gmm2d, 512 for gmm64, 720 for a run'
    )
    parser.add_argument('--num_paths', type=int, default=256, help='oracle: samples held against the exact flow')
    parser.add_argument('--seed', type=int, default=0, help='of the starting noise')
    parser.add_argument('--out', default='runs/compare_samplers', help='default: %(default)s')
    options = parser.parse_args(argv)
    options.num_samples = options.num_samples or {'gmm2d': 4096, None: 720}.get(options.oracle, 512)
    if options.num_samples < 2 or not all(n.isdecimal() and int(n) for n in options.steps):
        parser.error('--num_samples must be at least 2, and --steps whole numbers from 1')
    options.steps = sorted(map(int, options.steps))
    return options


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    absl_logging.set_verbosity(absl_logging.WARNING)
    options = parse(argv)
    try:
        return compare(options)
    except (Stop, ConfigError, FileNotFoundError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
