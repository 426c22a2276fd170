"""Space and time halved together, space alone, or each frame by itself: one U-Net three ways, trained equally long.

    python experiments/temporal_downsampling.py --config=configs/video_digits.py --minutes=10 --out=runs/temporal

The config's space-time U-Net against the same network at the full frame rate everywhere (space is halved alone), and
against the frame-by-frame image model, which has no module over time; each as wide as it must be for as many
parameters. A step is timed first, and the number of steps follows. The same command again goes on where it was stopped.

Into --out go report.md, rows.csv, figures.png, samples.png (a clip of each network in a row) and a folder for each.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ablate import load_config
from absl import logging as absl_logging
from command_line import Stop
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timed_training import (
    PLAN,
    call_flops,
    check_same_study,
    num_steps_for,
    of_length,
    shown,
    train_whole,
    trained_seconds,
    write_csv,
)

from diffjax.build import ConfigError, build
from diffjax.evaluation.clips import contact_sheet
from diffjax.evaluation.report import write_report
from diffjax.nets import count_parameters

WAYS = {  # what of the network is changed
    'space and time': {},
    'space alone': {'temporal_downsampling': ()},
    'frame by frame': {'temporal_downsampling': (), 'temporal_kernel': 0, 'temporal_attention': 0},
}
SHOWN = 4  # clips of each in samples.png
FIGURES = ('frechet_video_distance', 'flicker_ratio', 'class_constancy', 'path_residual', 'frechet_ratio')
PLOTTED = {
    'frechet_video_distance': 'Frechet video distance',
    'flicker_ratio': 'flicker, times that of real clips',
    'class_constancy': 'single digits that keep their class',
    'gflops_per_clip': 'GFLOP for a call on a clip',
    'mb_of_a_step': 'MB of temporaries in a training step',
}


def parameters_of(config: dict[str, Any]) -> int:
    experiment = build(config)
    return count_parameters(experiment.trainer().init(experiment.batch_spec)[1].params)


def as_large(config: dict[str, Any], wanted: int) -> dict[str, Any]:
    """The config with base_channels for as many parameters as can be, near its own. Counts shapes alone."""
    width, found = config['network']['base_channels'], {}
    for channels in range(width, 2 * width + 1):
        wider = config | {'network': config['network'] | {'base_channels': channels}}
        try:
            found[abs(parameters_of(wider) - wanted)] = wider
        except ConfigError:  # groups or heads do not divide it
            continue
    return found[min(found)]


def row_of(way: str, config: dict[str, Any], seconds: float, folder: Path) -> dict[str, Any]:
    """One network, trained for so long and measured: a line of the table."""
    config = of_length(config, num_steps_for(seconds, folder, build(config)))
    experiment = build(config)
    print(f'{way}: {config["training"]["num_steps"]} steps', flush=True)
    train_whole(config, experiment, folder)
    found, plan = (json.loads((folder / name).read_text()) for name in ('figures.json', PLAN))
    return {
        'halved': way,
        'base_channels': config['network']['base_channels'],
        'parameters': parameters_of(config),
        'steps': found['step'],
        'trained_s': trained_seconds(folder),
        'gflops_per_clip': call_flops(experiment) / 1e9,
        'seconds_per_clip': found['seconds_per_sample'],
        'mb_of_a_step': plan['mb_of_a_step'],
        **{name: found.get(name) for name in FIGURES},
    }


def plot(path: Path, table: list[dict[str, Any]]) -> None:
    """A panel for each figure, a bar for each network."""
    known = {name: title for name, title in PLOTTED.items() if all(row[name] is not None for row in table)}
    figure = Figure(figsize=(3 * len(known), 3), layout='constrained')
    FigureCanvasAgg(figure)
    for panel, (name, title) in zip(figure.subplots(1, len(known), squeeze=False)[0], known.items()):
        bars = panel.bar([row['halved'].replace(' ', '\n') for row in table], [row[name] for row in table])
        panel.bar_label(bars, fmt='%.3g')
        panel.margins(y=0.15)
        panel.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def write(out: Path, table: list[dict[str, Any]], names: list[str], options: argparse.Namespace) -> None:
    write_csv(out / 'rows.csv', table)
    clips, labels = [], []
    for letter, name in zip('abc', names, strict=True):
        with np.load(out / name / 'samples.npz', allow_pickle=False) as kept:
            clips.append(kept['arr_0'][:SHOWN])
            asked = kept['labels'][:SHOWN] if 'labels' in kept else range(len(clips[-1]))
            labels += [f'{letter} {one}' for one in asked]
    contact_sheet(np.concatenate(clips), np.array(labels), out / 'samples.png')
    plot(out / 'figures.png', table)
    whole = json.loads((out / names[0] / 'figures.json').read_text())
    write_report(
        out / 'report.md',
        {key: whole[key] for key in ('frechet_video_distance', 'frechet_video_distance_train', 'flicker_real')}
        | {key: whole[key] for key in ('class_constancy_real', 'path_residual_real') if key in whole},
        title='Halving time with space',
        summary=(
            f'One U-Net three ways, each trained for {options.minutes:g} minutes; {whole["num_samples"]:,} clips of '
            'each against the test split, none selected. The figures above are those of the first row and of real '
            f'clips. In samples.png the first {SHOWN} of each network, a, b and c in the order of the table, with the '
            'classes that were asked for.'
        ),
        pictures={'Side by side': out / 'figures.png', 'Clips': out / 'samples.png'},
        tables={'Networks': [shown(row) for row in table]},
        config={'config': options.config, 'minutes': options.minutes},
    )


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    out, config = Path(options.out), load_config(options.config)
    if config.get('network', {}).get('name') != 'SpaceTimeUNet':
        raise Stop(f'{options.config} has no SpaceTimeUNet: configs/video_digits.py has one')
    if not config['evaluation'].get('clip_features'):
        raise Stop(f'{options.config} measures no clips: give it evaluation.clip_features')
    if options.data_dir:
        config['dataset']['data_dir'] = options.data_dir
    config['evaluation'] |= {'noise_levels': 1}  # no curve of them is drawn
    if options.num_samples:
        config['evaluation']['num_samples'] = options.num_samples
    check_same_study(out, {'config': config, 'minutes': options.minutes})
    wanted, table, names = parameters_of(config), [], []
    for way, changes in WAYS.items():
        network = as_large(config | {'network': config['network'] | changes}, wanted)
        names.append(way.replace(' ', '_'))
        table.append(row_of(way, network, 60 * options.minutes, out / names[-1]))
        print(f'  Frechet video distance {table[-1]["frechet_video_distance"]:.4g}', flush=True)
    write(out, table, names, options)
    print('\n'.join(str(shown(row)) for row in table) + f'\nwritten: {out}/report.md')
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/video_digits.py', help='default: %(default)s')
    parser.add_argument('--minutes', type=float, default=10.0, help='of training for each; default: %(default)s')
    parser.add_argument('--num_samples', type=int, default=0, help='clips of each; default: as the config says')
    parser.add_argument('--data_dir', default='', help='where the dataset lies; default: as the config says')
    parser.add_argument('--out', default='runs/temporal_downsampling', help='default: %(default)s')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        return compare(parse(argv))
    except (Stop, ConfigError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
