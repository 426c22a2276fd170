"""Moving digits as a TFDS dataset: 10,000 train and 1,000 test clips, grey, of 16 frames of 32 x 32.

One or two of the UCI handwritten digits fly straight and bounce off the walls, as in Moving MNIST (Srivastava et al.
2015, arXiv:1502.04681). Train clips show digits of the train split of `digits`, test clips those of its test split.
`flights.py` says what happens in a clip, and draws it.
"""

import functools

import numpy as np
import tensorflow_datasets as tfds

from diffjax.data.clips import MAX_ACTORS, NUM_FRAMES, clip_info, table
from diffjax.data.digits.digits_dataset_builder import split_digits
from diffjax.data.moving_digits.flights import SIDE, draw, flights, path

NUM_EXAMPLES = {'train': 10_000, 'test': 1_000}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes `video` uint8 `[16, 32, 32, 1]`, `label`, the class of the first digit, and what is known of the flights.

    number              1 or 2 digits
    digit               int8 [2], their classes (-1: no digit)
    id                  int32 [2], their places in scikit-learn's order
    position, velocity  float32 [16, 2, 2]: of each frame and digit (y, x), as fractions of the side, and of it in each
                        frame; -1 where there is no digit
    """

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        known = {
            'label': tfds.features.ClassLabel(num_classes=10),
            'number': tfds.features.Scalar(dtype=np.int32),
            'digit': tfds.features.Tensor(shape=(MAX_ACTORS,), dtype=np.int8),
            'id': tfds.features.Tensor(shape=(MAX_ACTORS,), dtype=np.int32),
            'position': tfds.features.Tensor(shape=(NUM_FRAMES, MAX_ACTORS, 2), dtype=np.float32),
            'velocity': tfds.features.Tensor(shape=(NUM_FRAMES, MAX_ACTORS, 2), dtype=np.float32),
        }
        return clip_info(self, __doc__, (NUM_FRAMES, SIDE, SIDE, 1), known)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, number) for split, number in NUM_EXAMPLES.items()}

    def _generate_examples(self, split, number):
        for index in range(number):
            yield index, record(split, index)


def record(split: str, index: int) -> dict:
    """One example as TFDS takes it."""
    images, classes, ids = _digits()[split]
    flown = flights(split, index, len(images))
    chosen = [flight.digit for flight in flown]
    places, velocities = zip(*map(path, flown))
    moving = (MAX_ACTORS, NUM_FRAMES, 2)
    return {
        'video': draw(images[chosen], places),
        'label': int(classes[chosen[0]]),
        'number': len(flown),
        'digit': table(classes[chosen], (MAX_ACTORS,), np.int8),
        'id': table(ids[chosen], (MAX_ACTORS,), np.int32),
        'position': table(places, moving, np.float32).swapaxes(0, 1),
        'velocity': table(velocities, moving, np.float32).swapaxes(0, 1),
    }


_digits = functools.cache(split_digits)
