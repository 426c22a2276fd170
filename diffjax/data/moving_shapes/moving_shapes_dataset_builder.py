"""Moving shapes as a TFDS dataset: 10,000 train and 1,000 test clips with captions, 16 frames of 32 x 32, RGB.

One or two of the solids of `shapes`, each of which stands still, moves, rises or falls. 32 pixels, because a network
that learns clips of 64 x 64 costs four times as much, and what the captions say is seen at 32. `plays.py` says what
happens in a clip, and draws it.
"""

import numpy as np
import tensorflow_datasets as tfds

from diffjax.data.clips import MAX_ACTORS, NUM_FRAMES, clip_info, table
from diffjax.data.moving_shapes.plays import SIDE, draw, path, play
from diffjax.data.shapes.scenes import CLASSES

NUM_EXAMPLES = {'train': 10_000, 'test': 1_000}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes `video` uint8 `[16, 32, 32, 3]`, `caption`, `label`, the colour and shape named first, and the play.

    number                      1 or 2 solids
    shape, color, size, motion  int8 [2] into the names of shapes/scenes.py and MOTIONS, in the caption's order (-1:
                                none)
    front                       which of them is in front
    position, velocity          float32 [16, 2, 2]: of each frame and solid (y, x), as fractions of the side, and of it
                                in each frame; -1 where there is none
    """

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        indices = tfds.features.Tensor(shape=(MAX_ACTORS,), dtype=np.int8)
        known = {
            'caption': tfds.features.Text(),
            'label': tfds.features.ClassLabel(names=CLASSES),
            'number': tfds.features.Scalar(dtype=np.int32),
            **dict.fromkeys(('shape', 'color', 'size', 'motion'), indices),
            'front': tfds.features.Scalar(dtype=np.int32),
            'position': tfds.features.Tensor(shape=(NUM_FRAMES, MAX_ACTORS, 2), dtype=np.float32),
            'velocity': tfds.features.Tensor(shape=(NUM_FRAMES, MAX_ACTORS, 2), dtype=np.float32),
        }
        return clip_info(self, __doc__, (NUM_FRAMES, SIDE, SIDE, 3), known)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, number) for split, number in NUM_EXAMPLES.items()}

    def _generate_examples(self, split, number):
        for index in range(number):
            yield index, record(split, index)


def record(split: str, index: int) -> dict:
    """One example as TFDS takes it."""
    what = play(split, index)
    places, velocities = zip(*map(path, what.actors))
    moving = (MAX_ACTORS, NUM_FRAMES, 2)
    indices = table([(*actor.thing[:3], actor.motion) for actor in what.actors], (MAX_ACTORS, 4), np.int8)
    return {
        'video': draw(what),
        'caption': what.caption,
        'label': what.label,
        'number': len(what.actors),
        **{name: indices[:, i] for i, name in enumerate(('shape', 'color', 'size', 'motion'))},
        'front': what.front,
        'position': table(places, moving, np.float32).swapaxes(0, 1),
        'velocity': table(velocities, moving, np.float32).swapaxes(0, 1),
    }
