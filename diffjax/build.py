"""From a config, which is plain data, to the objects of a diffusion experiment.

Whatever does not fit raises `ConfigError`, with the choices there are, before anything is compiled or written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffjax import nets
from diffjax.clips import as_drawn, check_clips, check_latent_clips, frame_choice, images_of, space_of_clips
from diffjax.components import check_keys, component, literal, parse_component, section
from diffjax.core import grids, likelihood, parameterizations, schedules, solvers, times, weights
from diffjax.core.editing import Windows
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
from diffjax.edits import Edit, open_edit, windows_of
from diffjax.evaluation import spaces
from diffjax.evaluation.clip_spaces import ClipSpace
from diffjax.evaluation.references import Reference, check_reference, image_reference, read_reference
from diffjax.evaluation.spaces import Space
from diffjax.latents import Latents, latent_shape
from diffjax.learning import Learning, check_heads, check_shapes, open_mesh
from diffjax.plan_files import is_plan_file, read_plan
from diffjax.settings import ConfigError, DatasetSettings, EvaluationSettings, SamplerSettings
from diffjax.tasks import Denoising
from diffjax.training import averages, optimizers
from diffjax.training.loop import Settings, Trainer
from diffjax.training.posthoc_ema import RECONSTRUCTED, is_reconstructed
from diffjax.training.sharding import Rules, make_mesh, over_time, placement
from diffjax.values import check_kind, check_whole

BOUND_SCALE = 0.001  # of the variational bound beside the simple loss (Nichol & Dhariwal 2021, section 3.1)


@dataclass(frozen=True, kw_only=True)
class Drawing(Learning):
    """What all experiments have whose model draws examples, beside what is learned: how they are measured."""

    images: Source | None  # of pixels: what samples are compared with, and
    test_images: Source | None  # its held-out split; None: a dataset of latents alone
    latents: Latents | None  # the first stage, where one is used
    sampler: Any  # its settings, of which every kind has `params` and `batch_size`
    evaluation: EvaluationSettings
    config: Mapping[str, Any] = field(repr=False, compare=False)  # which this is as objects

    @property
    def params_name(self) -> str:
        return self.sampler.params

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """[H, W, C] of what is drawn, [T, H, W, C] of clips."""
        return sample_shape(self.source, self.images, self.latents)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of what samples become, [H, W, C] or [T, H, W, C]; None for latents that nothing here decodes."""
        if self.latents is not None:
            return self.latents.image_shape(self.sample_shape)
        return None if self.source.kind == 'latent' else self.sample_shape

    @property
    def frame_rate(self) -> float:
        """Of the clips that are drawn; 0 where it is not known, or for images."""
        return (self.images or self.source).frame_rate

    def edit(self) -> Edit | None:
        """What is known of samples before they are drawn; None where nothing is."""
        return None

    def clip_space(self) -> ClipSpace | None:
        """In what space clips are compared with those of the test split."""
        return space_of_clips(self.evaluation, self.image_shape, self.test_images)

    def comparison(self) -> tuple[Space, Reference] | None:
        """In what space samples are compared with what; None for pixels and the test split, with all their figures."""
        s, test = self.evaluation, self.test_images
        space = component(spaces, s.features, 'evaluation.features', weights=s.inception_weights)()
        if parse_component(s.features, 'evaluation.features')[0].lower() == 'pixels' and not s.reference:
            return None
        if self.image_shape is None or not (s.reference or test):
            raise ConfigError(
                'evaluation.features and evaluation.reference compare images with a reference or the test split, and '
                f'{self.source.name} has {"latents" if self.image_shape is None else "no test split"} here'
            )
        try:
            reference = read_reference(s.reference) if s.reference else image_reference(images_of(test))
            check_reference(reference, space, self.image_shape[-3:])  # frames are compared as images
        except (ValueError, OSError) as error:
            raise ConfigError(f'evaluation.reference: {error}') from error
        return space, reference


@dataclass(frozen=True, kw_only=True)
class Experiment(Drawing):
    """The config of something that denoises, as objects."""

    task: Denoising
    sampler: SamplerSettings
    rules: Rules = ()  # where parameters are kept on the mesh

    def trainer(self) -> Trainer:
        shift, scale = self.standardisation
        encoding = {}
        if self.latents is not None and self.source.kind != 'latent':
            encoding = {'frozen': self.latents.params, 'encode': self.latents.encode}

        frames = frame_choice(self.source, self.dataset)

        def prepared(batch, key):
            return prepare(batch, key, flip=self.dataset.flip, scale=scale, shift=shift, frames=frames)

        return Trainer(
            task=self.task,
            optimizer=self.optimizer,
            settings=self.training,
            prepare=prepared,
            mesh=self.mesh,
            rules=self.rules,
            seed=self.seed,
            **encoding,
        )

    @property
    def standardisation(self) -> tuple[Any, Any]:
        """(shift, scale) of latents: the first stage's, dataset.latent_scale, or where that is 0 the dataset's own."""
        if self.latents is not None:
            return self.latents.shift, self.latents.scale
        if self.source.kind != 'latent' or self.dataset.latent_scale:
            return 0.0, self.dataset.latent_scale
        moments = self.source.moments
        if not moments:
            raise ConfigError(
                f'dataset.latent_scale = 0 takes the statistics of a dataset that --mode=encode has made, and '
                f'{self.source.name} has none: give the number, such as 0.18215'
            )
        return np.float32(moments['mean']), 1 / np.float32(moments['std'])

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
        if not self.task.null_label and s.negative_label < 0:
            raise ConfigError(
                f'sampler.guidance = {s.guidance:g} needs a null label, which this network has not learned '
                '(null_label=False): give a class as sampler.negative_label, or guidance 1'
            )
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

    @property
    def clip_shape(self) -> tuple[int, ...] | None:
        """[T, H, W, C] of clips of pixels, as they are learned; None for anything else."""
        return self.sample_shape if self.latents is None and self.source.kind == 'video' else None

    def edit(self, settings: SamplerSettings | None = None, clips: np.ndarray | None = None) -> Edit | None:
        return open_edit(settings or self.sampler, self.clip_shape, self.test_images, clips)

    def windows(self, settings: SamplerSettings | None = None) -> Windows | None:
        """Those in which longer clips are made than were learned; None where there are none."""
        return windows_of(settings or self.sampler, self.clip_shape)

    def likelihood_trace(self) -> Trace | None:
        """None where no likelihood is wanted."""
        s, objective = self.evaluation, self.task.objective
        trace = component(likelihood, s.likelihood_trace, 'evaluation.likelihood_trace')()
        if not s.num_likelihoods:
            return None
        if self.source.kind == 'latent' or self.latents is not None or self.test is None:
            raise ConfigError(
                f'evaluation.num_likelihoods = {s.num_likelihoods} needs held-out images, and there are none: '
                'bits are those of bytes, and dataset.test_split names the split'
            )
        try:
            check_times(objective.parameterization, objective.schedule, np.array([s.likelihood_t_min, 1.0]))
        except ValueError as error:
            raise ConfigError(f'evaluation.num_likelihoods, from likelihood_t_min to t = 1: {error}') from error
        return trace

    def sampling_options(self, settings: SamplerSettings | None = None) -> dict[str, Any]:
        """What a `Sampler` is told beside the plan and the labels."""
        s = settings or self.sampler
        return {
            'guidance': self.guidance(s),
            'transforms': self.transforms(s),
            'negative_label': s.negative_label,
            'frame_rate': (s.frame_rate or self.frame_rate) if self.task.knows_frame_rate else None,
            'windows': self.windows(s),
        }


SECTIONS = ('dataset', 'network', 'optimizer', 'training', 'mesh', 'sampler', 'evaluation')
KEYS = ('seed', 'schedule', 'target', 'times', 'weight', 'learned_variance', 'label_drop')


def build(config: Mapping[str, Any], *, for_sampling: bool = False, latents: Latents | None = None) -> Experiment:
    """Everything that a config describes, checked.

    Args:
        for_sampling: a dataset of latents that is not there does not matter.
        latents: of the section `first_stage`, opened (`stages.open_latents`).

    Raises ConfigError or another ValueError with one line that names what was given and the valid choices.
    """
    config = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    check_keys('the config', config, (*KEYS, *SECTIONS, 'first_stage'), required=KEYS + SECTIONS)
    check_kind('label_drop', config['label_drop'], float)
    check_kind('learned_variance', config['learned_variance'], bool)
    dataset = section(DatasetSettings, config, 'dataset')
    training = section(Settings, config | {'training': with_averages(config['training'])}, 'training')
    evaluation = section(EvaluationSettings, config, 'evaluation')
    sampler = section(SamplerSettings, config, 'sampler')
    if sampler.params not in ('', 'raw', *training.ema) and not is_reconstructed(sampler.params):
        raise ConfigError(
            f"sampler.params is 'raw' or one of {', '.join(training.ema)}, or what --mode=ema has made, written "
            f'{RECONSTRUCTED}/WIDTH or {RECONSTRUCTED}/WIDTH/STEP; got {sampler.params!r}'
        )
    mesh, rules = open_mesh(config, make_mesh)
    optimizer = component(optimizers, config['optimizer'], 'optimizer', num_steps=training.num_steps)()
    objective = build_loss(config)
    given = [
        open_split(dataset, split, for_sampling=for_sampling) if split else None
        for split in (dataset.split, dataset.test_split)
    ]
    source, test = given
    rate = sampler.frame_rate
    images, test_images = (each and as_drawn(each, dataset, rate) for each in given)
    images, test_images = (None, None) if source.kind == 'latent' else (images, test_images)
    if latents is not None and images is not None:
        source, test = (each and latents.source(each, dataset) for each in given)
    task = build_task(config, objective, source.num_classes, sample_shape(source, images, latents)[-1], mesh)
    told, microbatch = task.knows_frame_rate, training.batch_size // training.num_microbatches
    check_clips(given[0], dataset, microbatch, rate, told=told)
    if latents is not None or source.kind == 'latent':
        check_latent_clips(source, dataset, told=told)
    experiment = Experiment(
        seed=check_whole('seed', config['seed'], 0, 2**32 - 1),
        dataset=dataset,
        source=source,
        test=test,
        images=images,
        test_images=test_images,
        latents=latents,
        task=task,
        sampler=sampler,
        evaluation=evaluation,
        training=training,
        mesh=mesh,
        rules=rules,
        optimizer=optimizer,
        config=config,
    )
    # each checks itself
    experiment.plan(), experiment.guidance(), experiment.likelihood_trace()
    experiment.comparison(), experiment.clip_space()
    experiment.edit(), experiment.windows()
    check_shapes(experiment)
    return experiment


def open_split(dataset: DatasetSettings, split: str, *, for_sampling: bool, annotations: Sequence[str] = ()) -> Source:
    data_dir = dataset.data_dir or None
    try:
        source = open_source(
            dataset.name, split, data_dir=data_dir, resolution=dataset.resolution, annotations=annotations
        )
        if not len(source):
            raise ConfigError(f'dataset: the split {split!r} of {dataset.name!r} has no examples')
        return source
    except DatasetNotPrepared:
        if not for_sampling:
            raise
        return blank_source(dataset.name, split, data_dir=data_dir)


def sample_shape(source: Source, images: Source | None, latents: Latents | None) -> tuple[int, ...]:
    """[H, W, C] or [T, H, W, C] of what is denoised: the latents that are read, or what becomes of `images`."""
    if source.kind == 'latent':
        return source.image_shape
    return images.image_shape if latents is None else latent_shape(latents.network, images.image_shape)


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


def build_task(config: Mapping[str, Any], objective: Loss, num_classes: int, channels: int, mesh: Mesh) -> Denoising:
    """The network, fitted to the dataset, and its task.

    `num_classes` and `out_channels` follow from the dataset; a section `network` may name them too, such as one that
    was imported, and `num_classes=0` there leaves the labels unused.
    """
    name, options = parse_component(config['network'], 'network')
    fitted = {
        'num_classes': num_classes,
        'out_channels': channels * (2 if config['learned_variance'] else 1),
    }
    for key, value in fitted.items():
        given = options.pop(key, value)
        if given != value and not (key == 'num_classes' and given == 0):
            raise ConfigError(f'network.{key} is {given!r}, and this dataset with this target needs {value}')
        fitted[key] = given
    network = component(nets, {'name': name, **options}, 'network', **fitted)()
    check_heads(network, mesh)
    null_label = getattr(network, 'null_label', True)
    if config['label_drop'] and not null_label:
        raise ConfigError(f'label_drop = {config["label_drop"]} needs a null label: network.null_label=True has one')
    return Denoising(
        model=over_time(nets.as_model(network, placement(mesh)), mesh),
        objective=objective,
        num_classes=fitted['num_classes'],
        label_drop=config['label_drop'],
        null_label=null_label,
        image_fraction=config['dataset'].get('image_fraction', 0.0),
        knows_frame_rate=getattr(network, 'frame_rate_frequencies', 0) > 0,
    )


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
    if isinstance(values := literal(grid) if isinstance(grid, str) else grid, list | tuple):
        grid = {'name': 'times', 'values': values}
    at = component(grids, grid, 'sampler.grid', 'schedule', 'num_steps')(schedule, num_steps)
    return component(solvers, solver, 'sampler.solver', 'schedule', 'grid')(schedule, at)
