"""Sample quality against the length of the average of the parameters, for one run (Karras et al. 2024, figure 5).

    python experiments/ema_lengths.py --workdir=runs/edm2 --sigma_rel=0.02,0.05,0.1,0.15,0.2,0.25 --out=runs/ema_lengths

The run must have left snapshots of power averages (`python -m diffjax.main --help`). Each width is reconstructed from
them at the run's last snapshot and measured on the same starting noise; the parameters themselves are the row `raw`.

Into --out go report.md, lengths.csv (a row for each width) and lengths.png.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from command_line import Stop, values

from diffjax import load
from diffjax.build import ConfigError
from diffjax.core.types import PyTree
from diffjax.data import read_all
from diffjax.evaluation import evaluate_samples, line_plot, markdown_table
from diffjax.run import balanced_labels, reconstruct_averages
from diffjax.workdir import read_config


def study(workdir: Path, widths: list[float], num_samples: int, seed: int) -> list[dict[str, float | str]]:
    """A row for each width, and one for the parameters as they are; one program draws all samples."""
    if read_config(workdir) is None:
        raise Stop(f'{workdir} holds no run: there is no config.json in it')
    run = load(workdir, overrides={'sampler': {'params': 'raw'}})
    source, test = run.experiment.source, run.experiment.test
    if source.kind != 'image' or test is None:
        raise Stop(f'{workdir} learned {source.name}, which has no held-out images to compare samples with')
    labels = balanced_labels(num_samples, source.num_classes)
    rows = []

    def measure(name: float | str, params: PyTree, error: float | str) -> None:
        images = replace(run, params=params).sample(labels, seed=seed)
        found = evaluate_samples(images, labels, read_all(source), read_all(test))
        figures = {key: found[key] for key in ('frechet_ratio', 'frechet_distance', 'precision', 'recall')}
        rows.append({'sigma_rel': name, 'profile_error': error, **figures})
        print(f'{name}: {figures["frechet_ratio"]:.4g}', flush=True)

    made = reconstruct_averages(run.experiment, workdir, widths)
    measure('raw', run.params, '')
    for width, one in zip(widths, made.values()):
        measure(width, one.params, one.error)
    return rows


def write(out: Path, rows: list[dict[str, float | str]], workdir: Path, seed: int) -> None:
    """report.md, lengths.csv and lengths.png."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / 'lengths.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)
    raw, *others = rows
    widths, ratios = zip(*((row['sigma_rel'], row['frechet_ratio']) for row in others))
    curves = {'averages': (widths, ratios), 'no average': (widths, [raw['frechet_ratio']] * len(widths))}
    labels = {'xlabel': 'relative width of the average, sigma_rel', 'ylabel': 'Frechet ratio to real train images'}
    line_plot(out / 'lengths.png', curves, **labels)
    best = others[int(np.argmin(ratios))]
    summary = f'Best of {workdir.name}, seed {seed}: sigma_rel = {best["sigma_rel"]:g}.'
    (out / 'report.md').write_text(
        f'# Length of the average\n\n{summary}\n\n{markdown_table(rows)}\n\n![Frechet ratio by width](lengths.png)\n'
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=Path, required=True, help='a run that left snapshots of power averages')
    parser.add_argument('--sigma_rel', default='0.02,0.05,0.1,0.15,0.2,0.25', help='relative widths')
    parser.add_argument('--num_samples', type=int, default=1437)
    parser.add_argument('--seed', type=int, default=0, help='of the samples')
    parser.add_argument('--out', type=Path, default=Path('runs/ema_lengths'))
    options = parser.parse_args(argv)
    try:
        widths = [float(width) for width in values(options.sigma_rel)]
        rows = study(options.workdir, widths, options.num_samples, options.seed)
        write(options.out, rows, options.workdir, options.seed)
    except (Stop, ConfigError, ValueError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')
    print((options.out / 'report.md').read_text())


if __name__ == '__main__':
    main()
