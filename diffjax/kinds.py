"""The kinds of experiment, told apart by the section `task` of a config; without one, something denoises."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffjax import baselines, first_stage, recognition, results, run
from diffjax.build import build
from diffjax.components import parse_component
from diffjax.settings import ConfigError


class Kind(NamedTuple):
    """build(config) -> what is trained; measure(it, params, workdir, step, *, seed, progress) -> figures.

    Of a kind that draws also drawing(it, at_most) -> (params, labels, *, seed, progress, finish, kept) -> samples, and
    of one that is not the default load(config, workdir) -> what `diffjax.load` gives.
    """

    build: Callable[..., Any]
    measure: Callable[..., dict[str, Any]]
    drawing: Callable[..., Callable[..., Any]] | None = None
    load: Callable[..., Any] | None = None


DENOISING = Kind(build, results.measure, run.drawing)
BASELINE = Kind(baselines.build_baseline, baselines.measure, baselines.drawing, baselines.load_baseline)
BY_TASK = {
    'autoencoding': Kind(first_stage.build_first_stage, first_stage.measure),
    'recognition': Kind(recognition.build_recognition, recognition.measure),
    'variational': BASELINE,
    'adversarial': BASELINE,
}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Raises ConfigError for a task that is none."""
    if 'task' not in config:
        return DENOISING
    name, _ = parse_component(config['task'], 'task')
    if name.lower() not in BY_TASK:
        raise ConfigError(f'task.name is one of {", ".join(BY_TASK)}; got {name!r}')
    return BY_TASK[name.lower()]
