"""Pictures of the benchmarks: a roofline, and what steps cost as work grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

MARKERS = 'osD^vP*X'


def plain_numbers(axis) -> None:
    """1, 2, 5, 10, ... instead of powers, of which short axes have too few."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axis.set_minor_formatter(NullFormatter())


def draw_roofline(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """TFLOP/s of training steps against FLOPs for each byte that they must move, below what this run has measured."""
    rows = [row for row in rows if row['what'] == 'train']
    figure = Figure(figsize=(7.2, 5.0), layout='constrained')
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    roofs = {(row['dtype'], row['peak, TFLOP/s'], row['copy, GB/s']) for row in rows}
    near = [row['FLOPs'] / row['bytes'] for row in rows] + [1e3 * peak / copy for _, peak, copy in roofs]
    x = np.geomspace(min(near, default=1) / 4, max(near, default=1) * 4, 200)
    for dtype, peak, copy in sorted(roofs):
        ax.plot(x, np.minimum(peak, copy * x / 1e3), color='0.35', lw=1.4)
        ax.annotate(
            f'{dtype}: {peak:.4g} TFLOP/s', (x[-1], peak), xytext=(-4, 5), textcoords='offset points', ha='right'
        )
        ax.annotate(f'{copy:.4g} GB/s', (x[0], copy * x[0] / 1e3), xytext=(8, 4), textcoords='offset points')
    for i, row in enumerate(rows):
        label = f'{row["model"]}, batch {row["batch"]}' + ('' if row['by'] == 'diffjax' else f', {row["by"]}')
        ax.plot(
            row['FLOPs'] / row['bytes'],
            row['TFLOP/s'],
            MARKERS[i % len(MARKERS)],
            ms=8,
            label=f'{label}: {row["MFU"]:.0%}',
        )
    ax.set(xscale='log', yscale='log', xlabel='FLOPs for each byte of products and state (least)', ylabel='TFLOP/s')
    ax.set_title(f'{rows[0]["device"]}: training steps, MFU' if rows else '', fontsize=11)
    plain_numbers(ax.xaxis), plain_numbers(ax.yaxis)
    ax.set_ylim(top=1.4 * max((peak for _, peak, _ in roofs), default=1))
    ax.grid(alpha=0.25, which='both', lw=0.5)
    if rows:
        ax.legend(fontsize=8, loc='lower right')
    figure.savefig(path, dpi=110)
    return path


def draw_growth(path: Path, rows: Sequence[Mapping[str, Any]], slopes: Sequence[Mapping[str, Any]]) -> Path:
    """Seconds of a step against what grows, and of compiling against depth: a panel each, with the fitted powers."""
    powers = {row['line']: row['slope of seconds'] for row in slopes}
    panels = {
        line: [line] for line in dict.fromkeys(row['line'] for row in rows) if line not in ('scanned', 'unrolled')
    }
    if len(panels) < len({row['line'] for row in rows}):
        panels['depth, compiling'] = ['scanned', 'unrolled']
    figure = Figure(figsize=(3.4 * len(panels), 3.3), layout='constrained')
    FigureCanvasAgg(figure)
    for ax, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for i, line in enumerate(lines):
            here = [row for row in rows if row['line'] == line]
            label = f'{line}: power {powers[line]:.2f}' if line in powers else line
            ax.plot([row['n'] for row in here], [row['seconds'] for row in here], f'-{MARKERS[i]}', label=label)
        ax.set(xscale='log', yscale='log', xlabel=title)
        ticks = sorted({row['n'] for row in rows if row['line'] in lines})
        ax.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        ax.set_xticks([], minor=True)
        plain_numbers(ax.yaxis)
        ax.grid(alpha=0.25, which='both', lw=0.5)
        ax.legend(fontsize=8)
    figure.supylabel('seconds')
    figure.savefig(path, dpi=110)
    return path
