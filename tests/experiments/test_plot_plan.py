"""Pictures of plans: words that say what the numbers say, sums worked out right, files drawn like any other plan."""

import re

import numpy as np
import pytest

from diffjax.core import schedules, solvers
from diffjax.core.sampling import pad
from diffjax.core.solvers.plan_records import PlanRecord, describe
from diffjax.plan_files import write_plan

FLOW = schedules.Flow()


def size_of(path):
    """(width, height) as a PNG's header states them."""
    data = path.read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    return int.from_bytes(data[16:20], 'big'), int.from_bytes(data[20:24], 'big')


def test_heun_in_words(experiment, tmp_path, capsys):
    """Two steps on the straight line, by hand: predict from t = 1 to 1/2, correct with both slopes, land."""
    plan = experiment('plot_plan').main(
        ['--solver=heun:coordinate=t', '--grid=uniform', '--num_steps=2', f'--out={tmp_path}']
    )
    assert plan.num_evaluations == 3
    text = (tmp_path / 'plan.txt').read_text()
    assert '3 network calls on the schedule Flow' in text and text in capsys.readouterr().out
    lines = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith(('| 0', '| 1', '| 2'))]
    assert lines == [
        ['0', '1', '-inf', '- x0 + eps', 'x - 0.5 h0', 'x'],
        ['1', '0.5', '0', '- x0 + eps', 'anchor - 0.25 h0 - 0.25 h1', 'stays'],
        ['2', '0.5', '0', '- x0 + eps', 'x - 0.5 h0', 'x'],
    ]
    assert min(size_of(tmp_path / 'plan.png')) > 400


def test_every_number_of_the_table_is_in_the_words(experiment):
    """Read back with a regular expression, for a plan that uses every column."""
    plan = solvers.sa_solver(schedules.Cosine(), [1.0, 0.7, 0.4, 0.2, 0.0])
    module = experiment('plot_plan')
    names = module.columns(plan)
    assert names[:2] == ['x', 'anchor'] and names[-plan.num_noises :] == [f'z{j}' for j in range(plan.num_noises)]
    for row in plan.to_x:
        words = module.formula(row, names)
        found = dict.fromkeys(names, 0.0)
        for sign, number, name in re.findall(r'(-?) ?(?:([\d.e-]+) )?([a-z]\w*)', words.replace('+ ', '')):
            found[name] = (-1 if sign else 1) * float(number or 1)
        np.testing.assert_allclose([found[name] for name in names], row, rtol=1e-3)
    assert module.formula(np.zeros(4), names) == '0'


def test_the_right_hand_table_is_the_plan_worked_out(experiment):
    """DDIM by hand at t = 1, 0.5, 0.25, 0: from t to s it is x_s = s/t x_t + (1 - s/t) x0."""
    module = experiment('plot_plan')
    plan = solvers.ddim(FLOW, [1.0, 0.5, 0.25, 0.0])
    title, values, labels = module.tables(plan, FLOW)[-1]
    assert 'estimates' in title and labels == ['noise', 'x0_0', 'x0_1', 'x0_2']
    np.testing.assert_allclose(values, [[0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0, 0, 0, 1]], atol=1e-12)
    names = [panel[0] for panel in module.tables(plan, FLOW)]
    assert names[:2] == ['remembered', 'x becomes'] and 'the anchor becomes' not in names
    assert 'the anchor becomes' in [panel[0] for panel in module.tables(solvers.heun(FLOW, [1.0, 0.5, 0.0]), FLOW)]
    noisy = module.tables(solvers.ddpm(FLOW, [1.0, 0.5, 0.0]), FLOW)
    assert noisy[1][2][-1] == 'z0' and 'not counting the fresh' in noisy[-1][0]
    rising = solvers.euler(FLOW, [0.0, 0.5, 0.9], coordinate='t')
    assert len(module.tables(rising, FLOW)) == 2  # at sigma = 0 an estimate of x0 says nothing about eps


def test_rows_that_only_pad_are_not_drawn(experiment):
    module, plan = experiment('plot_plan'), solvers.ddim(FLOW, [1.0, 0.5, 0.0])
    for mine, theirs in zip(module.compact(pad(plan, 7, 1, 0)), plan):
        np.testing.assert_array_equal(mine, theirs)
    assert module.table(pad(plan, 7, 1, 0), FLOW) == module.table(plan, FLOW)


def test_a_file_is_drawn_on_its_own_schedule(experiment, tmp_path, capsys):
    schedule, path = schedules.VP(beta_max=15.0), tmp_path / 'mine.json'
    plan = solvers.dpmpp_2m(schedule, [1.0, 0.6, 0.2, 0.0])
    write_plan(path, PlanRecord(plan, describe(schedule), 'dpmpp_2m', 'by hand', {}))
    drawn = experiment('plot_plan').main([f'--solver={path}', f'--out={tmp_path}'])
    np.testing.assert_array_equal(drawn.to_x, plan.to_x)
    printed = capsys.readouterr().out
    assert 'made from dpmpp_2m on by hand: 3 network calls on the schedule VP' in printed
    assert f'{float(schedule.logsnr(np.float64(0.6))):.4g}' in printed


@pytest.mark.parametrize(
    'solver, grid, steps, schedule',
    [('ddpm', 'karras', 3, 'edm'), ('unipc', 'uniform', 40, 'linear'), ('ddim', 'uniform', 1, 'flow')],
)
def test_all_sizes_and_kinds_can_be_drawn(experiment, tmp_path, solver, grid, steps, schedule):
    """Noise, large coefficients, many rows, a single one."""
    arguments = [f'--solver={solver}', f'--grid={grid}', f'--num_steps={steps}', f'--schedule={schedule}']
    experiment('plot_plan').main([*arguments, f'--out={tmp_path}'])
    width, height = size_of(tmp_path / 'plan.png')
    assert 900 < width < 4000 and 300 < height < 2500


def test_mistakes_are_one_line(experiment, tmp_path):
    main = experiment('plot_plan').main
    path = tmp_path / 'mine.json'
    write_plan(path, PlanRecord(solvers.ddim(FLOW, [1.0, 0.0]), describe(FLOW), 'ddim', '', {}))
    for arguments, message in (
        (['--solver=heum'], 'did you mean heun'),
        (['--grid=log'], 'valid: '),
        (['--schedule=flaw'], 'did you mean Flow'),
        (['--solver=missing.json'], 'missing.json cannot be read'),
        ([f'--solver={path}', '--schedule=cosine'], 'was made for the schedule Flow'),
    ):
        with pytest.raises(SystemExit, match='error: .*' + message) as caught:
            main([*arguments, f'--out={tmp_path / "out"}'])
        assert '\n' not in str(caught.value)
