"""What a config names: entries of modules with their options, and sections with their keys.

A component is written `'name'`, `'name:option=value,option=value'`, or `dict(name='name', option=value)`, and names an
entry of a module's `__all__`; capitals and underscores do not matter. An option that is a schedule is written like a
component itself, and a list of numbers is a grid. Whatever does not fit raises `ConfigError`, with the choices there
are. Nothing that a user writes is executed.

Values are held against the annotations of what they are given to: a word in a number's place, NaN, a fraction of a
whole number, or less than one of what is counted is told here, where nothing else has told it better.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from diffjax.core import schedules
from diffjax.core.schedules import Schedule
from diffjax.settings import ConfigError
from diffjax.values import mistake


def component(module, spec: Any, where: str, *positional: str, **given: Any) -> Callable:
    """The named entry of a module with its options bound: call it with what is left, or with nothing.

    Args:
        spec: see the top of this file.
        where: the config's key, for messages.
        positional: names of the parameters that the caller will pass.
        given: options that the config does not choose.
    """
    name, options = parse_component(spec, where)
    entry = find(module, name, where)
    parameters = inspect.signature(entry).parameters
    accepted = [p for p in parameters if p not in (*positional, *given, 'parent', 'name')]
    check_keys(f'{where} {name!r}', options, accepted)
    required = [p for p in accepted if parameters[p].default is inspect.Parameter.empty]
    if missing := [p for p in required if p not in options]:
        raise ConfigError(f'{where} {name!r} needs {", ".join(missing)}')
    given = {key: value for key, value in given.items() if key in parameters}
    for key in options:
        if parameters[key].annotation == bool | str and options[key] in ('True', 'False'):  # as the command line has it
            options[key] = options[key] == 'True'
        if parameters[key].annotation is Schedule:
            options[key] = component(schedules, options[key], f'{where} {name!r} {key}')()

    def make(*args):
        try:
            made = entry(*args, **options, **given)
        except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
            wrong = mistake(parameters, options, counted=True)
            told = str(error) if wrong is None or _names(error, wrong) else wrong
            raise ConfigError(f'{where} {name!r}: {told}') from error
        if wrong := mistake(parameters, options, counted=True):
            raise ConfigError(f'{where} {name!r}: {wrong}')
        return made

    return make


def find(module, name: str, where: str) -> Any:
    """The entry of a module that a config names. Raises ConfigError where there is none."""
    known = {_plain(entry): entry for entry in module.__all__}
    if _plain(name) not in known:
        raise ConfigError(f'{where}: unknown name {name!r}{_suggest(name, module.__all__)}')
    return getattr(module, known[_plain(name)])


def _names(error: Exception, wrong: str) -> bool:
    """Whether an error is a message of ours about the same option: Python's own name none."""
    return isinstance(error, ValueError) and wrong.split()[0] in str(error)


def parse_component(spec: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of a component's spec. Values are Python literals, or else strings; nothing is executed."""
    if isinstance(spec, str):
        name, _, rest = spec.partition(':')
        pairs = [part.partition('=') for part in _split(rest) if part]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise ConfigError(f'{where}: options are written name:option=value,..., got {bad[0]!r} in {spec!r}')
        return name.strip(), {key.strip(): literal(value.strip()) for key, _, value in pairs}
    if isinstance(spec, Mapping) and isinstance(spec.get('name'), str):
        return spec['name'], {key: value for key, value in spec.items() if key != 'name'}
    raise ConfigError(f"{where} is a name, 'name:option=value' or dict(name=..., ...); got {spec!r}")


def _split(text: str) -> list[str]:
    """`text` at its commas, those inside brackets left alone."""
    parts, depth = [''], 0
    for letter in text:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and depth <= 0:
            parts.append('')
        else:
            parts[-1] += letter
    return parts


def section(make: Callable, config: Mapping[str, Any], name: str) -> Any:
    """`make(**config[name])` for a dataclass or a function, its keys checked."""
    values = config[name]
    if not isinstance(values, Mapping):
        raise ConfigError(f'{name} is a section with keys, got {values!r}')
    parameters = inspect.signature(make).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and not _has_factory(make, p.name)]
    check_keys(name, values, [p.name for p in parameters], required)
    if wrong := mistake({p.name: p for p in parameters}, values):
        raise ConfigError(f'{name}.{wrong}')
    return make(**values)


def _has_factory(make: Callable, name: str) -> bool:
    return hasattr(make, '__dataclass_fields__') and any(
        f.name == name and callable(f.default_factory) for f in fields(make)
    )


def check_keys(where: str, values: Mapping[str, Any], known, required=()) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f'{where} is a table of keys and values, got {values!r:.200}')
    for key in values:
        if key not in known:
            raise ConfigError(f'{where}: unknown key {key!r}{_suggest(key, known)}')
    if missing := [key for key in required if key not in values]:
        raise ConfigError(f'{where} lacks {", ".join(missing)}')


def _suggest(name: str, known) -> str:
    close = difflib.get_close_matches(_plain(name), [_plain(k) for k in known], n=1)
    hint = [k for k in known if close and _plain(k) == close[0]]
    return f'{f" (did you mean {hint[0]}?)" if hint else ""}; valid: {", ".join(known) or "none"}'


def _plain(name: str) -> str:
    return name.lower().replace('_', '')


def literal(text: str) -> Any:
    if text in ('true', 'false'):
        return text == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it says it may raise
        return text
