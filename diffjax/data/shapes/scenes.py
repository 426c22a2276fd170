"""What stands in a scene: one to four solids, where, before what background, and a caption that is true of it.

A scene is a pure function of its split and index. Every choice reads the next uniform number of a stream that belongs
to this index alone (`data/streams.py`), so that scene i is the same whichever others are made, on any machine and with
any release of NumPy.

Objects come in groups that share shape, colour and size, at most three of them. The caption names every group; a
relation that it states holds between each member of the one and each of the other:

    a small red cube left of two blue spheres
    three large green cones above an orange cylinder and left of a blue cube, on a grey background

Coordinates are fractions of the picture's side, x to the right and y down. Later objects stand in front.
"""

from typing import NamedTuple

import numpy as np

from diffjax.data.streams import Stream

SHAPES = ('cube', 'sphere', 'cone', 'cylinder')
COLORS = {
    'red': (214, 47, 47),
    'green': (46, 158, 68),
    'blue': (49, 95, 212),
    'yellow': (236, 200, 42),
    'purple': (139, 63, 178),
    'orange': (238, 129, 36),
}
SIZES = {'small': 0.105, 'medium': 0.155, 'large': 0.215}  # radius
BACKGROUNDS = {
    'white': (244, 244, 242),
    'grey': (168, 170, 174),
    'black': (34, 35, 38),
    'cyan': (160, 222, 226),
    'pink': (244, 196, 208),
    'brown': (121, 92, 70),
}
CLASSES = tuple(f'{color} {shape}' for shape in SHAPES for color in COLORS)
HELD_OUT = (('cube', 'purple'), ('sphere', 'green'), ('cone', 'blue'), ('cylinder', 'yellow'))  # in the test split only
MAX_OBJECTS = 4
SPLIT_KEYS = {'train': 0x5A1E5, 'test': 0x7E57}

# Members of the groups: one to four objects in one to three groups.
GROUPINGS = ((1,), (2,), (3,), (4,), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (1, 1, 1), (1, 1, 2))
NUMBERS = ('', 'a', 'two', 'three', 'four')
RELATION_MARGIN = 0.04  # between centres, beyond which one is left of, or above, the other


class Object(NamedTuple):
    """One solid: indices into SHAPES, COLORS and SIZES, and its centre."""

    shape: int
    color: int
    size: int
    x: float
    y: float

    @property
    def radius(self) -> float:
        return list(SIZES.values())[self.size]


class Background(NamedTuple):
    """Flat, or a gradient from `first` to `second` along the direction (cos angle, sin angle)."""

    first: str
    second: str
    angle: float


class Scene(NamedTuple):
    objects: tuple[Object, ...]  # from back to front
    background: Background
    caption: str
    subject: tuple[int, int]  # shape and color of what the caption names first

    @property
    def label(self) -> int:
        """A class for conditional models: the subject's shape and colour, as one of CLASSES."""
        return self.subject[0] * len(COLORS) + self.subject[1]


def scene(split: str, index: int) -> Scene:
    """Scene `index` of a split, 'train' or 'test'. Raises ValueError for another split or a negative index."""
    if split not in SPLIT_KEYS or index < 0:
        raise ValueError(f'shapes has the splits {", ".join(SPLIT_KEYS)} with indices from 0; got {split!r}, {index}')
    stream = Stream(SPLIT_KEYS[split], index)
    kinds = _kinds(stream, split)
    counts = stream.choice([grouping for grouping in GROUPINGS if len(grouping) == len(kinds)])
    members = [kind for kind, count in zip(kinds, counts) for _ in range(count)]
    places = _places(stream, [list(SIZES.values())[size] for _, _, size in members])
    objects = [Object(*kind, *place) for kind, place in zip(members, places)]
    starts = np.cumsum([0, *counts])
    groups = [objects[a:b] for a, b in zip(starts, starts[1:])]
    first, second = stream.choice(list(BACKGROUNDS)), stream.choice(list(BACKGROUNDS))
    background = Background(first, first if stream.uniform() < 0.5 else second, stream.uniform(0, 2 * np.pi))
    caption = _caption(stream, groups, background)
    order = sorted(range(len(objects)), key=lambda i: objects[i].y + objects[i].radius)  # lower stands nearer
    return Scene(tuple(objects[i] for i in order), background, caption, kinds[0][:2])


def _kinds(stream: Stream, split: str) -> list[tuple[int, int, int]]:
    """One to three different (shape, colour, size), none of the held-out ones in the train split."""
    kinds: list[tuple[int, int, int]] = []
    number = stream.choice((1, 2, 2, 3))
    while len(kinds) < number:
        shape, color, size = (stream.choice(range(len(names))) for names in (SHAPES, COLORS, SIZES))
        held_out = (SHAPES[shape], list(COLORS)[color]) in HELD_OUT
        if not (held_out and split == 'train') and (shape, color) not in [kind[:2] for kind in kinds]:
            kinds.append((shape, color, size))
    return kinds


def _places(stream: Stream, radii: list[float]) -> list[tuple[float, float]]:
    """Centres: whole inside the picture, and overlapping little. The room asked for shrinks until all find a place."""
    room = 0.95
    while True:
        places: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(20):
                x, y = stream.uniform(radius, 1 - radius), stream.uniform(radius, 1 - radius)
                if all(np.hypot(x - a, y - b) > room * (radius + r) for (a, b), r in zip(places, radii)):
                    places.append((x, y))
                    break
        if len(places) == len(radii):
            return places
        room *= 0.95


def _relations(a: list[Object], b: list[Object]) -> list[str]:
    """What is true of every pair of members."""

    def before(one, other, axis):
        return max(getattr(o, axis) for o in one) + RELATION_MARGIN < min(getattr(o, axis) for o in other)

    true = {
        'left of': before(a, b, 'x'),
        'right of': before(b, a, 'x'),
        'above': before(a, b, 'y'),
        'below': before(b, a, 'y'),
    }
    return [name for name, holds in true.items() if holds]


def _caption(stream: Stream, groups: list[list[Object]], background: Background) -> str:
    nouns = [_noun(stream, group) for group in groups]
    text = nouns[0]
    for i, (noun, group) in enumerate(zip(nouns[1:], groups[1:])):
        relations = _relations(groups[0], group)
        relation = stream.choice(relations) if relations else 'beside'
        text += f' {"and " if i else ""}{relation} {noun}'
    if stream.uniform() < 0.5:
        return text
    if background.first == background.second:
        return f'{text}, on a {background.first} background'
    return f'{text}, on a background from {background.first} to {background.second}'


def _noun(stream: Stream, group: list[Object]) -> str:
    one = group[0]
    size = f'{list(SIZES)[one.size]} ' if stream.uniform() < 0.75 else ''
    words = f'{size}{list(COLORS)[one.color]} {SHAPES[one.shape]}{"s" if len(group) > 1 else ""}'
    number = 'an' if len(group) == 1 and words[0] in 'aeiou' else NUMBERS[len(group)]
    return f'{number} {words}'
