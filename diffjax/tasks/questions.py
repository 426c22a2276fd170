"""What a picture or a clip is asked in recognition: questions of yes or no, and one of one-of-many, with their answers.

Each is a value that says which annotations of a dataset it needs, and a pure function from a batch that holds them (see
`data.open_source`) to `Answers`. What stands in `__all__` is what a config's `task.questions` can name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, PyTree

__all__ = ['Scenes', 'Classes', 'Flights', 'Plays']


class Answers(NamedTuple):
    """What is so: 1 or 0 for each question of yes or no, and the index that answers the other one."""

    yes: Array  # [B, Q] float32
    choice: Array  # [B] int32, below K


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Scenes of solids: which shape in which colour, where, how large; and how many objects.

    Of each combination of shape and colour it is asked whether there is one: anywhere, in the left, right, upper and
    lower half (by its centre), and of each size. Q = combinations x (5 + sizes), the combinations of the first aspect
    first; K = max_objects + 1.
    """

    num_shapes: int
    num_colors: int
    num_sizes: int
    max_objects: int

    @property
    def annotations(self) -> tuple[str, ...]:
        return 'shape', 'color', 'size', 'centre'

    @property
    def num_combinations(self) -> int:
        """Combination shape * num_colors + color is the class of that name."""
        return self.num_shapes * self.num_colors

    @property
    def num_questions(self) -> int:
        return self.num_combinations * (5 + self.num_sizes)

    @property
    def num_choices(self) -> int:
        return self.max_objects + 1

    def __call__(self, batch: PyTree) -> Answers:
        """From `shape`, `color`, `size` int [B, N], -1 for no object, and `centre` [B, N, 2] as (y, x) in [0, 1]."""
        shape, color = batch['shape'].astype(jnp.int32), batch['color'].astype(jnp.int32)
        there = shape >= 0
        y, x = batch['centre'][..., 0], batch['centre'][..., 1]
        halves = [x < 0.5, x >= 0.5, y < 0.5, y >= 0.5]
        aspects = jnp.stack([there, *halves, *(batch['size'] == k for k in range(self.num_sizes))], -1)
        combination = jax.nn.one_hot(jnp.where(there, shape * self.num_colors + color, -1), self.num_combinations)
        found = jnp.einsum('bna,bnc->bac', aspects.astype(jnp.float32), combination) > 0  # by any of the objects
        return Answers(found.reshape(len(found), -1).astype(jnp.float32), there.sum(-1, dtype=jnp.int32))


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The class label alone: which of K; Q = 0."""

    num_classes: int

    @property
    def annotations(self) -> tuple[str, ...]:
        return ()

    @property
    def num_questions(self) -> int:
        return 0

    @property
    def num_choices(self) -> int:
        return self.num_classes

    def __call__(self, batch: PyTree) -> Answers:
        """From `label` [B]."""
        return Answers(jnp.zeros((len(batch['label']), 0)), batch['label'].astype(jnp.int32))


@dataclass(frozen=True, kw_only=True)
class _Actors(ABC):
    """Clips of bodies that move, each of one of `num_kinds` kinds.

    Of each kind it is asked in every frame, by this frame alone, whether one is there: anywhere, in the left, right,
    upper and lower half; and of the whole clip, whether one moves left, right, up and down in the first frame, whether
    one does in the last, and whether one is faster than `fast` then, in sides of the picture in a frame. Q = num_frames
    x kinds x 5 + kinds x 9, frame by frame, the kinds of one aspect beside each other; K = max_actors + 1.
    """

    num_frames: int
    max_actors: int

    num_kinds: ClassVar[int]
    fast: ClassVar[float]
    kinds_read: ClassVar[tuple[str, ...]]  # annotations

    @property
    def annotations(self) -> tuple[str, ...]:
        return *self.kinds_read, 'position', 'velocity'

    @property
    def num_frame_questions(self) -> int:
        return self.num_kinds * 5

    @property
    def num_questions(self) -> int:
        return self.num_frames * self.num_frame_questions + self.num_kinds * 9

    @property
    def num_choices(self) -> int:
        return self.max_actors + 1

    def __call__(self, batch: PyTree) -> Answers:
        """From `position` and `velocity` [B, T, N, 2] as (y, x), and what says the kinds [B, N], -1 for no body."""
        kind = self.kinds(batch)
        there, which = kind >= 0, jax.nn.one_hot(kind, self.num_kinds)
        (y, x), (down, right) = (jnp.moveaxis(batch[name], -1, 0) for name in ('position', 'velocity'))
        places = jnp.stack([jnp.ones_like(x, bool), x < 0.5, x >= 0.5, y < 0.5, y >= 0.5], -1)
        moves = jnp.stack([right < 0, right > 0, down < 0, down > 0], -1)
        fast = jnp.hypot(down, right)[:, -1, :, None] > self.fast
        ways = jnp.concatenate([moves[:, 0], moves[:, -1], fast], -1) & there[..., None]
        frames = jnp.einsum('btna,bnk->btak', places.astype(jnp.float32), which) > 0
        clips = jnp.einsum('bna,bnk->bak', ways.astype(jnp.float32), which) > 0
        yes = jnp.concatenate([frames.reshape(len(kind), -1), clips.reshape(len(kind), -1)], -1)
        return Answers(yes.astype(jnp.float32), there.sum(-1, dtype=jnp.int32))

    @abstractmethod
    def kinds(self, batch: PyTree) -> Array:
        """[B, N], -1 for no body."""


@dataclass(frozen=True, kw_only=True)
class Flights(_Actors):
    """Moving digits: a kind is a class of digits."""

    num_kinds: ClassVar[int] = 10
    fast: ClassVar[float] = 0.045
    kinds_read: ClassVar[tuple[str, ...]] = ('digit',)

    def kinds(self, batch):
        return batch['digit'].astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Plays(_Actors):
    """Moving shapes: a kind is a shape in a colour, shape x 6 + colour."""

    num_kinds: ClassVar[int] = 24
    fast: ClassVar[float] = 0.03
    kinds_read: ClassVar[tuple[str, ...]] = ('shape', 'color')

    def kinds(self, batch):
        shape, color = batch['shape'].astype(jnp.int32), batch['color'].astype(jnp.int32)
        return jnp.where(shape >= 0, shape * 6 + color, -1)
