"""Draws a sampling plan as a picture, and prints it as a table.

    python experiments/plot_plan.py --solver=heun:coordinate=t --grid=uniform --num_steps=3 --schedule=flow
    python experiments/plot_plan.py --solver=runs/plan/plan.json

In row m of a plan the network is asked about x at time t_m, p x0 + q eps of its answer is remembered, and x and the
anchor become sums of x, the anchor, what is remembered (h0 is this row's answer, h1 the one before) and fresh noise z.
The picture shows

    top       where the network is asked, in time and in log-SNR
    left      the table itself: the coefficients of each row
    right     the same plan with the sums worked out: x after each row, as a sum of the first noise and of the network's
              estimates of the data, x0_0, x0_1, ...: a form in which all deterministic solvers can be compared

Into --out go plan.png and plan.txt.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from diffjax.build import ConfigError, make_plan
from diffjax.components import component
from diffjax.core import schedules
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import Plan
from diffjax.core.solvers.free_plans import unrolled
from diffjax.evaluation import markdown_table
from diffjax.plan_files import is_plan_file, read_plan

MOST_NUMBERS = 12  # rows and columns up to which the numbers stand in the cells
SHOWN_LOGSNR = 12.0  # beyond it, and at infinity, the axis ends
LARGE = 4.0  # coefficients beyond it need a logarithmic colour scale
ROUNDING = 1e-12
LEGEND = (
    'h0: the answer of this call, h1: of the one before, ...   z0: fresh noise   x0_j: estimate of the data by call j'
    '   red adds, blue takes away'
)


def columns(plan: Plan) -> list[str]:
    """Names of the table's columns."""
    remembered = [f'h{i}' for i in range(plan.num_remembered)]
    return ['x', 'anchor', *remembered, *(f'z{j}' for j in range(plan.num_noises))]


def compact(plan: Plan) -> Plan:
    """Without the rows that only pad the table."""
    return Plan(*(table[plan.live] for table in plan[:-1]), start=plan.start)


def formula(row: np.ndarray, names: list[str]) -> str:
    """'0.5 x + 0.5 h0'; a factor of 1 is not written."""
    terms = [(c, name) for c, name in zip(row, names) if c]
    text = ' '.join(f'{"-" if c < 0 else "+"} {"" if abs(c) == 1 else f"{abs(c):.4g} "}{name}' for c, name in terms)
    return text.removeprefix('+ ') or '0'


def table(plan: Plan, schedule: Schedule) -> str:
    """The plan as text, a line for each network call."""
    plan, names = compact(plan), columns(plan)
    anchor_stays = np.eye(len(names))[1]
    lines = [
        {
            'call': m,
            't': f'{t:.5g}',
            'log-SNR': f'{float(schedule.logsnr(np.float64(t))):.4g}',
            'remembers': formula(plan.remember[m], ['x0', 'eps']),
            'x becomes': formula(plan.to_x[m], names),
            'the anchor becomes': 'stays'
            if (plan.to_anchor[m] == anchor_stays).all()
            else formula(plan.to_anchor[m], names),
        }
        for m, t in enumerate(plan.t)
    ]
    return markdown_table(lines)


def draw_plan(path: Path, plan: Plan, schedule: Schedule, title: str) -> None:
    """The picture, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan = compact(plan)
    panels = tables(plan, schedule)
    widths = [max(values.shape[1], 2) for _, values, _ in panels]
    numbers = max(len(plan.t), *widths) <= MOST_NUMBERS
    cell = 0.62 if numbers else 0.3
    width = max(cell * sum(widths) + 0.9 * len(panels) + 1.6, 8.5)
    height = (0.36 if numbers else max(0.1, min(0.25, 6 / len(plan.t)))) * len(plan.t)
    figure = Figure(figsize=(width, height + 3.6), layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.9, height + 1.7])
    figure.suptitle(title, fontsize=12)
    draw_times(upper.subplots(2, 1), plan, schedule)
    axes, norm = lower.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0], colours(panels)
    for ax, (name, values, labels) in zip(axes, panels):
        draw_table(ax, name, values, labels, norm, numbers=numbers)
    draw_rows(axes[0], plan)
    lower.supxlabel(LEGEND, fontsize=8, color='0.35')
    figure.savefig(path, dpi=120)


def tables(plan: Plan, schedule: Schedule) -> list[tuple[str, np.ndarray, list[str]]]:
    """(title, values, column labels) of what stands side by side; columns that no row uses are left out."""
    names, stays = np.array(columns(plan)), np.eye(plan.to_x.shape[1])[1]
    used, used_by_anchor = plan.to_x.any(0), plan.to_anchor.any(0)
    panels = [('remembered', plan.remember, ['x0', 'eps']), ('x becomes', plan.to_x[:, used], list(names[used]))]
    if (plan.to_anchor != stays).any():
        panels.append(('the anchor becomes', plan.to_anchor[:, used_by_anchor], list(names[used_by_anchor])))
    if (schedule.sigma(plan.t) > 0).all():
        noisy = plan.to_x[:, 2 + plan.num_remembered :].any()
        title = f'so that x is, of the first noise{" (and not counting the fresh)" if noisy else ""}'
        labels = ['noise', *(f'x0_{j}' for j in range(len(plan.t)))]
        panels.append((f'{title}\nand of the estimates of the data', unrolled(schedule, plan), labels))
    return panels


def draw_times(axes, plan: Plan, schedule: Schedule) -> None:
    """Two lines from noise to data, with a mark where the network is asked."""
    ends = np.array([1.0, 0.0])
    logsnr, logsnr_ends = schedule.logsnr(plan.t), schedule.logsnr(ends)
    shown, shown_ends = (np.clip(values, -SHOWN_LOGSNR, SHOWN_LOGSNR) for values in (logsnr, logsnr_ends))
    lines = (axes[0], plan.t, ends, [], 'time t'), (axes[1], shown, shown_ends, logsnr_ends, 'log-SNR')
    for ax, values, (left, right), labels, name in lines:
        ax.plot([left, right], [0, 0], color='0.6', linewidth=1, zorder=0)
        ax.scatter(values, np.zeros(len(values)), s=28, color='C0', edgecolor='white', linewidth=0.6, zorder=2)
        if len(values) <= 2 * MOST_NUMBERS:
            label_marks(ax, values, right - left)
        margin = 0.03 * (right - left)
        ax.set(xlim=(left - margin, right + margin), ylim=(-0.6, 1.1), yticks=[])
        if len(labels):  # the ends are named, be they infinite or not
            inner = [x for x in range(-10, 11, 5) if left + 2 * margin < x < right - 2 * margin]
            named = [f'{x:.3g}'.replace('inf', '\N{INFINITY}') for x in labels]
            ax.set_xticks([left, *inner, right], [named[0], *map(str, inner), named[1]])
        ax.set_ylabel(name, rotation=0, ha='right', va='center', fontsize=10)
        ax.spines[:].set_visible(False)
        ax.tick_params(axis='x', labelsize=8)
    axes[0].set_title('where the network is asked: from noise (left) to data (right)', fontsize=10)


def label_marks(ax, values: np.ndarray, span: float) -> None:
    """The numbers of the calls above their marks; those at one place share a label."""
    groups = []
    for m, value in enumerate(values):
        if groups and abs(value - groups[-1][0]) < 0.012 * abs(span):
            groups[-1][1].append(m)
        else:
            groups.append((value, [m]))
    for value, calls in groups:
        ax.annotate(', '.join(map(str, calls)), (value, 0), (0, 6), textcoords='offset points', ha='center', fontsize=9)


def colours(panels: list):
    """One scale for all tables: red adds, blue takes away; where coefficients are large it is a logarithm's."""
    from matplotlib.colors import Normalize, SymLogNorm

    limit = max(1.0, *(float(np.abs(values).max()) for _, values, _ in panels))
    if limit <= LARGE:
        return Normalize(-1.8 * limit, 1.8 * limit)
    return SymLogNorm(1.0, vmin=-10 * limit, vmax=10 * limit)


def draw_table(ax, title: str, values: np.ndarray, labels: list[str], norm, *, numbers: bool) -> None:
    """A heat map, with its numbers where there is room."""
    ax.imshow(values, cmap='RdBu_r', norm=norm, aspect='auto')
    ax.set_title(title, fontsize=10)
    every = max(1, len(labels) // MOST_NUMBERS)
    ax.set_xticks(range(0, len(labels), every), labels[::every], fontsize=8)
    ax.set_yticks([])
    ax.set_xticks(np.arange(-0.5, len(labels)), minor=True)
    ax.set_yticks(np.arange(-0.5, len(values)), minor=True)
    ax.grid(which='minor', color='0.88', linewidth=0.6)
    ax.tick_params(which='both', length=0)
    ax.spines[:].set_color('0.85')
    if numbers:
        for (m, c), value in np.ndenumerate(values):
            if abs(value) > ROUNDING:
                ax.text(c, m, f'{value:.3g}', ha='center', va='center', fontsize=8)


def draw_rows(ax, plan: Plan) -> None:
    """The rows' numbers and times."""
    every = max(1, -(-len(plan.t) // 30))
    rows = range(0, len(plan.t), every)
    ax.set_yticks(
        rows, [f'{m}: t = {plan.t[m]:.3f}' if plan.t[m] > 0.01 else f'{m}: t = {plan.t[m]:.2g}' for m in rows]
    )
    ax.tick_params(axis='y', labelsize=8)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--solver', default='heun:coordinate=t', help='NAME:OPTION=VALUE or PATH.json; default: %(default)s'
    )
    parser.add_argument('--grid', default='uniform', help='default: %(default)s')
    parser.add_argument('--num_steps', type=int, default=3, help='default: %(default)s')
    parser.add_argument('--schedule', help='default: flow; of a file: its own')
    parser.add_argument('--out', default='runs/plot_plan', help='default: %(default)s')
    options = parser.parse_args(argv)
    if options.num_steps < 1:
        parser.error(f'--num_steps must be at least 1, got {options.num_steps}')
    return options


def main(argv: list[str] | None = None) -> Plan:
    options = parse(argv)
    try:
        record = read_plan(options.solver) if is_plan_file(options.solver) else None
        spec = options.schedule or (record.schedule if record else 'flow')
        schedule = component(schedules, spec, '--schedule')()
        plan = make_plan(schedule, options.solver, options.grid, options.num_steps)
    except (ConfigError, ValueError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')
    what = f'{options.solver} on {options.grid}, {options.num_steps} steps'
    if record:
        what = f'{options.solver}, made from {record.solver} on {record.grid}'
    title = f'{what}: {plan.num_evaluations} network calls on the schedule {type(schedule).__name__}'
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_plan(out / 'plan.png', plan, schedule, title)
    text = f'{title}\n\n{table(plan, schedule)}\n'
    (out / 'plan.txt').write_text(text, encoding='utf-8')
    print(f'{text}\nwritten: {out}/plan.png, {out}/plan.txt')
    return plan


if __name__ == '__main__':
    main()
