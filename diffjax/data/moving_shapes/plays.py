"""What happens in a clip: one or two of the solids of `shapes`, each with a motion, and a caption that is true of it.

    a red cube moves left, a blue sphere falls

With s = k / (T - 1) the share of the clip that has passed at frame k, and d the length of the way,

    moves left, moves right, rises      d s along its axis: constant velocity                                       (1)
    falls                               d s^2 downwards: from rest, with constant acceleration                      (2)

Each solid is whole in the picture all the time, and apart from the other in the first frame and in the last. Places are
fractions of the picture's side. A play is a pure function of its split and index (`data/streams.py`); as in `shapes`,
some combinations of shape and colour wait for the test split.
"""

from typing import NamedTuple

import numpy as np

from diffjax.data.clips import NUM_FRAMES
from diffjax.data.shapes.rendering import background, layer
from diffjax.data.shapes.scenes import BACKGROUNDS, COLORS, HELD_OUT, SHAPES, SIZES, Background, Object
from diffjax.data.streams import Stream

SIDE = 32  # pixels
SIZES_SHOWN = ('medium', 'large')  # a small solid would have a radius of three pixels
MOTIONS = {  # the way (down, right), in lengths d
    'stands still': (0, 0),
    'moves left': (0, -1),
    'moves right': (0, 1),
    'rises': (-1, 0),
    'falls': (1, 0),
}
SHORTEST = 0.3  # way
APART = 0.8  # of the sum of the radii
SPLIT_KEYS = {'train': 0x5A1E6, 'test': 0x7E58}


class Actor(NamedTuple):
    """A solid where it begins, the index of its motion in MOTIONS, and the length d of its way."""

    thing: Object
    motion: int
    way: float


class Play(NamedTuple):
    actors: tuple[Actor, ...]  # in the order of the caption
    front: int  # which of them stands in front
    background: Background
    caption: str

    @property
    def label(self) -> int:
        """A class for conditional models: the first actor's shape and colour, as one of `scenes.CLASSES`."""
        return self.actors[0].thing.shape * len(COLORS) + self.actors[0].thing.color


def play(split: str, index: int) -> Play:
    """Clip `index` of a split, 'train' or 'test'."""
    stream = Stream(SPLIT_KEYS[split], index)
    number = stream.choice((1, 2))
    actors = [_actor(stream, split)]
    while len(actors) < number:
        other = _actor(stream, split)
        if other.thing[:2] != actors[0].thing[:2] and _apart(actors[0], other):
            actors.append(other)
    first, second = stream.choice(list(BACKGROUNDS)), stream.choice(list(BACKGROUNDS))
    ground = Background(first, first if stream.uniform() < 0.5 else second, stream.uniform(0, 2 * np.pi))
    return Play(tuple(actors), stream.choice(range(number)), ground, ', '.join(map(_clause, actors)))


def _actor(stream: Stream, split: str) -> Actor:
    while True:
        shape, color = stream.choice(range(len(SHAPES))), stream.choice(range(len(COLORS)))
        if split != 'train' or (SHAPES[shape], list(COLORS)[color]) not in HELD_OUT:
            break
    size = list(SIZES).index(stream.choice(SIZES_SHOWN))
    motion = stream.choice(range(len(MOTIONS)))
    radius = list(SIZES.values())[size]
    way = stream.uniform(SHORTEST, 1 - 2 * radius)
    y, x = (
        stream.uniform(radius - min(step * way, 0), 1 - radius - max(step * way, 0))
        for step in list(MOTIONS.values())[motion]
    )
    return Actor(Object(shape, color, size, x, y), motion, way)


def _apart(a: Actor, b: Actor) -> bool:
    least = APART * (a.thing.radius + b.thing.radius)
    return all(np.hypot(*(path(a)[0][k] - path(b)[0][k])) > least for k in (0, -1))


def _clause(actor: Actor) -> str:
    color, shape = list(COLORS)[actor.thing.color], SHAPES[actor.thing.shape]
    return f'{"an" if color[0] in "aeiou" else "a"} {color} {shape} {list(MOTIONS)[actor.motion]}'


def path(actor: Actor, num_frames: int = NUM_FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """(places, velocities) as (y, x), each [num_frames, 2], by (1) and (2); velocities are those of each frame."""
    s = np.linspace(0, 1, num_frames)[:, None]
    falls = list(MOTIONS)[actor.motion] == 'falls'
    way = np.asarray(list(MOTIONS.values())[actor.motion]) * actor.way
    places = np.array([actor.thing.y, actor.thing.x]) + way * (s**2 if falls else s)
    return places, way * (2 * s if falls else np.ones_like(s)) / (num_frames - 1)


def draw(what: Play, side: int = SIDE) -> np.ndarray:
    """uint8 [16, side, side, 3]."""
    grid = (np.arange(side, dtype=np.float64) + 0.5) / side
    y, x = np.meshgrid(grid, grid, indexing='ij')
    frames = np.broadcast_to(background(what.background, x, y), (NUM_FRAMES, side, side, 3))
    for actor in sorted(what.actors, key=lambda actor: actor is what.actors[what.front]):
        down, right = (along[:, None, None] for along in path(actor)[0].T)
        coverage, color = layer(actor.thing._replace(x=0, y=0), x - right, y - down, 1 / side)
        frames = frames + coverage * (color - frames)
    return np.rint(frames).astype(np.uint8)
