"""Options that are no option: every one of every solver and grid, given a word, a list or a broken number, is refused
in one line that names it.
"""

import inspect
from functools import partial

import numpy as np
import pytest

from diffjax.core import grids, schedules, solvers
from diffjax.core.checks import check_choice, check_number, check_whole, check_window
from diffjax.core.types import OrNone

NAN = float('nan')
UNFIT = {  # what an option of each annotation is not
    'int': ('word', [1], None, 2.5, 3.0, NAN, -1e9),
    'float': ('word', [1], None, True, NAN, -float('inf')),
    'float | None': ('word', [1], True, NAN),
    'str': ('word', 3, [1], None),
    'bool': ('word', 2, [1], None),
}
GIVEN = {('unipc', 'knee'): {'polynomial': 'softplus'}}  # without which an option is refused anyway


def options_of(module):
    """(entry, option, its annotation) of everything in a module."""
    for name in module.__all__:
        for option, parameter in inspect.signature(getattr(module, name)).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and (name, option) != ('times', 'values'):
                annotation = int if parameter.annotation is OrNone else parameter.annotation
                yield name, option, annotation.__name__ if isinstance(annotation, type) else str(annotation)


def refused(make, option, value):
    """In one line with the option's name and what was given."""
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert '\n' not in message and option.rstrip('s') in message and repr(value) in message, (make, message)


@pytest.mark.parametrize('name', solvers.__all__)
def test_solvers_refuse_what_is_no_option(name):
    for _, option, annotation in (row for row in options_of(solvers) if row[0] == name):
        for value in UNFIT[annotation]:
            options = {option: value} | GIVEN.get((name, option), {})
            refused(partial(getattr(solvers, name), schedules.Flow(), [0.95, 0.58, 0.05], **options), option, value)


@pytest.mark.parametrize('name', [name for name in grids.__all__ if name != 'times'])
def test_grids_refuse_what_is_no_option(name):
    for _, option, annotation in (row for row in options_of(grids) if row[0] == name):
        for value in UNFIT[annotation]:
            refused(partial(getattr(grids, name), schedules.Flow(), 5, **{option: value}), option, value)


def test_a_choice_is_one_in_value_and_type():
    check_choice('order', 2, range(1, 4))
    for value in (2.0, np.float64(2), True, '2', [2], np.ones(2)):
        with pytest.raises(ValueError, match='order is one of 1, 2, 3; got'):
            check_choice('order', value, range(1, 4))


def test_numbers_and_their_ends():
    for value in (0, 1, 0.5, np.float32(0.5)):
        check_number('x', value, high=1.0)
    for value, inside, message in (
        (-0.1, False, 'x is a number from 0 on and at most 1, got -0.1'),
        (1.1, False, 'x is a number from 0 on and at most 1, got 1.1'),
        (0, True, 'x is a number above 0 and below 1, got 0'),
        (1, True, 'x is a number above 0 and below 1, got 1'),
    ):
        with pytest.raises(ValueError, match=f'^{message}$'):
            check_number('x', value, high=1.0, inside=inside)
    check_whole('n', np.int64(3))
    with pytest.raises(ValueError, match='^n is a whole number, got 3.0$'):
        check_whole('n', 3.0)
    with pytest.raises(ValueError, match='^n is a number from 1 on, got 0$'):
        check_whole('n', 0)


def test_a_window_that_holds_nothing():
    check_window('edm', 0.1, float('inf'))
    check_window('edm', 0.1, 0.1)
    with pytest.raises(ValueError, match='^edm takes low <= high, got low = 0.2 and high = 0.1$'):
        check_window('edm', 0.2, 0.1)
    with pytest.raises(ValueError, match="^sa_solver's high is a number from 0 on and at most 1, got inf$"):
        check_window('sa_solver', 0.2, float('inf'), 1.0)
