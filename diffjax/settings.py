"""The sections of a config that say what is read, how samples are drawn and what is measured. Each checks itself."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from diffjax.plan_files import is_plan_file

MOST_STEPS = 100_000  # of a sampler: its plan is a table with a row for each call
LONGEST_NAME = 160  # of a file, before its seed and ending; systems take 255


class ConfigError(ValueError):
    """A config that cannot be built; the message names the value and what would be right."""


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """The `dataset` section."""

    name: str
    split: str = 'train'
    test_split: str = 'test'  # '': nothing is held out
    data_dir: str = ''  # '': TFDS's default
    flip: bool = False
    resolution: int = 0  # images are cropped to their middle square and resized to so many pixels; 0: as they are
    latent_scale: float = 0.18215  # of a dataset of latents; 0: each channel to mean 0 and standard deviation 1
    num_frames: int = 0  # of the clips that are learned, cut out of those of the dataset; 0: all that fit
    frame_strides: Sequence[int] = (1,)  # one is drawn for each example: every frame, every second one, ...
    image_fraction: float = 0.0  # of a batch: clips of which a single frame is learned, as an image

    def __post_init__(self):
        _check_least(0, 'dataset', self, 'num_frames', 'resolution', 'latent_scale')
        if not self.split:
            raise ConfigError("dataset.split names what is learned, such as 'train' or 'train[:90%]', got ''")
        strides = self.frame_strides
        if not isinstance(strides, Sequence) or not strides or not all(isinstance(s, int) and s > 0 for s in strides):
            raise ConfigError(f'dataset.frame_strides are whole numbers from 1 on, such as (1, 2); got {strides!r}')
        if not 0 <= self.image_fraction < 1:
            raise ConfigError(f'dataset.image_fraction lies in [0, 1), got {self.image_fraction}')

    def frames_of(self, whole: int) -> int:
        """How many frames are learned of clips that have so many. Raises ConfigError where they have too few."""
        most = (whole - 1) // max(self.frame_strides) + 1
        if self.num_frames > most:
            raise ConfigError(
                f'dataset.num_frames = {self.num_frames} with frame_strides up to {max(self.frame_strides)} does not '
                f'fit into the {whole} frames of {self.name}; up to {most} do'
            )
        return self.num_frames or most

    @property
    def cuts_clips(self) -> bool:
        """Whether anything is set that only clips have."""
        return bool(self.num_frames or self.image_fraction or tuple(self.frame_strides) != (1,))


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """The `sampler` section."""

    solver: Any  # a component, or PATH.json: a plan, for which grid and num_steps do not count
    grid: Any = 'uniform'
    num_steps: int = 50
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_rescale: float = 0.0  # phi: 0 none, 1 the conditional branch's standard deviation
    cfg_zero_star: bool = False  # the optimised scale of the baseline
    zero_init: int = 0  # so many first network calls have no velocity, as in CFG-Zero*
    threshold: float = 0.0  # x0 is clipped to [-threshold, threshold]; 0: it is not
    dynamic_threshold: float = 0.0  # the fraction of |x0| that is not clipped, such as 0.995; 0: all
    dynamic_threshold_max: float = 0.0  # the bound's own bound, from 1; 0: none
    negative_label: int = -1  # -1: the null condition is the baseline
    params: str = ''  # an average of training.ema; '' the first; 'raw': none; 'ema/0.08': what --mode=ema has made
    batch_size: int = 256
    frame_rate: float = 0.0  # of clips, that which a network with frame_rate_frequencies is told; 0: the dataset's own
    known: Any = ''  # of clips, what is given and kept: 'first_frames:num_known=4', MASK.png, ... (`edits.py`)
    known_from: str = ''  # the clips it is given of: '' those of the test split; NPZ, GIF, PNG or JPEG
    num_frames: int = 0  # of the clips that are drawn; above those that were learned in windows; 0: as many
    window_stride: int = 0  # a window begins every so many frames; 0: half of those that were learned

    def __post_init__(self):
        _check_least(1, 'sampler', self, 'num_steps', 'batch_size')
        if self.num_steps > MOST_STEPS:
            raise ConfigError(f'sampler.num_steps is at most {MOST_STEPS}, got {self.num_steps}')
        _check_least(0, 'sampler', self, 'zero_init', 'threshold', 'frame_rate')
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise ConfigError(
                'sampler.guidance_low and sampler.guidance_high are times with 0 <= low <= high <= 1; '
                f'got {self.guidance_low} and {self.guidance_high}'
            )
        for name in ('guidance_rescale', 'dynamic_threshold'):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f'sampler.{name} lies in [0, 1], got {getattr(self, name)}')
        if self.threshold and self.dynamic_threshold:
            raise ConfigError('sampler.threshold and sampler.dynamic_threshold are two ways to bound x0: set one to 0')
        if self.dynamic_threshold_max and not (self.dynamic_threshold and self.dynamic_threshold_max >= 1):
            raise ConfigError(
                'sampler.dynamic_threshold_max is at least 1 and needs a sampler.dynamic_threshold such as 0.995; '
                f'got {self.dynamic_threshold_max:g} with {self.dynamic_threshold:g}'
            )

        self._check_clips()

    def _check_clips(self) -> None:
        for name in ('num_frames', 'window_stride'):
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise ConfigError(f'sampler.{name} is a whole number from 0 on, got {value!r}')
        if self.window_stride and not self.num_frames:
            raise ConfigError(f'sampler.window_stride = {self.window_stride} says nothing without a sampler.num_frames')
        if not isinstance(self.known_from, str):
            raise ConfigError(f'sampler.known_from is the path of a file, got {self.known_from!r}')
        if self.known_from and isinstance(self.known, str) and not self.known:
            raise ConfigError(
                f'sampler.known_from = {self.known_from!r} says nothing without a sampler.known, such as first_frames'
            )

    @property
    def chosen(self) -> dict[str, Any]:
        """What beside the plan is not at its default."""
        plan = 'solver', 'grid', 'num_steps', 'batch_size'
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in given.items() if name not in plan}

    @property
    def file_name(self) -> str:
        """The plan, the guidance, and what else is chosen: two samplers are filed under two names."""
        solver, *rest = self.what.values()  # a plan's file takes no grid and no steps
        parts = [solver, *([f'{self.num_steps}steps', self.grid] if rest else []), f'w{self.guidance:g}']
        parts += [f'{name}={value}' for name, value in self.chosen.items() if name != 'guidance']
        name = re.sub(r'[^A-Za-z0-9=+_-]+', lambda found: '_' if found[0] in './' else '-', '-'.join(map(str, parts)))
        return name if len(name) <= LONGEST_NAME else f'{name[:LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}'

    @property
    def what(self) -> dict[str, Any]:
        """Which plan it is, by the keys that decide it."""
        names = ('solver',) if is_plan_file(self.solver) else ('solver', 'grid', 'num_steps')
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The `evaluation` section."""

    num_samples: int
    classifier: str = 'none'  # 'svc': scikit-learn's support vector machine on pixels
    noise_levels: int = 10
    num_likelihoods: int = 0  # test images whose bits per dimension are measured
    likelihood_trace: Any = 'rademacher'  # or 'gaussian', both with num_probes, or 'exact': one for each dimension
    likelihood_tolerance: float = 1e-5  # of each integration step, in x0 and in nats
    likelihood_t_min: float = 0.0  # above 0 for a network that cannot be asked there: bits of the blurred density
    features: Any = 'pixels'  # where distances and neighbours are: 'shapes', 'inception', 'inception:resize=pytorch'
    inception_weights: str = ''  # a safetensors file
    clip_features: Any = ''  # of whole clips: 'recognizer' (moving digits), 'i3d:weights=PATH'; '': no video distance
    reference: str = ''  # what samples are compared with: ADM's .npz, images as .npz or a folder; '': the test split

    def __post_init__(self):
        _check_least(0, 'evaluation', self, 'num_samples', 'num_likelihoods')
        if not 0 < self.likelihood_tolerance < 1:
            raise ConfigError(f'evaluation.likelihood_tolerance lies in (0, 1), got {self.likelihood_tolerance}')
        if not 0 <= self.likelihood_t_min < 1:
            raise ConfigError(f'evaluation.likelihood_t_min lies in [0, 1), got {self.likelihood_t_min}')
        _check_least(1, 'evaluation', self, 'noise_levels')
        if self.classifier not in ('none', 'svc'):
            raise ConfigError(f"evaluation.classifier is 'none' or 'svc', got {self.classifier!r}")


def _check_least(least: int, where: str, values: Any, *names: str) -> None:
    for name in names:
        if not getattr(values, name) >= least:  # NaN neither
            raise ConfigError(f'{where}.{name} must be at least {least}, got {getattr(values, name)}')
