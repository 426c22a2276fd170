"""Their config.json, read with suspicion: a setting that is not covered is refused, never passed over."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffjax.weights.architecture import WeightsError


class Settings:
    """The settings of one config.json. Each is asked for by name; `done` refuses those that nobody asked for."""

    def __init__(self, class_name: str, config: Mapping[str, Any]):
        self._class_name, self._config, self._asked = class_name, config, set()

    def value(self, name: str, default: Any) -> Any:
        """Whatever stands there, unchecked; `default` is what their library takes where nothing does."""
        self._asked.add(name)
        return self._config.get(name, default)

    def integer(self, name: str, default: int | None, *, least: int = 1, most: int = 2**17) -> int:
        """A whole number from `least` to `most`; `default=None`: it has to be given."""
        value = self.value(name, default)
        if type(value) is not int or not least <= value <= most:  # True is an int to Python
            raise self.wrong(name, f'a whole number from {least} to {most}')
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.value(name, default)
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise self.wrong(name, 'a number')
        return float(value)

    def choice(self, name: str, default: Any, *valid: Any) -> Any:
        """One of `valid`: the only one covered, or several between which an option of ours chooses."""
        value = self.value(name, default)
        if not any(type(value) is type(other) and value == other for other in valid):
            raise self.wrong(name, ' or '.join(map(repr, valid)))
        return value

    def integers(self, name: str, default: Sequence[int], *, most: int = 2**17) -> tuple[int, ...]:
        """A list of whole numbers from 1 on."""
        value = self.value(name, default)
        if not isinstance(value, list | tuple) or not value or len(value) > 64:
            raise self.wrong(name, 'a list of whole numbers')
        if any(type(item) is not int or not 1 <= item <= most for item in value):
            raise self.wrong(name, f'a list of whole numbers from 1 to {most}')
        return tuple(value)

    def wrong(self, name: str, right: str) -> WeightsError:
        """The error for a setting that is not what it should be, to be raised."""
        value = repr(self._config.get(name, 'nothing'))
        return WeightsError(f'{self._class_name}: {name} is {value[:80]}; covered: {right}')

    def done(self, *ignored: str) -> None:
        """Raises WeightsError for a setting that was never asked for. ignored: those that change no output."""
        unknown = [name for name in self._config if name not in (*self._asked, *ignored) and not name.startswith('_')]
        if unknown:
            shown = ', '.join(repr(name[:40]) for name in unknown[:8])
            raise WeightsError(f'{self._class_name}: settings that are not covered: {shown}')
