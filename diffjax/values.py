"""What a value of a config may be, by the annotation of what it is given to.

Python calls a function with anything; what then fails does so far from the mistake, in words about types. Here a value
is held against its parameter's annotation: whole numbers, numbers, True or False, texts, lists of them and sections.
"""

import collections.abc
import inspect
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from diffjax.core.types import OrNone

MOST = 2**31 - 1  # of a whole number: JAX counts in 32 bits
WORDS = {
    int: 'a whole number',
    float: 'a finite number',
    bool: 'True or False',
    str: 'a text',
    type(None): 'None',
    Mapping: 'a section with keys',
}
LISTS = collections.abc.Sequence, list, tuple
SECTIONS = collections.abc.Mapping, dict


def mistake(
    parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any], *, counted: bool = False
) -> str | None:
    """What is wrong with the first of the values that does not fit its annotation, None where all do.

    counted: whole numbers say how many there are of something: at least 1, or the default where that is lower; where 0
        means that there is none, though some are the default, the annotation is `core.types.OrNone`.
    """
    for key, value in values.items():
        annotation, default = parameters[key].annotation, parameters[key].default
        kinds = _kinds(annotation)
        if not kinds:
            continue
        if not any(_fits(value, kind, default) for kind in kinds):
            most = f' of at most {MOST}' if isinstance(value, int) and abs(value) > MOST else ''
            return f'{key} is {" or ".join(_word(kind) for kind in kinds)}{most}, got {value!r:.200}'
        least = default if _fits(default, int) and default < 1 else int(annotation is not OrNone)
        if counted and int in kinds and _fits(value, int) and value < least:
            return f'{key} is a whole number from {least} on, got {value!r}'
    return None


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raises ValueError where a value is not of a kind: int, float, bool, str or Mapping."""
    if not _fits(value, kind):
        raise ValueError(f'{name} is {WORDS[kind]}, got {value!r:.200}')


def check_whole(name: str, value: Any, low: int, high: int = MOST) -> int:
    """`value`. Raises ValueError where it is no whole number from `low` to `high`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f'{name} is a whole number from {low} to {high}, got {value!r:.200}')
    return int(value)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The kinds that an annotation allows, a list as (kind,); () where it is none that is known here."""
    if annotation is OrNone:
        return (int,)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [_kinds(part) for part in typing.get_args(annotation)]
        return sum(parts, ()) if all(parts) else ()
    if annotation in WORDS:
        return (annotation,)
    if origin in SECTIONS:
        return (Mapping,)
    if origin in LISTS:
        inner = _kinds(typing.get_args(annotation)[0])
        return (inner,) if inner else ()
    return ()


def _fits(value: Any, kind: Any, default: Any = None) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list | tuple) and all(any(_fits(each, k) for k in kind) for each in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int:
        return isinstance(value, numbers.Integral) and abs(value) <= MOST
    if kind is float:
        return isinstance(value, numbers.Real) and (abs(value) < math.inf or value == default)  # and so not NaN
    return isinstance(value, kind)


def _word(kind: Any) -> str:
    if isinstance(kind, tuple):
        return 'a list of ' + ' or '.join(_word(each).removeprefix('a ') + 's' for each in kind)
    return WORDS[kind]
