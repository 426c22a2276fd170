"""What options may be: each check raises ValueError in one line with the option, what was given, and what is right.

Options come from configs and command lines, where a word may stand in a number's place.
"""

import numpy as np


def check_number(what: str, value, low: float = 0.0, high: float = np.inf, *, inside: bool = False) -> None:
    """Raises ValueError where an option is no finite number from `low` to `high`, or `inside` not between the two."""
    numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    fits = numeric and abs(value) < np.inf and (low < value < high if inside else low <= value <= high)
    if not fits:
        least = '' if low == -np.inf else f' above {low:g}' if inside else f' from {low:g} on'
        most = '' if high == np.inf else f' and below {high:g}' if inside else f' and at most {high:g}'
        raise ValueError(f'{what} is a number{least}{most}, got {value!r}')


def check_whole(what: str, value, low: int = 1) -> None:
    """Raises ValueError where an option is no whole number from `low` on; 3.0 counts nothing."""
    check_number(what, value, low)
    if not isinstance(value, int | np.integer):
        raise ValueError(f'{what} is a whole number, got {value!r}')


def check_window(name: str, low: float, high: float, most: float = np.inf) -> None:
    """Raises ValueError where nothing lies from `low` to `high`, numbers from 0 to `most`; high may be infinite."""
    check_number(f"{name}'s low", low, 0.0, most)
    if not high == most == np.inf:
        check_number(f"{name}'s high", high, 0.0, most)
    if low > high:
        raise ValueError(f'{name} takes low <= high, got low = {low} and high = {high}')


def check_choice(what: str, value, choices) -> None:
    """Raises ValueError where an option is none of the choices, in value and in type: an order of 2.0 is not 2."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f'{what} is one of {", ".join(map(str, choices))}; got {value!r}')
