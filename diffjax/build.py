"""From a config, which is plain data, to objects. The only file that reads component names.

A component is written `'name'`, `'name:option=value,option=value'`, or `dict(name='name', option=value)`, and names an
entry of a module's `__all__`; capitals and underscores do not matter. An option that is a schedule is written like a
component itself, and a list of numbers is a grid. Whatever does not fit raises `ConfigError`, with the choices there
are, before anything is compiled or written.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from diffjax import nets
from diffjax.core import grids, likelihood, parameterizations, schedules, solvers, times, weights
from diffjax.core.guidance import Guidance
from diffjax.core.likelihood import Trace
from diffjax.core.losses import Loss
from diffjax.core.parameterizations import check_times
from diffjax.core.sampling import check_plan
from diffjax.core.schedules import Schedule
from diffjax.core.solvers import Plan
from diffjax.core.solvers.plan_records import check_schedule
from diffjax.core.transforms import Transforms
from diffjax.data import DatasetNotPrepared, Source, blank_source, open_source, prepare
from diffjax.evaluation import spaces
from diffjax.evaluation.image_sets import ImageSet
from diffjax.evaluation.references import Reference, check_reference, image_reference, read_reference
from diffjax.evaluation.spaces import Space
from diffjax.plan_files import is_plan_file, read_plan
from diffjax.settings import ConfigError, DatasetSettings, EvaluationSettings, SamplerSettings
from diffjax.tasks import Denoising
from diffjax.training import averages, optimizers
from diffjax.training.loop import Settings, Trainer
from diffjax.training.posthoc_ema import RECONSTRUCTED, is_reconstructed
from diffjax.training.sharding import make_mesh

BOUND_SCALE = 0.001  # of the variational bound beside the simple loss (Nichol & Dhariwal 2021, section 3.1)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config as objects. The mesh and the optimiser are made on demand: a config can be checked without them."""

    seed: int
    dataset: DatasetSettings
    source: Source
    test: Source | None  # the held-out split
    task: Denoising
    sampler: SamplerSettings
    evaluation: EvaluationSettings
    training: Settings
    mesh: Mesh
    optimizer: optax.GradientTransformation

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.source.image_shape

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of one example as the source delivers it, without its values."""
        example = self.source[0]
        return {name: jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for name, a in example.items()}

    def trainer(self) -> Trainer:
        def prepared(batch, key):
            return prepare(batch, key, flip=self.dataset.flip, scale=self.dataset.latent_scale)

        return Trainer(
            task=self.task,
            optimizer=self.optimizer,
            settings=self.training,
            prepare=prepared,
            mesh=self.mesh,
            seed=self.seed,
        )

    def plan(self, settings: SamplerSettings | None = None) -> Plan:
        return build_plan(settings or self.sampler, self.task)

    def guidance(self, settings: SamplerSettings | None = None) -> Guidance | None:
        """None where the scale is 1: no second branch is evaluated then."""
        s, num_classes = settings or self.sampler, self.task.num_classes
        if not -1 <= s.negative_label <= num_classes:
            raise ConfigError(
                f'sampler.negative_label is a class from 0 to {max(num_classes - 1, 0)}, or -1 for the null condition; '
                f'got {s.negative_label}'
            )
        if s.guidance == 1:
            return None
        if not num_classes:
            raise ConfigError(f'sampler.guidance = {s.guidance:g} needs labels, and this dataset has none')
        return Guidance(
            np.float32(s.guidance),
            np.float32(s.guidance_low),
            np.float32(s.guidance_high),
            rescale=np.float32(s.guidance_rescale) if s.guidance_rescale else None,
            optimal_scale=np.bool_(True) if s.cfg_zero_star else None,
        )

    def transforms(self, settings: SamplerSettings | None = None) -> Transforms:
        """None for each that is switched off: nothing is built for it."""
        s = settings or self.sampler
        return Transforms(
            threshold=np.float32(s.threshold) if s.threshold else None,
            quantile=np.float32(s.dynamic_threshold) if s.dynamic_threshold else None,
            maximum=np.float32(s.dynamic_threshold_max or np.inf) if s.dynamic_threshold else None,
            zero_init=np.int32(s.zero_init) if s.zero_init else None,
        )

    def likelihood_trace(self) -> Trace | None:
        """None where no likelihood is wanted."""
        s, objective = self.evaluation, self.task.objective
        trace = component(likelihood, s.likelihood_trace, 'evaluation.likelihood_trace')()
        if not s.num_likelihoods:
            return None
        if self.source.kind != 'image' or self.test is None:
            raise ConfigError(
                f'evaluation.num_likelihoods = {s.num_likelihoods} needs held-out images, and there are none: '
                'bits are those of bytes, and dataset.test_split names the split'
            )
        try:
            check_times(objective.parameterization, objective.schedule, np.array([s.likelihood_t_min, 1.0]))
        except ValueError as error:
            raise ConfigError(f'evaluation.num_likelihoods, from likelihood_t_min to t = 1: {error}') from error
        return trace

    def comparison(self) -> tuple[Space, Reference] | None:
        """In what space samples are compared with what; None for pixels and the test split, with all their figures."""
        s, source = self.evaluation, self.source
        space = component(spaces, s.features, 'evaluation.features', weights=s.inception_weights)()
        if parse_component(s.features, 'evaluation.features')[0].lower() == 'pixels' and not s.reference:
            return None
        if source.kind != 'image' or not (s.reference or self.test):
            raise ConfigError(
                'evaluation.features and evaluation.reference compare images with a reference or the test split, and '
                f'{source.name} has {"no test split" if source.kind == "image" else "latents"} here'
            )
        try:
            reference = read_reference(s.reference) if s.reference else image_reference(images_of(self.test))
            check_reference(reference, space, source.image_shape)
        except (ValueError, OSError) as error:
            raise ConfigError(f'evaluation.reference: {error}') from error
        return space, reference

    def sampling_options(self, settings: SamplerSettings | None = None) -> dict[str, Any]:
        """What a `Sampler` is told beside the plan and the labels."""
        s = settings or self.sampler
        return {
            'guidance': self.guidance(s),
            'transforms': self.transforms(s),
            'negative_label': s.negative_label,
        }


SECTIONS = ('dataset', 'network', 'optimizer', 'training', 'mesh', 'sampler', 'evaluation')
KEYS = ('seed', 'schedule', 'target', 'times', 'weight', 'learned_variance', 'label_drop')


def build(config: Mapping[str, Any], *, for_sampling: bool = False) -> Experiment:
    """Everything that a config describes, checked. for_sampling: latents that are not there do not matter.

    Raises ConfigError or another ValueError with one line that names what was given and the valid choices.
    """
    config = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    _check_keys('the config', config, KEYS + SECTIONS, required=KEYS + SECTIONS)
    dataset = section(DatasetSettings, config, 'dataset')
    training = section(Settings, config | {'training': with_averages(config['training'])}, 'training')
    evaluation = section(EvaluationSettings, config, 'evaluation')
    sampler = section(SamplerSettings, config, 'sampler')
    if sampler.params not in ('', 'raw', *training.ema) and not is_reconstructed(sampler.params):
        raise ConfigError(
            f"sampler.params is 'raw' or one of {', '.join(training.ema)}, or what --mode=ema has made, written "
            f'{RECONSTRUCTED}/WIDTH or {RECONSTRUCTED}/WIDTH/STEP; got {sampler.params!r}'
        )
    mesh = section(make_mesh, config, 'mesh')
    optimizer = component(optimizers, config['optimizer'], 'optimizer', num_steps=training.num_steps)()
    objective = build_loss(config)
    source, test = (
        open_split(dataset, split, for_sampling=for_sampling) if split else None
        for split in (dataset.split, dataset.test_split)
    )
    task = build_task(config, objective, source)
    experiment = Experiment(
        seed=config['seed'],
        dataset=dataset,
        source=source,
        test=test,
        task=task,
        sampler=sampler,
        evaluation=evaluation,
        training=training,
        mesh=mesh,
        optimizer=optimizer,
    )
    # each checks itself
    experiment.plan(), experiment.guidance(), experiment.likelihood_trace(), experiment.comparison()
    experiment.trainer().init(experiment.batch_spec)
    return experiment


def open_split(dataset: DatasetSettings, split: str, *, for_sampling: bool) -> Source:
    data_dir = dataset.data_dir or None
    try:
        return open_source(dataset.name, split, data_dir=data_dir)
    except DatasetNotPrepared:
        if not for_sampling:
            raise
        return blank_source(dataset.name, split, data_dir=data_dir)


def with_averages(training: Any) -> Any:
    """The `training` section with those of its `ema` that are components built."""
    if not isinstance(training, Mapping) or not isinstance(training.get('ema'), Mapping):
        return training
    built = {
        name: profile if isinstance(profile, int | float) else component(averages, profile, f'training.ema.{name}')()
        for name, profile in training['ema'].items()
    }
    return {**training, 'ema': built}


def build_loss(config: Mapping[str, Any]) -> Loss:
    """The keys schedule, target, times, weight and learned_variance."""
    return Loss(
        schedule=component(schedules, config['schedule'], 'schedule')(),
        parameterization=component(parameterizations, config['target'], 'target')(),
        times=component(times, config['times'], 'times')(),
        weight=component(weights, config['weight'], 'weight', 'level'),
        bound_scale=BOUND_SCALE if config['learned_variance'] else None,
    )


def build_task(config: Mapping[str, Any], objective: Loss, source: Source) -> Denoising:
    """The network, fitted to the dataset, and its task."""
    channels = source.image_shape[-1] * (2 if config['learned_variance'] else 1)
    network = component(nets, config['network'], 'network', num_classes=source.num_classes, out_channels=channels)()
    return Denoising(
        model=nets.as_model(network),
        objective=objective,
        num_classes=source.num_classes,
        label_drop=config['label_drop'],
    )


def images_of(source: Source) -> ImageSet:
    """A split's images, read as they are asked for."""

    def parts(start, stop, size):
        return (source.read(range(i, min(i + size, stop)))['image'] for i in range(start, stop, size))

    return ImageSet(f'{source.name} {source.split}', (len(source), *source.image_shape), parts)


def build_plan(settings: SamplerSettings, task: Denoising) -> Plan:
    """The solver on the grid, checked against what the network can be asked."""
    objective = task.objective
    plan = make_plan(objective.schedule, settings.solver, settings.grid, settings.num_steps)
    learned = objective.bound_scale is not None
    check_plan(plan, objective.schedule, objective.parameterization, learned_variance=learned)
    if settings.zero_init >= plan.num_evaluations:
        raise ConfigError(
            f'sampler.zero_init = {settings.zero_init} leaves no call with a velocity: '
            f'the plan makes {plan.num_evaluations} network calls'
        )
    return plan


def make_plan(schedule: Schedule, solver: Any, grid: Any, num_steps: int) -> Plan:
    """The plan that a solver writes on a grid; for PATH.json the one in the file, whatever grid and num_steps say."""
    if is_plan_file(solver):
        record = read_plan(solver)
        check_schedule(record, schedule, solver)
        return record.plan
    if isinstance(values := _literal(grid) if isinstance(grid, str) else grid, list | tuple):
        grid = {'name': 'times', 'values': values}
    at = component(grids, grid, 'sampler.grid', 'schedule', 'num_steps')(schedule, num_steps)
    return component(solvers, solver, 'sampler.solver', 'schedule', 'grid')(schedule, at)


def component(module, spec: Any, where: str, *positional: str, **given: Any) -> Callable:
    """The named entry of a module with its options bound: call it with what is left, or with nothing.

    Args:
        spec: see the top of this file.
        where: the config's key, for messages.
        positional: names of the parameters that the caller will pass.
        given: options that the config does not choose.
    """
    name, options = parse_component(spec, where)
    known = {_plain(entry): entry for entry in module.__all__}
    if _plain(name) not in known:
        raise ConfigError(f'{where}: unknown name {name!r}{_suggest(name, module.__all__)}')
    entry = getattr(module, known[_plain(name)])
    parameters = inspect.signature(entry).parameters
    accepted = [p for p in parameters if p not in (*positional, *given, 'parent', 'name')]
    _check_keys(f'{where} {name!r}', options, accepted)
    required = [p for p in accepted if parameters[p].default is inspect.Parameter.empty]
    if missing := [p for p in required if p not in options]:
        raise ConfigError(f'{where} {name!r} needs {", ".join(missing)}')
    given = {key: value for key, value in given.items() if key in parameters}
    for key in options:
        if parameters[key].annotation is Schedule:
            options[key] = component(schedules, options[key], f'{where} {name!r} {key}')()

    def make(*args):
        try:
            return entry(*args, **options, **given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{where} {name!r}: {error}') from error

    return make


def parse_component(spec: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of a component's spec. Values are Python literals, or else strings; nothing is executed."""
    if isinstance(spec, str):
        name, _, rest = spec.partition(':')
        pairs = [part.partition('=') for part in _split(rest) if part]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise ConfigError(f'{where}: options are written name:option=value,..., got {bad[0]!r} in {spec!r}')
        return name.strip(), {key.strip(): _literal(value.strip()) for key, _, value in pairs}
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
    _check_keys(name, values, [p.name for p in parameters], required)
    return make(**values)


def _has_factory(make: Callable, name: str) -> bool:
    return hasattr(make, '__dataclass_fields__') and any(
        f.name == name and callable(f.default_factory) for f in fields(make)
    )


def _check_keys(where: str, values: Mapping[str, Any], known, required=()) -> None:
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


def _literal(text: str) -> Any:
    if text in ('true', 'false'):
        return text == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it says it may raise
        return text
