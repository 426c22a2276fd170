"""Sample quality over a run's training: the figures of each checkpoint that it kept.

    python -m diffjax.main --config=configs/video_digits.py --workdir=runs/clips \\
        --config.training.checkpoint_every_steps=200 --config.training.keep_checkpoints=20
    python experiments/over_training.py --workdir=runs/clips --num_samples=100 --out=runs/clips_over_training

Each checkpoint draws the same labels from the same noise, as the run's `sampler` section says or as --sampler changes
it, through one compiled program; clips are measured as clips too. The newest comes first. The same command again goes
on where it was stopped.

Into --out go report.md, rows.csv (a row for each checkpoint) and figures.png, all against the time of training.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging as absl_logging
from command_line import Stop, values
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timed_training import check_same_study, seconds_of_steps, shown, write_csv

from diffjax import load
from diffjax.build import ConfigError
from diffjax.clip_figures import clip_figures
from diffjax.components import literal
from diffjax.evaluation.report import write_report
from diffjax.restoring import restore, sampling_params
from diffjax.results import image_figures
from diffjax.run import Run, balanced_labels
from diffjax.training.posthoc_ema import is_reconstructed
from diffjax.workdir import read_config

PLOTTED = {  # a figure of samples: its title, and the figure of real ones
    'frechet_video_distance': ('Frechet video distance', 'frechet_video_distance_train'),
    'flicker_ratio': ('flicker, times that of real clips', 1.0),
    'class_constancy': ('single digits that keep their class', 'class_constancy_real'),
    'path_residual': ('pixels off the path', 'path_residual_real'),
    'frechet_ratio': ('Frechet ratio', 1.0),
    'precision': ('precision', None),
    'recall': ('recall', None),
}


def checkpoints(run: Run, workdir: Path, done: set[int]) -> Iterator[Run]:
    """The run with the parameters of each checkpoint, from the newest, but for those that are done."""
    step, params = run.step, run.params
    while True:
        if step not in done:
            yield replace(run, params=params, step=step)
        try:
            state, step = restore(run.experiment, workdir, before=step)
        except FileNotFoundError:
            return
        params = sampling_params(run.experiment, state)


def figures_of(run: Run, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Those of PLOTTED that the samples have, and those of real ones."""
    samples = run.sample(labels, seed=seed)
    found = image_figures(run.experiment, samples, labels)
    if samples.ndim == 5:
        found |= clip_figures(run.experiment, samples, labels)
    wanted = [*PLOTTED, *(real for _, real in PLOTTED.values() if isinstance(real, str))]
    clip = samples.ndim == 5  # whose figures may be missing early: where no clip shows one digit, say
    return {name: float(found.get(name, np.nan)) for name in wanted if clip or name in found}


def study(options: argparse.Namespace) -> list[dict[str, Any]]:
    workdir, out = Path(options.workdir), Path(options.out)
    pairs = [one.partition('=') for one in values(options.sampler)]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise Stop(f'--sampler={options.sampler}: changes are written key=value,..., got {bad[0]!r}')
    changes = {key: literal(value) for key, _, value in pairs}
    if read_config(workdir) is None:
        raise Stop(f'{workdir} holds no run: there is no config.json in it')
    run = load(workdir, overrides={'sampler': changes} if changes else None)
    if not isinstance(run, Run) or run.experiment.test_images is None:
        raise Stop(f'{workdir} has no held-out images or clips to compare samples with')
    if is_reconstructed(run.experiment.params_name):
        raise Stop(f'{workdir} samples with a reconstructed average, which checkpoints do not hold: sampler.params')
    labels = balanced_labels(options.num_samples, run.experiment.source.num_classes)
    asked = {'sampler': {**run.config['sampler']}, 'num_samples': options.num_samples, 'seed': options.seed}
    check_same_study(out, {'workdir': str(workdir.resolve()), **asked})
    rows, seconds = read_done(out), dict(seconds_of_steps(workdir))
    for each in checkpoints(run, workdir, {row['step'] for row in rows}):
        minutes = np.interp(each.step, [0, *seconds], [0, *seconds.values()]) / 60
        rows.append({'step': each.step, 'minutes': float(minutes)} | figures_of(each, labels, options.seed))
        rows.sort(key=lambda row: row['step'])
        write_csv(out / 'rows.csv', rows)
        print(shown(rows[[row['step'] for row in rows].index(each.step)]), flush=True)
    plot(out / 'figures.png', rows)
    write(out, workdir, rows, options)
    return rows


def read_done(out: Path) -> list[dict[str, Any]]:
    """The rows that are there, from a command that was stopped."""
    if not (out / 'rows.csv').exists():
        return []
    with open(out / 'rows.csv', newline='') as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [row | {'step': int(row['step'])} for row in rows]


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """A panel for each figure: of samples over the minutes of training, and of real ones as a line."""
    known = {
        name: named for name, named in PLOTTED.items() if np.isfinite([row.get(name, np.nan) for row in rows]).any()
    }
    figure = Figure(figsize=(3.2 * len(known), 2.8), layout='constrained')
    FigureCanvasAgg(figure)
    minutes = [row['minutes'] for row in rows]
    for panel, (name, (title, real)) in zip(figure.subplots(1, len(known), squeeze=False)[0], known.items()):
        panel.plot(minutes, [row[name] for row in rows], marker='.', linewidth=1.5)
        if real is not None:
            panel.axhline(rows[-1][real] if isinstance(real, str) else real, color='0.4', linestyle=':', label='real')
            panel.legend(frameon=False, fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel('minutes of training', fontsize=8)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=100)


def write(out: Path, workdir: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    write_report(
        out / 'report.md',
        {name: value for name, value in rows[-1].items() if name != 'minutes'},
        title=f'{workdir.name} over its training',
        summary=f'{options.num_samples:,} samples of each of {len(rows)} checkpoints. Above the table: the last one.',
        pictures={'Over the training': out / 'figures.png'},
        tables={'Checkpoints': [shown(row) for row in rows]},
        config={'workdir': workdir, 'sampler': options.sampler or 'as the run has it', 'seed': options.seed},
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help='a run that kept checkpoints')
    parser.add_argument('--num_samples', type=int, default=100, help='of each; default: %(default)s')
    parser.add_argument('--sampler', default='', help='changes of the section, such as solver=ddpm,num_steps=60')
    parser.add_argument('--seed', type=int, default=0, help='of the samples; default: %(default)s')
    parser.add_argument('--out', default='runs/over_training', help='default: %(default)s')
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        return study(parser.parse_args(argv))
    except (Stop, ConfigError, FileNotFoundError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
