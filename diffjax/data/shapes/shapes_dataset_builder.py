"""Captioned scenes of solids as a TFDS dataset: 20,000 train and 2,000 test pictures of 64 x 64, drawn by a program.

Each comes with its caption and with everything that is known of it, for text, control and detection. Some combinations
of shape and colour occur in the test split alone. `scenes.py` says what stands in a scene, `rendering.py` draws it.
"""

import io

import numpy as np
import tensorflow_datasets as tfds

from diffjax.data.shapes.rendering import SIDE, draw
from diffjax.data.shapes.scenes import CLASSES, MAX_OBJECTS, scene

NUM_EXAMPLES = {'train': 20_000, 'test': 2_000}


def _png(image: np.ndarray) -> io.BytesIO:
    """PNG bytes, which TFDS takes as they are. Level 1: half the time for a tenth more bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='PNG', compress_level=1)
    buffer.seek(0)
    return buffer


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes `image`, `caption`, `label` (the colour and shape that the caption names first), `objects` and maps.

    objects         `shape`, `color`, `size` int8 [4] into the names of scenes.py (-1: no object), from back to front;
                    `centre` float32 [4, 2] as (y, x) and `box` [4, 4] as (top, left, bottom, right), fractions
    segmentation    [64, 64, 1]: 0 the background, i the i-th object where it is seen
    edges           [64, 64, 1]: 255 where that changes
    """

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        maps = tfds.features.Image(shape=(SIDE, SIDE, 1), dtype=np.uint8, encoding_format='png')
        indices = tfds.features.Tensor(shape=(MAX_OBJECTS,), dtype=np.int8)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(SIDE, SIDE, 3), dtype=np.uint8, encoding_format='png'),
                    'caption': tfds.features.Text(),
                    'label': tfds.features.ClassLabel(names=CLASSES),
                    'shape': indices,
                    'color': indices,
                    'size': indices,
                    'centre': tfds.features.Tensor(shape=(MAX_OBJECTS, 2), dtype=np.float32),
                    'box': tfds.features.Tensor(shape=(MAX_OBJECTS, 4), dtype=np.float32),
                    'segmentation': maps,
                    'edges': maps,
                }
            ),
            supervised_keys=('image', 'label'),
            disable_shuffling=True,  # example i is scene i
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, number) for split, number in NUM_EXAMPLES.items()}

    def _generate_examples(self, split, number):
        for index in range(number):
            yield index, record(split, index)


def record(split: str, index: int) -> dict:
    """One example as TFDS takes it."""
    what = scene(split, index)
    picture = draw(what)

    def padded(rows, width, dtype):
        table = np.full((MAX_OBJECTS, width), -1, dtype)
        table[: len(rows)] = rows
        return table

    indices = padded([thing[:3] for thing in what.objects], 3, np.int8)
    return {
        'image': _png(picture.image),
        'caption': what.caption,
        'label': what.label,
        **{name: indices[:, i] for i, name in enumerate(('shape', 'color', 'size'))},
        'centre': padded([(thing.y, thing.x) for thing in what.objects], 2, np.float32),
        'box': padded(picture.boxes, 4, np.float32),
        'segmentation': _png(picture.segmentation),
        'edges': _png(picture.edges),
    }
