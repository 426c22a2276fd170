"""What every kind of experiment is made of: data, a task, and how it is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from diffjax.clips import frame_choice
from diffjax.components import section
from diffjax.core.types import PyTree
from diffjax.data import Source, prepare
from diffjax.settings import ConfigError, DatasetSettings
from diffjax.tasks.task import Task
from diffjax.training.loop import Settings, Trainer
from diffjax.training.sharding import Rules, read_rules


@dataclass(frozen=True, kw_only=True)
class Learning:
    """A config as objects, as far as training goes."""

    seed: int
    dataset: DatasetSettings
    source: Source  # what is learned: images, clips, or latents
    test: Source | None  # its held-out split
    task: Task
    training: Settings
    mesh: Mesh
    optimizer: optax.GradientTransformation
    frozen: PyTree = ()

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of one example as the source delivers it, without its values."""
        return {name: jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for name, a in self.source[0].items()}

    def trainer(self) -> Trainer:
        frames = frame_choice(self.source, self.dataset)
        return Trainer(
            task=self.task,
            optimizer=self.optimizer,
            settings=self.training,
            prepare=lambda batch, key: prepare(batch, key, flip=self.dataset.flip, frames=frames),
            mesh=self.mesh,
            seed=self.seed,
            frozen=self.frozen,
        )


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """The `evaluation` section of what draws nothing: how many held-out images it is given, with which parameters."""

    num_samples: int = 1000
    batch_size: int = 100
    params: str = ''  # a profile of training.ema; '' the first one; 'raw' for the parameters themselves

    def __post_init__(self):
        if min(self.num_samples, self.batch_size) < 1:
            raise ConfigError(
                f'evaluation.num_samples and batch_size are at least 1, got {self.num_samples} and {self.batch_size}'
            )


@dataclass(frozen=True, kw_only=True)
class HeldOut(Learning):
    """What draws nothing, and is measured on held-out images."""

    evaluation: HeldOutSettings

    @property
    def params_name(self) -> str:
        return self.evaluation.params


def open_mesh(config: Mapping[str, Any], make_mesh: Callable[..., Mesh]) -> tuple[Mesh, Rules]:
    """The section `mesh` of what denoises: `make_mesh` of its axes, and its `rules` for parameters."""
    axes = config['mesh']
    rules = axes.get('rules', ()) if isinstance(axes, Mapping) else ()
    if isinstance(axes, Mapping):
        axes = {name: size for name, size in axes.items() if name != 'rules'}
    return section(make_mesh, {'mesh': axes}, 'mesh'), read_rules(rules)


def check_heads(network: Any, mesh: Mesh) -> None:
    """Raises ConfigError where the axis `tensor` of a mesh would cut heads of an attention."""
    tensor, heads = mesh.shape.get('tensor', 1), getattr(network, 'num_heads', 0)
    if heads % tensor:
        raise ConfigError(f'mesh.tensor = {tensor} does not divide the {heads} heads of the network')


def check_shapes(experiment: Any) -> None:
    """Traces the initial state. Raises ConfigError where these options make no network for these examples."""
    try:
        experiment.trainer().init(experiment.batch_spec)
    except (TypeError, ArithmeticError, MemoryError) as error:  # of arrays that there cannot be
        shape, reason = experiment.source.image_shape, (str(error).strip().splitlines() or [''])[0]
        raise ConfigError(f'the network cannot be made for examples of {list(shape)}: {reason}') from error


def check_params(where: str, name: str, averages: Mapping[str, Any]) -> None:
    """Raises ConfigError for parameters that training does not keep."""
    if name not in ('', 'raw', *averages):
        raise ConfigError(f"{where} is 'raw' or one of {', '.join(averages)}; got {name!r}")
