"""Plans as data: what was written is read bit for bit, and what is no plan is refused in one line."""

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.core import schedules, solvers
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import Plan
from diffjax.core.solvers.plan_records import PlanRecord, check_schedule, describe, from_data, to_data

finite = st.floats(allow_nan=False, allow_infinity=False)


def data(**changes):
    """A plan of Heun's on three steps, as JSON gives it; 'plan.t' changes an array."""
    plan = solvers.heun(schedules.VP(), [1.0, 0.6, 0.3, 0.0])
    record = PlanRecord(plan, describe(schedules.VP()), 'heun', 'uniform', {'error': 0.25})
    made = json.loads(json.dumps(to_data(record)))
    for key, value in changes.items():
        node = made['plan'] if key.startswith('plan_') else made
        node[key.removeprefix('plan_')] = value
    return made


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.data())
def test_a_plan_comes_back_bit_for_bit(num_rows, num_remembered, num_noises, draw):
    """Any finite float64, also where digits are many: 0.1 + 0.2, 5e-324, 1e308, -0."""
    width = 2 + num_remembered + num_noises

    def table(*shape, of=finite):
        size = int(np.prod(shape))
        return np.array(draw.draw(st.lists(of, min_size=size, max_size=size))).reshape(shape)

    plan = Plan(
        t=table(num_rows, of=st.floats(0, 1)),
        remember=table(num_rows, 2),
        to_x=table(num_rows, width),
        to_anchor=table(num_rows, width),
        log_variance_range=table(num_rows, num_noises),
        live=np.array([True] + [False] * (num_rows - 1)),
        start=table(2),
    )
    record = PlanRecord(plan, describe(schedules.Flow()), 'heun:coordinate=t', 'karras', {'seed': 3, 'of': ['a', None]})
    back = from_data(json.loads(json.dumps(to_data(record), allow_nan=False)))
    assert back._replace(plan=None) == record._replace(plan=None)
    for name, mine, theirs in zip(Plan._fields, back.plan, plan):
        assert mine.tobytes() == theirs.tobytes() and mine.shape == theirs.shape and mine.dtype == theirs.dtype, name


def made_again(description):
    """The schedule of a description: name(**options), an option that has a name being a schedule itself."""
    options = {key: value for key, value in description.items() if key != 'name'}
    options = {k: made_again(v) if isinstance(v, dict) else v for k, v in options.items()}
    return getattr(schedules, description['name'])(**options)


def test_a_schedule_is_described_by_its_options(schedule):
    """Enough to make it again."""
    again = made_again(json.loads(json.dumps(describe(schedule))))
    assert type(again) is type(schedule)
    t = np.linspace(0.1, 0.9, 5)
    np.testing.assert_array_equal(again.logsnr(t), schedule.logsnr(t))


@dataclass(frozen=True, kw_only=True)
class Wrapped(schedules.Flow):
    base: Schedule = schedules.VP(beta_max=12.0)
    levels: tuple = (1, 2)
    factor: float = np.float64(0.5)


def test_schedules_within_schedules_are_described():
    expected = {
        'name': 'Wrapped',
        'base': {'name': 'VP', 'beta_min': 0.1, 'beta_max': 12.0},
        'levels': [1, 2],
        'factor': 0.5,
    }
    assert describe(Wrapped()) == json.loads(json.dumps(describe(Wrapped()))) == expected


def test_another_schedule_is_refused():
    record = from_data(data())
    check_schedule(record, schedules.VP())
    for other, here in (
        (schedules.VP(beta_max=19.0), r'VP\(beta_min=0.1, beta_max=19.0\)'),
        (schedules.Flow(), 'Flow'),
    ):
        with pytest.raises(
            ValueError, match=r'file.json was made for the schedule VP\(beta_min=0.1, beta_max=20.0\).*here is ' + here
        ):
            check_schedule(record, other, 'file.json')


def ragged(table):
    return [row[:-1] if i == 1 else row for i, row in enumerate(table)]


PLAN = data()['plan']
MISTAKES = [
    (7, 'p.json is no plan: a plan is an object with "format": "diffjax plan"'),
    ([data()], 'is no plan'),
    (data(format='onnx'), 'is no plan'),
    (data(version=2), 'version 2 is not 1'),
    ({key: value for key, value in data().items() if key != 'schedule'}, 'lacks schedule'),
    (data(note=''), "unknown key 'note'; valid: format, version"),
    (data(schedule='VP'), "schedule is an object with a name and its options; got 'VP'"),
    (data(schedule={'beta': 1}), 'schedule is an object with a name'),
    (data(notes='mine'), "notes is an object; got 'mine'"),
    (data(solver=None), 'solver is a string; got None'),
    (data(grid=['a']), r"grid is a string; got ['a']"),
    (data(plan=[]), 'plan is an object with t, remember'),
    (data(plan={k: v for k, v in PLAN.items() if k != 'start'}), 'plan lacks start'),
    (data(plan={**PLAN, 'x': []}), "plan: unknown key 'x'"),
    (data(plan_t=[]), 'plan.t is a list of numbers'),
    (data(plan_t='0.5'), "plan.t is a list of numbers, or of rows of numbers; got '0.5'"),
    (data(plan_t=[str(t) for t in PLAN['t']]), 'plan.t is a list of numbers'),
    (data(plan_t=[10**400] * 5), 'plan.t is'),
    (data(plan_t=[[t] for t in PLAN['t']]), 'plan.t has the shape [5, 1]; right is [5]'),
    (data(plan_t=[1.5, *PLAN['t'][1:]]), 'plan.t lies in [0, 1]; got 1.5'),
    (data(plan_t=[*PLAN['t'][:-1], -0.1]), 'plan.t lies in [0, 1]; got -0.1'),
    (data(plan_t=[float('nan'), *PLAN['t'][1:]]), 'plan.t is not finite at [0]'),
    (data(plan_to_x=ragged(PLAN['to_x'])), 'plan.to_x is a table of numbers with rows of equal length'),
    (data(plan_to_x=PLAN['to_x'][:-1]), 'plan.to_x has the shape [4, 4]; right is [5, 4]'),
    (data(plan_to_x=[row[:2] for row in PLAN['to_x']]), 'plan.to_x has the shape [5, 2]; right is [5, 3]'),
    (data(plan_to_x=[[float('inf')] * 4] * 5), 'plan.to_x is not finite at [0 0]'),
    (data(plan_to_x=[[None] * 4] * 5), 'plan.to_x is a list of numbers'),
    (data(plan_to_anchor=[row + [0.0] for row in PLAN['to_anchor']]), 'plan.to_anchor has the shape [5, 5]; right is'),
    (data(plan_remember=[[1.0]] * 5), 'plan.remember has the shape [5, 1]; right is [5, 2]'),
    (data(plan_log_variance_range=[0.0] * 5), 'plan.log_variance_range has the shape [5]; right is [5, 0]'),
    (data(plan_log_variance_range=[[0.0] * 3] * 5), 'plan.to_x has the shape [5, 4]; right is [5, 6]'),
    (data(plan_live=[1] * 5), 'plan.live holds true or false alone'),
    (data(plan_live=[False] * 5), 'plan.live is false in every row'),
    (data(plan_start=[True, True]), 'plan.start holds numbers alone'),
    (data(plan_start=[1.0]), 'plan.start has the shape [1]; right is [2]'),
]


@pytest.mark.parametrize('given, fragment', MISTAKES, ids=[fragment for _, fragment in MISTAKES])
def test_what_is_no_plan_is_refused_in_one_line(given, fragment):
    before = copy.deepcopy(given)
    with pytest.raises(ValueError) as caught:
        from_data(given, 'p.json')
    message = str(caught.value)
    assert message.startswith('p.json') and fragment in message and '\n' not in message and len(message) < 300
    assert repr(given) == repr(before)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(Plan._fields),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=8,
    ),
)
def test_any_value_is_read_or_refused(name, value):
    """And what is read is finite, and fits the loop."""
    try:
        plan = from_data(data(**{f'plan_{name}': value})).plan
    except ValueError as error:
        assert '\n' not in str(error)
        return
    assert all(np.isfinite(table).all() for table in plan)
    assert plan.num_remembered >= 1 and plan.num_evaluations >= 1
