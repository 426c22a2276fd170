"""Ablations: any grid of config changes x seeds on one base config, to a table that says what is noise.

    python experiments/ablate.py --study=targets --out=runs/ablation_targets
    python experiments/ablate.py --config=configs/digits.py --vary target=v,velocity --vary schedule=flow,cosine \\
        --vary 'times=uniform:low=1e-3,high=0.9|logit_normal' --set training.num_steps=1000 --out=runs/ablation

A cell is one setting with one seed. Cells are trained one after the other, each in its own workdir under OUT/cells with
config.json, checkpoints, samples, figures.json and report.md. The same command again skips the cells that are finished
and goes on inside the one that is not, from its newest checkpoint. A cell whose config cannot be built is reported as
refused, and one whose loss becomes NaN as diverged, with the reason.

Values are separated by commas, or by | where a value holds commas itself. They are Python literals or else strings.

A setting is called worse than the best only where the difference exceeds the noise over seeds; the rule is in
ablation_report.py and in every report. The sampling seed of a cell is its training seed, so that the spread over seeds
is that of training and sampling together.

Into --out go report.md, cells.csv (a row for each cell), summary.csv (for each setting and figure) and ablation.png.
"""

import argparse
import ast
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ablation_report import draw_plot, name_of, write_report, write_tables
from absl import logging as absl_logging
from command_line import Stop
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from diffjax.build import ConfigError, build
from diffjax.data import make_iterator
from diffjax.restoring import sampling_params
from diffjax.results import finished, measure
from diffjax.training.loop import NonFiniteError, train
from diffjax.workdir import read_config, write_config

MIN_SEEDS = 3
CELLS_IN_MEMORY = 12  # whose programs stay loaded; the others' come back from the disk
HERE = Path(__file__).resolve().parent


class Cell(NamedTuple):
    """One setting with one seed."""

    setting: dict[str, Any]
    seed: int
    config: dict[str, Any]
    folder: Path


def split_change(text: str) -> tuple[str, list[Any]]:
    """'key=a,b' or 'key=a,1|b' -> (key, values): literals, or else strings."""
    key, equals, rest = text.partition('=')
    parts = [part.strip() for part in rest.split('|' if '|' in rest else ',') if part.strip()]
    if not (key.strip() and equals and parts):
        raise Stop(f'--vary takes KEY=VALUE,VALUE,... , got {text!r}')
    return key.strip(), [_literal(part) for part in parts]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the config with `{'a.b': value}` applied. Whether it makes sense is for `build` to say."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *path, last = key.split('.')
        place = config
        for name in path:
            if not isinstance(place, dict) or not isinstance(place.get(name), dict):
                raise Stop(f'{key}: the config has no section {name!r}; it has {", ".join(config)}')
            place = place[name]
        place[last] = value
    return config


def load_config(spec: str) -> dict[str, Any]:
    """FILE.py or FILE.py:ARGUMENT, looked for here and beside this folder."""
    name, _, argument = spec.partition(':')
    path = next((p for p in (Path(name), HERE.parent / name) if p.is_file()), None)
    if path is None:
        raise Stop(f'there is no config {name}')
    module_spec = importlib.util.spec_from_file_location('ablated_config', path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    try:
        return module.get_config(argument).to_dict()
    except ValueError as error:
        raise Stop(str(error)) from error


def make_cells(base: dict, vary: Mapping[str, list], seeds: Sequence[int], out: Path) -> list[Cell]:
    """Seed by seed, so that an unfinished study has every setting before it has any twice."""
    cells = []
    for seed, combination in itertools.product(seeds, itertools.product(*vary.values())):
        setting = dict(zip(vary, combination))
        config = changed(base, {**setting, 'seed': seed})
        trained = {key: value for key, value in config.items() if key not in ('sampler', 'evaluation')}
        digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r'[^\w.=+-]+', '_', '-'.join(str(value) for value in combination))[:80]
        cells.append(Cell(setting, seed, config, out / 'cells' / f'{name}-seed{seed}-{digest}'))
    return cells


def refusals(cells: Sequence[Cell]) -> dict[str, str]:
    """{setting: reason} of what cannot be built; looked at before anything is trained."""
    reasons, settings = {}, {name_of(cell.setting): cell for cell in cells}
    for name, cell in tqdm(settings.items(), desc='checking', unit='setting', dynamic_ncols=True, disable=None):
        try:
            build(cell.config)
        except ValueError as error:
            reasons[name] = ' '.join(str(error).split())
    return reasons


def outcome(cell: Cell) -> dict[str, Any] | None:
    """What is there of a finished cell: status, reason, seconds, figures. None where there is work to do."""
    path = cell.folder / 'cell.json'
    if not path.exists() or read_config(cell.folder) != cell.config:
        return None
    found = json.loads(path.read_text())
    if found['status'] == 'done':
        if not finished(cell.folder, cell.config['training']['num_steps']):
            return None
        figures = json.loads((cell.folder / 'figures.json').read_text())
        found |= {key: value for key, value in figures.items() if isinstance(value, int | float) and key != 'seed'}
    return found


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains (from the cell's newest checkpoint on, if there is one), samples and measures."""
    began = time.monotonic()
    experiment = build(cell.config)
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / 'cell.json').unlink(missing_ok=True)
    write_config(cell.folder, cell.config)
    iterator = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=cell.seed)
    note = {'status': 'done', 'reason': ''}
    try:
        result = train(experiment.trainer(), iterator, cell.folder, announce=lambda text: None)
        if result.stopped:
            raise Stop(f'stopped at step {result.step} of {cell.folder.name}; the same command goes on from there')
        params = sampling_params(experiment, result.state)
        measure(experiment, params, cell.folder, result.step, seed=cell.seed, progress=False)
    except NonFiniteError as error:
        note = {'status': 'diverged', 'reason': str(error)}
    part = cell.folder / 'cell.part'
    part.write_text(json.dumps({**note, 'seconds': time.monotonic() - began}) + '\n')
    os.replace(part, cell.folder / 'cell.json')
    return outcome(cell)


def run_cells(cells: Sequence[Cell], reasons: Mapping[str, str], figures: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each cell: its setting, seed, status, reason, seconds and figures."""
    rows, spent, todo = [], [], [c for c in cells if name_of(c.setting) not in reasons and outcome(c) is None]
    for number, cell in enumerate(cells, 1):
        name = name_of(cell.setting)
        found, trained = {'status': 'refused', 'reason': reasons.get(name, ''), 'seconds': 0.0}, False
        if name not in reasons:
            found = outcome(cell)
            trained = found is None
            found = run_cell(cell) if trained else found
        rows.append({**cell.setting, 'seed': cell.seed, **found})
        if found['status'] == 'done' and (unknown := [f for f in figures if f not in found]):
            raise Stop(f'--figures: no figure {unknown[0]!r}; valid: {", ".join(list(found)[3:])}')
        if trained:
            spent.append(found['seconds'])
            if len(spent) % CELLS_IN_MEMORY == 0:
                jax.clear_caches()
            eta = np.mean(spent) * (len(todo) - len(spent))
            shown = ', '.join(f'{f} {found[f]:.3g}' for f in figures if f in found) or found['status']
            clock = f'{found["seconds"]:.1f} s, ETA {int(eta // 60)}:{int(eta % 60):02d}'
            print(f'[{number}/{len(cells)}] {name}, seed {cell.seed}: {shown}   ({clock})', flush=True)
    return rows


@contextmanager
def compiled_programs_kept(folder: Path):
    """XLA programs are kept in a folder: what seeds, and settings with the same network, share is compiled once."""
    settings = {
        'jax_compilation_cache_dir': str(folder),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', help='base config, FILE.py or FILE.py:ARGUMENT')
    parser.add_argument('--study', help='a study that ships with this folder, or a JSON file like studies/targets.json')
    parser.add_argument('--vary', action='append', default=[], metavar='KEY=VALUE,...', help='a key and its values')
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='a change in every cell')
    parser.add_argument('--seeds', default='0,1,2', help='default: %(default)s; at least 3 without --smoke')
    parser.add_argument('--figures', default='frechet_ratio,class_accuracy', help='default: %(default)s')
    parser.add_argument('--out', default='runs/ablation', help='default: %(default)s')
    parser.add_argument('--smoke', action='store_true', help="the config's argument smoke, and any number of seeds")
    parser.add_argument('--check', action='store_true', help='say which settings can be built, and train nothing')
    return parser.parse_args(argv)


def plan_study(options) -> dict[str, Any]:
    """The study that the options describe: title, about, config, vary, common, budget, seeds, figures."""
    study = {'title': 'Ablation', 'about': '', 'config': options.config, 'vary': {}, 'common': {}, 'budget': {}}
    if options.study:
        path = next((p for p in (Path(options.study), HERE / 'studies' / f'{options.study}.json') if p.is_file()), None)
        if path is None:
            names = ', '.join(sorted(p.stem for p in (HERE / 'studies').glob('*.json')))
            raise Stop(f'--study: no study {options.study!r}; there are: {names}')
        study |= json.loads(path.read_text())
        study['config'] = options.config or study['config']
    if not study['config']:
        raise Stop('--config or --study is needed')
    study['vary'] |= dict(split_change(text) for text in options.vary)
    if not study['vary']:
        raise Stop('nothing varies: give --vary KEY=VALUE,VALUE')
    if options.smoke:
        study |= {'config': f'{study["config"].partition(":")[0]}:smoke', 'budget': {}}
    for text in options.set:
        key, equals, value = text.partition('=')
        if not equals:
            raise Stop(f'--set takes KEY=VALUE, got {text!r}')
        study['budget'][key.strip()] = _literal(value.strip())
    try:
        seeds = [int(seed) for seed in options.seeds.split(',')]
    except ValueError:
        raise Stop(f'--seeds are whole numbers with commas between them, got {options.seeds!r}') from None
    if len(set(seeds)) < len(seeds) or (len(seeds) < MIN_SEEDS and not options.smoke):
        raise Stop(f'--seeds: at least {MIN_SEEDS} different ones (fewer say nothing of noise), got {options.seeds}')
    return study | {'seeds': seeds, 'figures': [f.strip() for f in options.figures.split(',')]}


def ablate(options) -> list[dict[str, Any]]:
    study, out = plan_study(options), Path(options.out)
    base = changed(load_config(study['config']), {**study['common'], **study['budget']})
    cells = make_cells(base, study['vary'], study['seeds'], out)
    reasons = refusals(cells)
    settings = len(cells) // len(study['seeds'])
    print(f'{settings} settings x {len(study["seeds"])} seeds; {len(reasons)} settings refused')
    for name, reason in reasons.items():
        print(f'refused: {name}: {reason}')
    if len(reasons) == settings:
        raise Stop('no setting can be built')
    if options.check:
        return []
    with compiled_programs_kept(out / 'compiled'):
        rows = run_cells(cells, reasons, study['figures'])
    if not any(row['status'] == 'done' for row in rows):
        raise Stop(f'no cell came to its end; the first: {next(r["reason"] for r in rows if r["reason"])}')
    keys = list(study['vary'])
    write_tables(out, rows, keys, study['figures'])
    draw_plot(out / 'ablation.png', rows, keys, study['figures'])
    print('\n' + write_report(out, study, rows, keys, study['figures']) + f'\nwritten: {out}/report.md')
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        return ablate(parse(argv))
    except (Stop, ConfigError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
