"""Learns a sampling plan: as few network calls as wanted, every coefficient and time by gradient descent.

    python experiments/learn_plan.py --oracle=gmm2d --schedules=flow,cosine --num_evaluations=6
    python experiments/learn_plan.py --workdir=runs/digits --num_evaluations=6 --out=runs/plan
    python -m diffjax.main --mode=evaluate --workdir=runs/digits --config.sampler.solver=runs/plan/plan.json

A plan is judged by its RMS distance to where the flow itself carries the same noise, on starts that it was not learned
on. Beside it stands the best of the hand-made: every deterministic solver x its settings x grids that makes at most as
many calls (hand_made.py), chosen by the held-out starts themselves, which favours it. Learning begins at the one that
is best on the training starts, or at --solver on --grid. How it is done stands in plan_learning.py, and what the end
points are in plan_problems.py.

Into --out go, for one schedule and one number of evaluations, plan.json, plan.png and learning.png, for several in a
folder each; over all of them report.md, results.csv, and for several numbers of evaluations errors.png.
"""

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging as absl_logging
from command_line import Stop, values
from hand_made import HandMade, hand_made_plans, longest
from plan_learning import Distances, Learned, Problem, Settings, common_size, learn
from plan_problems import RunProblem, oracle_problem, run_problem, sample_figures
from plot_plan import draw_plan
from tqdm import tqdm

from diffjax.build import ConfigError, make_plan
from diffjax.core import oracles
from diffjax.core.sampling import check_plan
from diffjax.core.solvers.plan_records import PlanRecord, describe
from diffjax.evaluation import line_plot, markdown_table
from diffjax.plan_files import write_plan

STARTS = {
    'num_train': 'starts to learn on',
    'num_held_out': 'starts to judge by',
    'num_screened': 'training starts that every hand-made plan is tried on; the best go on',
    'batch_size': "starts at a time: Adam's minibatch, and what memory has to hold",
}
DEFAULTS = {
    name: dict(zip((*STARTS, 'num_updates', 'num_polish'), numbers))
    for name, numbers in {
        'gmm2d': (8192, 4096, 512, 1024, 100, 500),
        'gmm64': (4096, 1024, 256, 512, 100, 300),
        'run': (960, 480, 64, 240, 50, 100),
    }.items()
}
NUM_FINALISTS, NUM_SHOWN = 16, 5  # hand-made plans measured on all starts; shown in the report
TOLERANCE = 0.01  # relative, between an error and the same through the file


class Cell(NamedTuple):
    """One schedule and one number of evaluations."""

    problem: Problem
    num_evaluations: int
    folder: Path
    start: HandMade
    learned: Learned
    best: HandMade  # of the hand-made, by the held-out starts
    rows: list[dict[str, Any]]  # the learned plan, then the hand-made ones, best first
    num_plans: int  # hand-made plans that were tried
    refused: dict[str, str]  # {solver: why}, where some of its combinations were


def screen(problem: Problem, num_evaluations: int, options) -> tuple[list[HandMade], dict, int]:
    """(the best hand-made plans by the first training starts, {solver: refusals}, how many plans there were)."""
    plans, refused = hand_made_plans(
        problem.schedule,
        problem.parameterization,
        num_evaluations,
        solver_specs=options.against_solvers,
        grid_specs=options.against_grids,
    )
    if not plans:
        raise Stop(f'no solver makes a plan of {num_evaluations} evaluations: {", ".join(set(refused.values()))}')
    few, size = problem.train.take(slice(options.num_screened)), common_size([m.plan for m in plans], num_evaluations)
    distances = Distances(problem._replace(batch_size=options.num_screened), size)
    what = f'{problem.name}, {num_evaluations} evaluations: hand-made'
    bar = tqdm(plans, desc=what, unit='plan', dynamic_ncols=True, disable=None)
    errors = np.nan_to_num([distances.rms(made.plan, few) for made in bar], nan=np.inf)
    return [plans[i] for i in np.argsort(errors, kind='stable')[:NUM_FINALISTS]], refused, len(plans)


def study(problem: Problem, num_evaluations: int, folder: Path, options) -> Cell:
    """Learns one plan, and measures it beside the hand-made ones."""
    finalists, refused, num_plans = screen(problem, num_evaluations, options)
    if options.solver != 'best':
        try:
            start = longest(problem.schedule, problem.parameterization, options.solver, options.grid, num_evaluations)
        except ValueError as error:
            raise Stop(f'nothing can begin from {options.solver} on {options.grid}: {error}') from error
        finalists.append(start)
    distances = Distances(problem, common_size([made.plan for made in finalists], num_evaluations))
    rows = [measured(distances, problem, made.plan, made.solver, made.grid) for made in finalists]
    ranked = sorted(zip(rows, finalists), key=lambda pair: pair[0]['held_out_rms'])
    if options.solver == 'best':  # by the training starts, and as long as may be
        whole = [pair for pair in ranked if pair[1].plan.num_evaluations == num_evaluations] or ranked
        start = min(whole, key=lambda pair: pair[0]['train_rms'])[1]
    settings = Settings(options.num_updates, options.num_polish, options.learning_rate, options.seed)
    what = f'{problem.name}, {num_evaluations} evaluations: learning'
    with tqdm(total=sum(settings[:2]), desc=what, unit='update', dynamic_ncols=True, disable=None) as bar:
        learned = learn(problem, start.plan, distances, settings, bar)
    check_plan(learned.plan, problem.schedule, problem.parameterization, learned_variance=False)
    rows = [measured(distances, problem, learned.plan, 'learned', f'from {start.solver} on {start.grid}')]
    rows += [row for row, _ in ranked]
    return Cell(problem, num_evaluations, folder, start, learned, ranked[0][1], rows, num_plans, refused)


def measured(distances: Distances, problem: Problem, plan, solver: str, grid: str) -> dict[str, Any]:
    """A row of the tables: RMS distances, and the median of the held-out ones."""
    held_out = distances(plan, problem.held_out)
    return {
        'schedule': problem.name,
        'solver': solver,
        'grid': grid,
        'num_evaluations': plan.num_evaluations,
        'train_rms': distances.rms(plan, problem.train),
        'held_out_rms': float(np.sqrt(np.mean(held_out**2))),
        'held_out_median': float(np.median(held_out)),
    }


def save(cell: Cell, options, run: RunProblem | None) -> Path:
    """plan.json, plan.png and learning.png."""
    problem, learned, path = cell.problem, cell.learned, cell.folder / 'plan.json'
    cell.folder.mkdir(parents=True, exist_ok=True)
    figures = {key: cell.rows[0][key] for key in ('train_rms', 'held_out_rms', 'held_out_median')}
    notes = {
        'learned on': options.oracle or str(options.workdir),
        'sampler': run.sampler_settings() if run else {},
        'best hand-made': {
            'solver': cell.best.solver,
            'grid': cell.best.grid,
            'held_out_rms': cell.rows[1]['held_out_rms'],
        },
        'settings': {
            name: getattr(options, name) for name in (*STARTS, 'num_updates', 'num_polish', 'learning_rate', 'seed')
        },
    }
    write_plan(
        path, PlanRecord(learned.plan, describe(problem.schedule), cell.start.solver, cell.start.grid, figures | notes)
    )
    title = f'{problem.name}, {cell.num_evaluations} evaluations, learned from {cell.start.solver} on {cell.start.grid}'
    draw_plan(cell.folder / 'plan.png', learned.plan, problem.schedule, title)
    steps = [point['update'] for point in learned.curve]
    curves = {'training starts': (steps, [point['train_rms'] for point in learned.curve])}
    curves['held-out starts'] = (steps, [point['held_out_rms'] for point in learned.curve])
    curves['best hand-made'] = ([steps[0], steps[-1]], [cell.rows[1]['held_out_rms']] * 2)
    line_plot(cell.folder / 'learning.png', curves, xlabel='update', ylabel='RMS distance', yscale='log')
    return path


def check_file(cell: Cell, path: Path, run: RunProblem | None) -> float:
    """The held-out RMS distance by the plan as `sampler.solver=PATH` reads it; Stop where it is another one."""
    problem, stated = cell.problem, cell.rows[0]['held_out_rms']
    if run is None:
        plan = make_plan(problem.schedule, str(path), 'uniform', 1)
        found = Distances(problem, common_size([plan], cell.num_evaluations)).rms(plan, problem.held_out)
    else:
        x = run.sampled_from_file(str(path))[-len(problem.held_out.labels) :]
        found = float(np.sqrt(np.mean(np.sum((x - problem.held_out.ends) ** 2, tuple(range(1, x.ndim))))))
    if abs(found - stated) > TOLERANCE * stated:
        raise Stop(f'sampler.solver={path} gives the RMS distance {found:.4g}, and learning had {stated:.4g}')
    return found


def report(cells: list[Cell], figures: dict[str, dict], notes: list[str], out: Path) -> str:
    """Everything as Markdown."""
    parts = ['# Learned plans', *notes]
    for cell in cells:
        learned, best = cell.rows[0]['held_out_rms'], cell.rows[1]['held_out_rms']
        parts += [
            f'## {cell.problem.name}, {cell.num_evaluations} evaluations',
            f'On held-out starts the learned plan ends at an RMS distance of **{learned:.4g}**, and the best of '
            f'{cell.num_plans} hand-made plans, {cell.best.solver} on {cell.best.grid}, at {best:.4g}: '
            f'**{best / learned:.2g} times** as far. Learned from {cell.start.solver} on {cell.start.grid}.',
            markdown_table([{k: v for k, v in row.items() if k != 'schedule'} for row in cell.rows[: NUM_SHOWN + 1]]),
        ]
        reasons = {why: [name for name, its in cell.refused.items() if its == why] for why in cell.refused.values()}
        refusals = '; '.join(f'{", ".join(names)}: {why}' for why, names in reasons.items())
        parts += [f'Not among the hand-made on any or some of the grids: {refusals or "none"}.']
        for name in ('plan', 'learning'):
            parts += [f'![{name}]({(cell.folder / name).relative_to(out)}.png)']
    if figures:
        table = [{'plan': name} | values for name, values in figures.items()]
        parts += ['## Samples', 'Of another seed than the starts:', markdown_table(table)]
    return '\n\n'.join(parts) + '\n'


def draw_errors(path: Path, cells: list[Cell]) -> None:
    """Held-out error against evaluations: learned, and the best of the hand-made."""
    curves = {}
    for name in dict.fromkeys(cell.problem.name for cell in cells):
        here = [cell for cell in cells if cell.problem.name == name]
        for row, what in enumerate(('learned', 'best hand-made')):
            errors = [cell.rows[row]['held_out_rms'] for cell in here]
            curves[f'{name}: {what}'] = ([cell.num_evaluations for cell in here], errors)
    line_plot(path, curves, xlabel='network evaluations', ylabel='RMS distance, held-out starts', yscale='log')


def learn_plans(options) -> list[dict[str, Any]]:
    """All cells, the files and the report. The rows of results.csv."""
    began, out = time.monotonic(), Path(options.out)
    run = run_problem(options) if options.workdir else None
    names = [None] if run else options.schedules
    several = len(names) * len(options.num_evaluations) > 1
    cells, rows, figures, checks = [], [], {}, []
    for name in names:
        problem = run.problem if run else oracle_problem(name, options)
        for num in options.num_evaluations:
            folder = out / f'{problem.name}-{num}' if several else out
            cells.append(study(problem, num, folder, options))
            path = save(cells[-1], options, run)
            checks.append(f'{path}: {check_file(cells[-1], path, run):.4g}')
            rows += [{'at_most': num} | row for row in cells[-1].rows]
    if run:
        plans = {
            f'{what}, {c.num_evaluations} evaluations': p
            for c in cells
            for what, p in (('learned', c.learned.plan), (f'{c.best.solver} on {c.best.grid}', c.best.plan))
        }
        plans[f'reference, {run.reference.num_evaluations} evaluations'] = run.reference
        figures = sample_figures(run.run, plans, options.seed + 1)
    notes = [
        f'{options.num_train} starts to learn on, {options.num_held_out} held out; {time.monotonic() - began:.0f} s. '
        + ('End points: the exact flow.' if run is None else run.about_the_reference()),
        'Held-out RMS distance with sampler.solver=PATH: ' + '; '.join(checks),
    ]
    if len(options.num_evaluations) > 1:
        draw_errors(out / 'errors.png', cells)
        notes.append('![errors](errors.png)')
    text = report(cells, figures, notes, out)
    (out / 'report.md').write_text(text, encoding='utf-8')
    with open(out / 'results.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(text + f'\nwritten: {out}/report.md, {out}/results.csv')
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--oracle', help=f'{" or ".join(oracles.__all__)}: exact denoisers; needs no training')
    what.add_argument('--workdir', help='a trained run')
    parser.add_argument('--schedules', type=values, default=['flow'], help='of the oracle; default: flow')
    parser.add_argument('--num_evaluations', type=values, default=['6'], help='such as 4,6,8,10; default: 6')
    parser.add_argument('--solver', default='best', help='to begin from; default: the best hand-made plan there is')
    parser.add_argument('--grid', default='uniform', help='for --solver; default: %(default)s')
    every = 'hand-made ones to stand beside; | separates where a value holds commas; default: all'
    parser.add_argument('--against_solvers', type=values, default=[], help=every)
    parser.add_argument('--against_grids', type=values, default=[], help=every)
    for name, what in STARTS.items():
        parser.add_argument(f'--{name}', type=int, help=what)
    parser.add_argument('--num_updates', type=int, help='of Adam')
    parser.add_argument('--num_polish', type=int, help='updates of BFGS after it')
    parser.add_argument('--learning_rate', type=float, default=0.005, help="Adam's; default: %(default)s")
    parser.add_argument('--seed', type=int, default=0, help='of starts, labels and minibatches; default: 0')
    parser.add_argument('--out', default='runs/learn_plan', help='default: %(default)s')
    options = parser.parse_args(argv)
    kind = 'run' if options.workdir else options.oracle.partition(':')[0].strip()
    for name, value in DEFAULTS.get(kind, DEFAULTS['gmm64']).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    numbers = [options.num_train, options.num_held_out, options.num_screened, options.batch_size]
    if not all(n.isdecimal() and int(n) for n in options.num_evaluations) or min(numbers) < 1:
        parser.error('--num_evaluations and the numbers of starts are whole numbers from 1')
    if min(options.num_updates, options.num_polish) < 0 or options.learning_rate <= 0:
        parser.error('--num_updates and --num_polish are at least 0, and --learning_rate is above 0')
    options.num_evaluations = sorted(map(int, options.num_evaluations))
    options.batch_size, options.num_screened = (
        min(n, options.num_train) for n in (options.batch_size, options.num_screened)
    )
    return options


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    absl_logging.set_verbosity(absl_logging.WARNING)
    options = parse(argv)
    try:
        return learn_plans(options)
    except (Stop, ConfigError, FileNotFoundError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
