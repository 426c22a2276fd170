"""Clips as a config wants them: how they are cut to be learned, and cut alike to be compared with samples."""

from diffjax.components import component
from diffjax.data import FrameChoice, Source
from diffjax.evaluation import clip_spaces
from diffjax.evaluation.clip_spaces import ClipSpace
from diffjax.evaluation.clips import one_frame_each
from diffjax.evaluation.image_sets import ImageSet
from diffjax.settings import ConfigError, DatasetSettings, EvaluationSettings


def frame_choice(source: Source, dataset: DatasetSettings) -> FrameChoice | None:
    """How each clip is cut that is learned; None for what has no frames."""
    if source.kind != 'video':
        return None
    return FrameChoice(dataset.frames_of(source.image_shape[0]), tuple(dataset.frame_strides), source.frame_rate)


def as_drawn(source: Source, dataset: DatasetSettings, frame_rate: float = 0.0) -> Source:
    """The clips with which samples of this frame rate are compared; 0: that of the first of `dataset.frame_strides`.

    Raises ConfigError for a rate that is not learned. Images are left as they are.
    """
    if source.kind != 'video':
        return source
    rates = {source.frame_rate / stride: stride for stride in dataset.frame_strides}
    if frame_rate and frame_rate not in rates:
        raise ConfigError(
            f'sampler.frame_rate = {frame_rate:g} is none of those that dataset.frame_strides makes of '
            f'{source.name}: {", ".join(f"{rate:g}" for rate in rates)}'
        )
    stride = rates[frame_rate] if frame_rate else dataset.frame_strides[0]
    return source.clipped(dataset.frames_of(source.image_shape[0]), stride)


def images_of(source: Source) -> ImageSet:
    """A split's images, or one frame of each clip, read as they are asked for."""

    def part(start, stop):
        pixels = source.read(range(start, stop))[source.kind]
        return one_frame_each(pixels, start) if source.kind == 'video' else pixels

    def parts(start, stop, size):
        return (part(i, min(i + size, stop)) for i in range(start, stop, size))

    return ImageSet(f'{source.name} {source.split}', (len(source), *source.image_shape[-3:]), parts)


def check_clips(source: Source, dataset: DatasetSettings, batch_size: int, frame_rate: float, *, told: bool) -> None:
    """Raises ConfigError where what is said of clips does not fit.

    Args:
        source: of the clips themselves, also where their latents are learned.
        batch_size: of what one call of the network learns from.
        frame_rate: `sampler.frame_rate`.
        told: whether the network is told frame rates.
    """
    if source.kind != 'video' and (dataset.cuts_clips or frame_rate):
        raise ConfigError(
            'dataset.num_frames, frame_strides, image_fraction and sampler.frame_rate are for clips, and '
            f'{source.name} has {source.kind}s'
        )
    images = batch_size * dataset.image_fraction
    if abs(images - round(images)) > 1e-6:
        fitting = ' or '.join(f'{max(count, 0) / batch_size:g}' for count in (int(images), int(images) + 1))
        raise ConfigError(
            f'dataset.image_fraction = {dataset.image_fraction:g} of {batch_size} examples (a microbatch) is '
            f'{images:g} of them; {fitting} would be whole'
        )
    if told and source.kind == 'video' and not source.frame_rate:
        raise ConfigError(f'network.frame_rate_frequencies: {source.name} does not say how many frames a second it has')
    if frame_rate and not told:
        raise ConfigError(
            f'sampler.frame_rate = {frame_rate:g} needs a network that is told it: network.frame_rate_frequencies=64'
        )


def check_latent_clips(source: Source, dataset: DatasetSettings, *, told: bool) -> None:
    """The same of what is learned in latents. source: what is read, latents or what becomes some in each step."""
    if dataset.image_fraction:
        raise ConfigError(
            f'dataset.image_fraction = {dataset.image_fraction:g}: a frame of latents stands for several frames and is '
            'no image; 0 is right where latents are learned'
        )
    if source.kind == 'latent' and (told or len(dataset.frame_strides) > 1):
        what = 'network.frame_rate_frequencies' if told else f'dataset.frame_strides = {tuple(dataset.frame_strides)}'
        raise ConfigError(
            f"{what}: latents on disk are those of one frame rate and say none; first_stage.encode='each_step' makes "
            'them of every rate'
        )


def space_of_clips(
    evaluation: EvaluationSettings, shape: tuple[int, ...] | None, test: Source | None
) -> ClipSpace | None:
    """The space of `evaluation.clip_features`; None where it is ''. shape: of samples, [T, H, W, C] for clips.

    Raises ConfigError where it does not fit them.
    """
    spec = evaluation.clip_features
    if not spec:
        return None
    if shape is None or len(shape) != 4 or test is None:
        raise ConfigError(
            f'evaluation.clip_features = {spec!r} compares clips with those of the test split, and there are none here'
        )
    space = component(clip_spaces, spec, 'evaluation.clip_features')()
    if space.channels not in (None, shape[-1]):
        raise ConfigError(
            f'evaluation.clip_features: {space.name} has learned clips of {space.channels} channels, and these have '
            f'{shape[-1]}'
        )
    if shape[0] < space.min_frames:
        raise ConfigError(
            f'evaluation.clip_features: {space.name} takes clips of at least {space.min_frames} frames, and these have '
            f'{shape[0]}'
        )
    return space
