"""What an ablation's cells say: means, deviations, verdicts only beyond the noise, a table, a plot.

The rule, for each figure: the setting with the best mean over seeds is compared with every other one by Welch's
two-sided t-test, and the p values are corrected for the number of comparisons (Holm 1979). Only p < 0.05 is called
worse; everything else is "no difference beyond noise". Main effects follow the same rule, with one value for each
level and seed: the mean over all settings of the other keys.

A row is a dict: the value of each key that was varied, `seed`, `status` ('done', 'refused', 'diverged'), `reason`,
`seconds`, and for a cell that is done its figures.
"""

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.evaluation import markdown_table

BETTER = {'class_accuracy': 'higher', 'precision': 'higher', 'recall': 'higher'} | dict.fromkeys(
    ('frechet_distance', 'frechet_ratio', 'memorised_fraction', 'seconds_per_sample'), 'lower'
)  # other figures get a mean and a deviation, but no verdict
SIGNIFICANCE = 0.05
RULE = (
    "Mean ± standard deviation over seeds. The best mean is compared with every other one by Welch's t-test, corrected "
    f'for the number of comparisons (Holm); only p < {SIGNIFICANCE} is called worse, all else is no difference beyond '
    'noise. With few seeds that is a coarse sieve: not every "no difference" is equality.'
)


class Verdict(NamedTuple):
    """A group of runs beside the best group."""

    num: int
    mean: float
    std: float  # with num - 1; NaN for a single run
    p: float  # corrected; NaN for the best itself and where it cannot be told
    text: str


def name_of(setting: Mapping[str, Any]) -> str:
    return ', '.join(f'{key}={value}' for key, value in setting.items())


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p value of Welch's t-test; NaN for fewer than two values; 0 or 1 where nothing varies."""
    from scipy.stats import ttest_ind

    if min(len(a), len(b)) < 2:
        return float('nan')
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return float(a[0] == b[0])
    return float(ttest_ind(a, b, equal_var=False).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): the i-th smallest of n times n - i, made monotone; i = 0, ..."""
    order, corrected, running = np.argsort(p), [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = running
    return corrected


def judge(groups: Mapping[Any, Sequence[float]], better: str | None) -> dict[Any, Verdict]:
    """The rule at the top of this file. `better`: 'higher', 'lower', or None for no verdict."""
    means = {name: float(np.mean(values)) for name, values in groups.items()}
    best = None if better is None else (max if better == 'higher' else min)(means, key=means.get)
    others = [name for name in groups if name != best]
    p = dict.fromkeys(groups, float('nan'))
    if best is not None:
        raw = {name: welch(groups[best], groups[name]) for name in others}
        known = [name for name in others if np.isfinite(raw[name])]
        p |= dict(zip(known, holm([raw[name] for name in known])))
    verdicts = {}
    for name, values in groups.items():
        std = float(np.std(values, ddof=1)) if len(values) > 1 else float('nan')
        if best is None or len(groups) < 2:
            text = ''
        elif name == best:
            text = 'best mean'
        elif np.isnan(p[name]):
            text = 'too few runs to tell'
        else:
            text = f'worse (p = {p[name]:.2g})' if p[name] < SIGNIFICANCE else 'no difference beyond noise'
        verdicts[name] = Verdict(len(values), means[name], std, p[name], text)
    return verdicts


def by_setting(rows: Sequence[dict], keys: Sequence[str], figure: str) -> dict[tuple, list[float]]:
    """{values of the keys: the figure of each finished seed}."""
    groups = {}
    for row in rows:
        if row['status'] == 'done':
            groups.setdefault(tuple(row[key] for key in keys), []).append(row[figure])
    return groups


def main_effect(rows: Sequence[dict], keys: Sequence[str], key: str, figure: str) -> dict[Any, list[float]]:
    """{level of `key`: for each seed the mean over the other keys}, over combinations that every level and seed has."""
    values = {
        (row[key], row['seed'], tuple(row[k] for k in keys if k != key)): row[figure]
        for row in rows
        if row['status'] == 'done'
    }
    levels, seeds, others = (list(dict.fromkeys(column)) for column in zip(*values)) if values else ([], [], [])
    whole = [o for o in others if all((level, seed, o) in values for level in levels for seed in seeds)]
    if not whole:
        return {}
    return {level: [float(np.mean([values[level, seed, o] for o in whole])) for seed in seeds] for level in levels}


def summarise(rows: list[dict], keys: list[str], figures: list[str]) -> dict[str, dict[tuple, Verdict]]:
    """{figure: {setting: verdict}}."""
    return {figure: judge(by_setting(rows, keys, figure), BETTER.get(figure)) for figure in figures}


def setting_table(summary: Mapping[str, Mapping[tuple, Verdict]], keys: list[str]) -> list[dict]:
    """A row for each setting, the best by the first figure first."""
    first = next(iter(summary))
    order = list(summary[first])
    if first in BETTER:
        order.sort(key=lambda name: summary[first][name].mean, reverse=BETTER[first] == 'higher')
    table = []
    for name in order:
        line = dict(zip(keys, name)) | {'seeds': summary[first][name].num}
        for figure, verdicts in summary.items():
            verdict = verdicts[name]
            line |= {figure: f'{verdict.mean:.4g} ± {verdict.std:.2g}', f'{figure}, verdict': verdict.text}
        table.append(line)
    return table


def write_report(out: Path, study: dict, rows: list[dict], keys: list[str], figures: list[str]) -> str:
    """report.md, and its text."""
    count = {status: [r for r in rows if r['status'] == status] for status in ('done', 'refused', 'diverged')}
    summary = summarise(rows, keys, figures)
    seeds = list(dict.fromkeys(row['seed'] for row in rows))
    minutes = sum(row['seconds'] for row in rows) / 60
    changes = {**study['common'], **study['budget']}
    parts = [
        f'# {study["title"]}',
        study['about'],
        f'{len(count["done"])} cells of {study["config"]} with seeds {", ".join(map(str, seeds))}, '
        f'{len(count["refused"])} refused, {len(count["diverged"])} diverged; {minutes:.1f} minutes of '
        f'{jax.device_count()} x {jax.devices()[0].device_kind}.',
        'In every cell: ' + ', '.join(f'`{key}={value}`' for key, value in changes.items()) if changes else '',
        RULE,
        '## Settings',
        markdown_table(setting_table(summary, keys)),
        '![figures of every setting](ablation.png)',
    ]
    for key in keys if len(keys) > 1 else []:
        effects = {f: main_effect(rows, keys, key, f) for f in figures}
        if all(effects.values()):
            judged = {f: judge({(k,): v for k, v in e.items()}, BETTER.get(f)) for f, e in effects.items()}
            parts += [f'## {key}, the other keys averaged out', markdown_table(setting_table(judged, [key]))]
    for status in ('refused', 'diverged'):
        for reason in dict.fromkeys((name_of({k: r[k] for k in keys}), r['reason']) for r in count[status]):
            parts.append(f'{status}: {reason[0]}: {reason[1]}')
    text = '\n\n'.join(part for part in parts if part) + '\n'
    (out / 'report.md').write_text(text)
    return text


def write_tables(out: Path, rows: list[dict], keys: list[str], figures: list[str]) -> None:
    """cells.csv and summary.csv."""
    lines = [
        {**dict(zip(keys, name)), 'figure': figure, **verdict._asdict()}
        for figure, verdicts in summarise(rows, keys, figures).items()
        for name, verdict in verdicts.items()
    ]
    for path, table in ((out / 'cells.csv', rows), (out / 'summary.csv', lines)):
        with open(path, 'w', newline='') as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)))
            writer.writeheader()
            writer.writerows(table)


def draw_plot(path: Path, rows: list[dict], keys: list[str], figures: list[str]) -> None:
    """Mean, one standard deviation to each side, and every seed: the first key along x, the last one in colour, those
    between as columns, figures as rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = {key: list(dict.fromkeys(str(row[key]) for row in rows)) for key in keys}
    middle = list(itertools.product(*(levels[key] for key in keys[1:-1])))
    hues = levels[keys[-1]] if len(keys) > 1 else ['']
    figure = Figure(figsize=(max(3.2 * len(middle), 5) + 1.2, 2.8 * len(figures) + 0.4), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(figures), len(middle), sharex=True, sharey='row', squeeze=False)
    for line, name in zip(axes, figures):
        groups = {tuple(map(str, k)): v for k, v in by_setting(rows, keys, name).items()}
        means = [np.mean(values) for values in groups.values()]
        for ax, panel in zip(line, middle):
            for i, hue in enumerate(hues):
                shift = (i - (len(hues) - 1) / 2) * 0.7 / len(hues)
                for x, level in enumerate(levels[keys[0]]):
                    values = groups.get((level, *panel, hue) if len(keys) > 1 else (level,), [])
                    if values:
                        std = np.std(values, ddof=1) if len(values) > 1 else 0
                        ax.errorbar(x + shift, np.mean(values), std, fmt='o', ms=5, capsize=3, color=f'C{i}')
                        ax.plot([x + shift + 0.04] * len(values), values, 'o', ms=2, color=f'C{i}', alpha=0.6)
                ax.plot([], [], 'o', color=f'C{i}', label=f'{keys[-1]} = {hue}')
            if name == figures[0]:
                ax.set_title(', '.join(f'{k} = {v}' for k, v in zip(keys[1:-1], panel)), fontsize=10)
            ax.set_xticks(range(len(levels[keys[0]])), levels[keys[0]])
            ax.grid(alpha=0.25)
            ax.spines[['top', 'right']].set_visible(False)
            if min(means) > 0 and max(means) > 10 * min(means):
                ax.set_yscale('log')
        better = f' ({BETTER[name]} is better)' if name in BETTER else ''
        line[0].set_ylabel(name.replace('_', ' ') + better, fontsize=9)
    figure.supxlabel(keys[0], fontsize=10)
    if len(keys) > 1:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
