"""Tables and pictures of a comparison of samplers, from the rows of its CSV."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from diffjax.evaluation import markdown_table

OURS = 'diffjax'
FAMILIES = {  # the colour of a solver; the longest prefix counts
    'ddpm': 0, 'ddim': 0, 'euler': 0, 'heun': 1, 'dpm2': 1, 'rk4': 1, 'edm': 1, 'restart': 1, 'lms': 2, 'pndm': 2,
    'deis': 2, 'dpm_solver': 3, 'dpmpp': 4, 'unipc': 5, 'sa_solver': 6, 'euler_maruyama': 7,
}  # fmt: skip


def best_of_grids(rows: list[dict], column: str = 'error') -> dict[tuple[str, str], dict[int, dict]]:
    """{(source, solver): {budget: the row of the grid with the lowest error}}."""
    best = {}
    for row in rows:
        line = best.setdefault((row['source'], row['solver']), {})
        if np.isfinite(row[column]) and row[column] < line.get(row['budget'], {column: np.inf})[column]:
            line[row['budget']] = row
    return best


def solver_table(rows: list[dict], budgets: list[int], unit: str) -> str:
    """For each solver one row, for each budget its lowest error over the grids; * marks the distribution's."""
    lines = []
    for (source, solver), line in best_of_grids(rows).items():
        cells = {'solver': solver if source == OURS else f'{source}: {solver}'}
        for budget in budgets:
            row = line.get(budget)
            star = '*' if row and row['error_kind'] == 'distribution' else ''
            cells[f'{budget} {unit}'] = f'{row["error"]:.3g}{star} ({row["grid"]})' if row else '-'
        lines.append(cells)
    return markdown_table(lines)


def budget_table(rows: list[dict], budgets: list[int], unit: str) -> str:
    """The lowest error at each budget, ours and where there are references theirs, of errors to an end point."""
    lines = []
    for budget in budgets:
        within = [r for r in rows if r['error_kind'] != 'distribution' and r['budget'] == budget]
        within = [r for r in within if np.isfinite(r['error'])]
        line = {unit: str(budget)}
        for title, mine in (('best here', True), ('best reference', False)):
            if some := [r for r in within if (r['source'] == OURS) == mine]:
                best = min(some, key=lambda r: r['error'])
                source = '' if mine else f'{best["source"]} '
                line |= {title: f'{source}{best["solver"]}, {best["grid"]}', f'{title}: error': best['error']}
        if len(line) == 5:
            line['their error / ours'] = f'{line["best reference: error"] / line["best here: error"]:.1f}'
        lines.append({k: f'{v:.3g}' if isinstance(v, float) else v for k, v in line.items()})
    return markdown_table([line for line in lines if len(line) > 1])


def draw_errors(path: Path, rows: list[dict], column: str, ylabel: str, floors: dict[str, float]) -> None:
    """Error against evaluations: a panel for each schedule, a labelled line for each solver, its best grid at each
    number of evaluations. References are grey, the lowest of them dashed.
    """
    schedules = list(dict.fromkeys(row['schedule'] for row in rows))
    width = min(len(schedules), 2)
    height = -(-len(schedules) // width)
    figure = Figure(figsize=(7.6 * width, 6.4 * height), layout='constrained')
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(height, width, squeeze=False).flat)
    for ax, name in zip(axes, schedules):
        here = [row for row in rows if row['schedule'] == name]
        _panel(ax, best_of_grids(here, column), column, floors.get(name))
        ax.set_title(name, fontsize=11)
        ax.set_xlabel('network evaluations')
        ax.set_ylabel(ylabel)
    for ax in axes[len(schedules) :]:
        ax.set_axis_off()
    figure.savefig(path, dpi=110)


def _panel(ax, lines: dict, column: str, floor: float | None) -> None:
    ends, theirs = [], {}
    specs = [solver for source, solver in lines if source == OURS]
    for (source, solver), line in lines.items():
        points = sorted((row['num_evaluations'], row[column]) for row in line.values())
        if not points:
            continue
        if source != OURS:
            ax.plot(*zip(*points), color='0.8', linewidth=0.7, zorder=1)
            for budget, row in line.items():
                theirs[budget] = min(theirs.get(budget, (np.inf,)), (row[column], row['num_evaluations']))
            continue
        style = look(solver, specs)
        ax.plot(*zip(*points), linewidth=1.3, zorder=2, **style)
        ends.append((points[-1][1], solver, style['color']))
    if theirs:
        points = sorted((n, e) for e, n in theirs.values())
        ax.plot(*zip(*points), color='k', linewidth=1.8, linestyle='--', zorder=3)
        ends.append((points[-1][1], 'best of the references', 'k'))
    ax.set(xscale='log', yscale='log')
    if floor is not None:  # before the names are placed: it may move the axis
        ax.axhline(floor, color='0.4', linewidth=1, linestyle=(0, (4, 3)))
        ax.text(0.01, floor, 'perfect samples ', fontsize=7, va='bottom', transform=ax.get_yaxis_transform())
    ticks = sorted({n for line in lines.values() for n in line})
    ax.set_xticks(ticks, ticks)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)
    _label_ends(ax, ends)


def _label_ends(ax, ends: list[tuple[float, str, Any]]) -> None:
    """Names at the right of the panel, in the order of the lines' ends and far enough apart to be read."""
    low, high = np.log(ax.get_ylim())
    gap = min(0.026, 1 / max(len(ends), 1))
    ends = sorted(ends)
    wanted = np.array([(np.log(y) - low) / (high - low) for y, _, _ in ends])
    places = wanted.copy()
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places -= max(places[-1] - 1.0, 0.0) if len(places) else 0.0
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    for (_, name, color), place, at in zip(ends, places, wanted):
        ax.plot([1.0, 1.025], [at, place], color=color, linewidth=0.6, transform=ax.transAxes, clip_on=False)
        ax.text(1.03, place, name, fontsize=7, color=color, va='center', transform=ax.transAxes)


def look(spec: str, specs: list[str]) -> dict[str, Any]:
    """A family has its colour, in every plot the same; its members differ in line and marker."""
    alike = [s for s in specs if family(s) == family(spec)]
    i = alike.index(spec)
    return {
        'color': colormaps['tab10'](family(spec)),
        'linestyle': ('-', '--', ':', '-.')[i % 4],
        'marker': 'osD^vP*X'[(i // 2) % 8],
        'markersize': 3.5,
    }


def family(spec: str) -> int:
    """The number of a solver's colour; 8 for the few that belong to no family."""
    prefixes = [prefix for prefix in FAMILIES if spec.startswith(prefix)]
    return FAMILIES[max(prefixes, key=len)] if prefixes else 8


def draw_trajectories(path: Path, mixture, panels: list[tuple[str, np.ndarray]]) -> None:
    """Paths [M, P, 2] over the mixture's density, one panel for each (title, paths)."""
    width = min(len(panels), 4)
    height = -(-len(panels) // width)
    figure = Figure(figsize=(3.3 * width, 3.5 * height), layout='constrained')
    FigureCanvasAgg(figure)
    side = np.linspace(-3.2, 3.2, 161)
    x, y = np.meshgrid(side, side)
    density = np.exp(mixture.log_density(np.stack([x.ravel(), y.ravel()], -1))).reshape(x.shape)
    axes = list(figure.subplots(height, width, squeeze=False).flat)
    for ax, (title, paths) in zip(axes, panels):
        ax.contourf(x, y, np.sqrt(density), levels=12, cmap='Blues', zorder=0)
        for i in range(paths.shape[1]):
            color = colormaps['plasma'](i / max(paths.shape[1] - 1, 1) * 0.85)
            ax.plot(*paths[:, i].T, '.-', color=color, linewidth=0.7, markersize=2.2)
            ax.plot(*paths[-1, i], 'o', color=color, markersize=4, markeredgecolor='k', markeredgewidth=0.4)
        ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[], aspect='equal')
        ax.set_title(title, fontsize=9)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.savefig(path, dpi=110)
