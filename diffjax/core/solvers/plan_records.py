"""Plans as plain data, which JSON can hold: the table, the schedule it was made for, and where it comes from.

Python writes a float64 with as many digits as give it back, so that a plan that was written and read is the same plan,
bit for bit. Reading believes nothing: names, shapes, finiteness and times are checked, and nothing is executed.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan

FORMAT, VERSION = 'diffjax plan', 1
KEYS = ('format', 'version', 'schedule', 'solver', 'grid', 'notes', 'plan')


class PlanRecord(NamedTuple):
    """A plan, and what should be known about it."""

    plan: Plan
    schedule: dict[str, Any]  # `describe` of the one that it was made for
    solver: str  # what it was made by, or learned from
    grid: str
    notes: dict[str, Any]  # anything that JSON can hold: how it was learned, figures


def describe(schedule: Schedule) -> dict[str, Any]:
    """A schedule's name and options as plain data, in the form of a config's component."""
    return {'name': type(schedule).__name__} | {f.name: _plain(getattr(schedule, f.name)) for f in fields(schedule)}


def to_data(record: PlanRecord) -> dict[str, Any]:
    """The record as `json.dumps` takes it."""
    plan = {name: np.asarray(table).tolist() for name, table in record.plan._asdict().items()}
    return {'format': FORMAT, 'version': VERSION} | record._asdict() | {'plan': plan}


def from_data(data: Any, where: str = 'the plan') -> PlanRecord:
    """The record that `to_data` wrote.

    Args:
        data: as `json.loads` gives it.
        where: the file's name, for messages.

    Raises ValueError with one line that names the key, what was given and what would be right.
    """
    if not isinstance(data, Mapping) or data.get('format') != FORMAT:
        raise ValueError(f'{where} is no plan: a plan is an object with "format": "{FORMAT}"')
    if data.get('version') != VERSION:
        raise ValueError(f'{where}: version {data.get("version")!r} is not {VERSION}, the one that is read here')
    _check_keys(data, KEYS, where)
    schedule, notes = data['schedule'], data['notes']
    if not isinstance(schedule, Mapping) or not isinstance(schedule.get('name'), str):
        raise ValueError(f'{where}: schedule is an object with a name and its options; got {_short(schedule)}')
    if not isinstance(notes, Mapping):
        raise ValueError(f'{where}: notes is an object; got {_short(notes)}')
    for key in ('solver', 'grid'):
        if not isinstance(data[key], str):
            raise ValueError(f'{where}: {key} is a string; got {_short(data[key])}')
    return PlanRecord(_plan(data['plan'], where), dict(schedule), data['solver'], data['grid'], dict(notes))


def check_schedule(record: PlanRecord, schedule: Schedule, where: str = 'the plan') -> None:
    """Raises ValueError where the plan was made for another schedule: its coefficients would be wrong."""
    if record.schedule != describe(schedule):
        made_for, here = (_call(description) for description in (record.schedule, describe(schedule)))
        raise ValueError(f'{where} was made for the schedule {made_for}, and the schedule here is {here}')


def _plan(tables: Any, where: str) -> Plan:
    """The table itself; every array is checked against the sizes that t and to_x give."""
    if not isinstance(tables, Mapping):
        raise ValueError(f'{where}: plan is an object with {", ".join(Plan._fields)}; got {_short(tables)}')
    _check_keys(tables, Plan._fields, f'{where}: plan')
    arrays = {name: _array(tables[name], f'{where}: plan.{name}') for name in Plan._fields}
    num_rows = len(arrays['t'])
    num_noises = arrays['log_variance_range'].shape[-1] if arrays['log_variance_range'].ndim == 2 else 0
    width = max(arrays['to_x'].shape[-1], 3 + num_noises)  # x, the anchor, at least one estimate, the noises
    shapes = {
        't': (num_rows,),
        'remember': (num_rows, 2),
        'to_x': (num_rows, width),
        'to_anchor': (num_rows, width),
        'log_variance_range': (num_rows, num_noises),
        'live': (num_rows,),
        'start': (2,),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f'{where}: plan.{name} has the shape {list(arrays[name].shape)}; right is {list(shape)}')
        if (arrays[name].dtype == bool) != (name == 'live'):
            raise ValueError(f'{where}: plan.{name} holds {"true or false" if name == "live" else "numbers"} alone')
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f'{where}: plan.{name} is not finite at {np.argwhere(~np.isfinite(arrays[name]))[0]}')
    t = arrays['t']
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f'{where}: plan.t lies in [0, 1]; got {t[~((t >= 0) & (t <= 1))][0]:g}')
    if not arrays['live'].any():
        raise ValueError(f'{where}: plan.live is false in every row: the plan asks for nothing')
    return Plan(**arrays)


def _array(value: Any, where: str) -> np.ndarray:
    """A list, or a list of lists of equal length, as an array of float64 or bool."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:  # rows of unequal length
        raise ValueError(f'{where} is a table of numbers with rows of equal length; got {_short(value)}') from error
    if array.dtype.kind not in 'fib' or array.ndim not in (1, 2) or not len(array):
        raise ValueError(f'{where} is a list of numbers, or of rows of numbers; got {_short(value)}')
    return array if array.dtype == bool else array.astype(np.float64)


def _check_keys(data: Mapping, known: tuple[str, ...], where: str) -> None:
    if missing := [key for key in known if key not in data]:
        raise ValueError(f'{where} lacks {", ".join(missing)}')
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f'{where}: unknown key {unknown[0]!r}; valid: {", ".join(known)}')


def _plain(value: Any) -> Any:
    """A schedule's option as JSON would give it back."""
    if isinstance(value, Schedule):
        return describe(value)
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def _call(description: Mapping[str, Any]) -> str:
    options = ', '.join(f'{key}={value!r}' for key, value in description.items() if key != 'name')
    return f'{description["name"]}({options})'


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
