"""Samplers compared: error against network evaluations, every solver through one compiled program.

    python experiments/compare_samplers.py --oracle=gmm2d
    python experiments/compare_samplers.py --oracle=gmm64 --schedules=scaled_linear,edm --reference
    python experiments/compare_samplers.py --workdir=runs/digits --solvers=ddim,heun,unipc --evaluations=10,20,50

Every solver on every grid at every budget of network evaluations is a plan with as many steps as the budget allows;
plans are padded to one size and are arguments, so that each schedule of an oracle, or the trained run, is compiled once
(for tables of up to 64, 256, 1024 ... rows once each). The number of traces is counted and printed.

What `error` is depends on what is asked:

    --oracle    the denoiser is exact, so all of the error is the solver's. 'gmm64:seed=3' is another random mixture.
                Deterministic solvers: root mean square distance |x - x*| between where the solver and where the exact
                probability flow from t = 1 carry the same starting noise (error_kind 'flow'). A grid that starts short
                of t = 1 begins with noise of its own level, as samplers do, and that is part of its error.
                Stochastic solvers have no such end point. Their error is of another kind ('distribution'), the sliced
                2-Wasserstein distance to the mixture, which is measured for all of them in the column
                distribution_error and has a plot of its own. As many exact samples are not at distance 0 either: what
                they show is printed and drawn as a floor.
    --workdir   Frechet distance between the samples and the test images over raw pixels, network and solver together.
                Its floor is that of as many real train images.

--reference adds the solvers of diffusers and k-diffusion on their own grids, from the same noise with the same exact
denoiser, to the table and the plot (needs the extra `parity`).

Into --out go results.csv, errors.png, report.md, and with an oracle distributions.png and, for gmm2d, trajectories.png.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging as absl_logging
from command_line import Stop, values
from compare_report import OURS, budget_table, draw_errors, draw_trajectories, solver_table
from compare_targets import Case, Target, oracle_targets, rms, workdir_target
from hand_made import maker, within_budget
from tqdm import tqdm

from diffjax.build import ConfigError
from diffjax.core import oracles, solvers
from diffjax.core.sampling import check_plan, pad
from diffjax.core.solvers import Plan

VARIANTS = {  # the settings of a solver that are methods of their own; a solver that is not listed has one
    'consistency': (),  # these three are for distilled models: compared only where they are named
    'lcm': (),
    'tcd': (),
    'repaint': (),  # for inpainting
    'ddpm': ('variance=small', 'variance=large'),
    'ddim': ('eta=0', 'eta=0.5'),
    'euler': ('coordinate=t',),  # in sigma/alpha it is ddim
    'euler_ancestral': ('eta=1',),
    'heun': ('coordinate=sigma/alpha', 'coordinate=t', 'coordinate=angle'),
    'lms': ('order=4', 'coordinate=angle'),
    'dpm_solver': ('order=2', 'order=3'),
    'dpm_solver_m': ('order=2', 'order=3'),
    'deis': ('order=3', 'order=3,polynomial=logsnr'),
    'dpmpp_2m': ('final=adams', 'final=euler'),
    'dpmpp_3m': ('final=adams', 'halved=True,final=euler'),
    'unipc': (
        'order=2',
        'order=3',
        'order=3,final=lower',
        'order=3,polynomial=softplus',
        'order=4,polynomial=softplus',
        'order=4,polynomial=softplus,knee=0.3',
    ),
    'sa_solver': ('tau=1', 'tau=0,final=adams'),
    'euler_maruyama': ('diffusion=sde', 'diffusion=sigma'),
}
GRIDS, SCHEDULES = ['uniform', 'karras', 'exponential', 'softplus'], ['flow', 'scaled_linear', 'cosine', 'edm']
TRAJECTORIES = ['ddim:eta=0', 'heun:coordinate=sigma/alpha', 'unipc:order=3,polynomial=softplus', 'ddpm:variance=small']
COLUMNS = ('schedule', 'grid', 'solver', 'num_steps', 'num_evaluations', 'error', 'seconds_per_sample')
LEAST_ROWS = 64  # of a padded table; larger ones grow by factors of 4


def solver_specs(wanted: list[str], *, learned_variance: bool) -> list[str]:
    """'heun' becomes its variants, 'heun:coordinate=t' stays; [] is every solver there is."""
    specs = []
    for name in wanted or solvers.__all__:
        variants = VARIANTS.get(name, ('',)) or (('',) if wanted else ())
        variants += ('variance=learned',) if learned_variance and name == 'ddpm' else ()
        specs += [f'{name}:{variant}' if variant else name for variant in variants]
    return specs


def plan_cases(target: Target, options) -> tuple[list[Case], dict[tuple[str, str, str], list[int]]]:
    """(what can be run, {(grid, solver, reason): budgets} of what cannot)."""
    cases, skipped, learned = [], {}, target.learned_variance
    specs = solver_specs(options.solvers, learned_variance=learned)
    for grid_spec in options.grids:
        for spec in specs:
            make = maker(target.schedule, spec, grid_spec, flags=('--solvers', '--grids'))
            for budget in options.budgets:
                rows = budget if options.steps else budget // target.calls_per_row
                try:
                    case = exactly(make, rows) if options.steps else within_budget(make, rows)
                    check_plan(case[-1], target.schedule, target.parameterization, learned_variance=learned)
                except ValueError as error:
                    skipped.setdefault((grid_spec, spec, ' '.join(str(error).split())), []).append(budget)
                else:
                    cases.append(Case(grid_spec, spec, budget, *case))
    return cases, skipped


def exactly(make, num_steps: int) -> tuple[int, np.ndarray, Plan]:
    """(number of steps, times, plan). Raises ValueError where the grid is a list of other times."""
    times, plan = make(num_steps)
    if len(times) - 1 != num_steps:
        raise ValueError(f'{len(times)} times make {len(times) - 1} steps')
    return num_steps, times, plan


def num_rows(case: Case) -> int:
    """Of the padded table that a case is run in."""
    rows = LEAST_ROWS
    while rows < len(case.plan.t):
        rows *= 4
    return rows


def run_cases(target: Target, cases: list[Case], options, bar: tqdm, drawn: list) -> Iterator[dict[str, Any]]:
    """One row of the CSV for each case. `drawn` collects (case, paths) of what is to be pictured."""
    remembered, noises = (max(sizes) for sizes in zip(*((c.plan.num_remembered, c.plan.num_noises) for c in cases)))
    compiled = set()
    for case in sorted(cases, key=num_rows):
        plan = pad(case.plan, num_rows(case), remembered, noises)
        if len(plan.t) not in compiled:
            compiled.add(len(plan.t))
            target.draw(plan)
        began = time.perf_counter()
        result = target.draw(plan)
        seconds = time.perf_counter() - began
        evaluations = case.plan.num_evaluations * target.calls_per_row
        values = target.name, case.grid, case.solver, case.num_steps, evaluations
        measured = target.measure(case, result)
        row = dict(zip(COLUMNS, (*values, measured.pop('error'), seconds / options.num_samples)))
        yield row | measured | {'source': OURS, 'budget': case.budget}
        if case.solver in options.trajectories and target.mixture is not None and result[2] is not None:
            states = np.concatenate([result[0][None, : result[2].shape[1]], result[2][: len(case.plan.t)]])
            drawn.append((target, case, row['error'], states))
        bar.update(case.plan.num_evaluations)


def run_references(target: Target, options) -> Iterator[dict[str, Any]]:
    """Rows of the CSV for the solvers of diffusers and k-diffusion, deterministic ones."""
    from references import endings

    x = target.start()
    truth = target.mixture.flow(target.schedule, x, 1.0, 0.0, tolerance=1e-10)
    for budget in tqdm(options.budgets, desc=f'references on {target.name}', dynamic_ncols=True, disable=None):
        for end in endings(target.schedule, target.mixture.posterior, x, budget):
            values = target.name, end.grid, end.solver, end.num_steps, end.num_evaluations
            row = dict(zip(COLUMNS, (*values, rms(end.x, truth), float('nan'))))
            source = 'k-diffusion' if end.solver.startswith('k-') else 'diffusers'
            yield row | {'error_kind': 'flow', 'source': source, 'budget': budget, 'failure': end.failure}


def report(rows: list[dict], skipped: dict, floors: dict, notes: list[str], options) -> str:
    """Everything as Markdown: what the terminal shows and report.md keeps."""
    parts, unit = ['# Samplers compared', *notes], 'steps' if options.steps else 'evaluations'
    for name in dict.fromkeys(row['schedule'] for row in rows):
        here = [row for row in rows if row['schedule'] == name]
        parts += [f'## {name}', f'Lowest error over the grids, at most so many {unit}:']
        parts += [solver_table(here, options.budgets, unit)]
        if any(row['error_kind'] != 'distribution' for row in here):
            parts += ['The best at each budget:', budget_table(here, options.budgets, unit)]
        what = 'as many exact samples show a distance (*) of' if options.oracle else 'as many real train images show'
        parts += [f'For scale: {what} {floors[name]:.3g}.']
    for (name, grid, spec, reason), budgets in skipped.items():
        parts += [f'Skipped: {spec} on {grid} on {name}, at {", ".join(map(str, budgets))} {unit}: {reason}']
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
    rows, drawn, total = [], [], sum(case.plan.num_evaluations for cases, _ in plans for case in cases)
    with tqdm(total=total, unit='evaluation', dynamic_ncols=True, disable=None) as bar:
        for target, (cases, _) in zip(targets, plans):
            rows += run_cases(target, cases, options, bar, drawn) if cases else []
    num_samplers = len(rows)
    if options.reference:
        rows += [row for target in targets for row in run_references(target, options)]
    with open(out / 'results.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    floors = {target.name: target.floor for target in targets}
    notes = [
        f'{num_samplers} samplers, {options.num_samples} samples each, {len(targets)} schedule(s), '
        f'**{sum(t.count_traces() for t in targets)} compilation(s)** in all; {time.monotonic() - began:.0f} s.',
        f'Error: root mean square distance to the exact flow, {min(options.num_paths, options.num_samples)} paths; * '
        'sliced Wasserstein distance to the exact distribution (stochastic solvers, which have no end point). The two '
        'kinds do not compare.'
        if options.oracle
        else 'Error: Frechet distance to the test images over raw pixels.',
    ]
    text = report(rows, skipped, floors, notes, options)
    (out / 'report.md').write_text(text)
    pictures(out, rows, floors, drawn, options)
    print(text + f'\nwritten: {out}/results.csv, {out}/report.md and plots')
    return rows


def pictures(out: Path, rows: list[dict], floors: dict[str, float], drawn: list, options) -> None:
    """errors.png, and for an oracle distributions.png (the two kinds of error never share axes), trajectories.png."""
    if not options.oracle:
        draw_errors(out / 'errors.png', rows, 'error', 'Frechet distance to the test images', floors)
        return
    if paths := [row for row in rows if row['error_kind'] == 'flow']:
        draw_errors(out / 'errors.png', paths, 'error', 'RMS distance to the exact flow', {})
    ours = [row for row in rows if row['source'] == OURS]
    draw_errors(out / 'distributions.png', ours, 'distribution_error', 'sliced Wasserstein distance', floors)
    first = [entry for entry in drawn if entry[0] is drawn[0][0] and entry[1].budget == options.budgets[0]]
    chosen = {}
    for entry in sorted(first, key=lambda entry: entry[2]):
        chosen.setdefault(entry[1].solver, entry)
    panels = [
        (f'{case.solver}\n{target.name}, {case.grid}, {case.plan.num_evaluations} evaluations', states)
        for target, case, _, states in (chosen[name] for name in options.trajectories if name in chosen)
    ]
    if panels:
        draw_trajectories(out / 'trajectories.png', drawn[0][0].mixture, panels)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--oracle', help=f'{" or ".join(oracles.__all__)}: exact denoisers; needs no training')
    what.add_argument('--workdir', help='a trained run')
    parser.add_argument('--grids', type=values, default=GRIDS, help='or times, [1, 0.5, 0]; default: %(default)s')
    parser.add_argument('--schedules', type=values, default=SCHEDULES, help='of the oracle; default: %(default)s')
    every = 'heun is all its variants, heun:coordinate=t one; | separates where a value holds commas; default: all'
    parser.add_argument('--solvers', type=values, default=[], help=every)
    sizes = parser.add_mutually_exclusive_group()
    budgets = 'at most so many network evaluations; default: %(default)s'
    sizes.add_argument('--evaluations', type=values, default=['10', '20', '50', '100'], help=budgets)
    sizes.add_argument('--steps', type=values, default=[], help='so many steps, whatever they cost, instead')
    parser.add_argument('--reference', action='store_true', help='also the solvers of diffusers and k-diffusion')
    parser.add_argument(
        '--trajectories', type=values, default=TRAJECTORIES, help='gmm2d: solvers whose paths are drawn; %(default)s'
    )
    parser.add_argument(
        '--num_samples', type=int, default=None, help='default: 4096 for gmm2d, 512 for gmm64, 720 for a run'
    )
    parser.add_argument('--num_paths', type=int, default=256, help='oracle: samples held against the exact flow')
    parser.add_argument('--seed', type=int, default=0, help='of the starting noise')
    parser.add_argument('--out', default='runs/compare_samplers', help='default: %(default)s')
    options = parser.parse_args(argv)
    default = 720 if options.workdir else 4096 if options.oracle.startswith('gmm2d') else 512
    options.num_samples = default if options.num_samples is None else options.num_samples
    numbers = options.steps or options.evaluations
    if options.num_samples < 2 or not all(n.isdecimal() and int(n) for n in numbers):
        parser.error('--num_samples must be at least 2, and --steps and --evaluations whole numbers from 1')
    if options.reference and (options.workdir or options.steps):
        parser.error('--reference goes with --oracle and --evaluations: references are asked with the exact denoiser')
    if options.num_paths < 1:
        parser.error('--num_paths must be at least 1')
    options.budgets = sorted(map(int, numbers))
    return options


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    absl_logging.set_verbosity(absl_logging.WARNING)
    options = parse(argv)
    try:
        return compare(options)
    except (Stop, ConfigError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
