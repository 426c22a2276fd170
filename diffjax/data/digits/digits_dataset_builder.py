"""The UCI handwritten digits as a TFDS dataset: 1,797 real 8x8 images, 1,437 train and 360 test.

The images come inside scikit-learn, so preparing the dataset downloads nothing. Their pixels count ink from 0 to 16;
here they are stored as bytes,

    byte = round(ink * 255 / 16)        ink = round(byte * 16 / 255)        (1)

which is exactly invertible. The split is a permutation by a fixed seed: the first 1,437 of it train, the rest test.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

import io

import numpy as np
import tensorflow_datasets as tfds

PERMUTATION_SEED = 0
NUM_TRAIN = 1437
MAX_INK = 16

_CITATION = """@misc{digits, title={Optical Recognition of Handwritten Digits}, author={Alpaydin, E. and Kaynak, C.},
year={1998}, howpublished={UCI Machine Learning Repository}, doi={10.24432/C50P49}}"""


def _png(image: np.ndarray) -> io.BytesIO:
    """PNG bytes of a uint8 `[H, W]` image. TFDS takes bytes as they are, while an array would need TensorFlow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='PNG')
    buffer.seek(0)
    return buffer


class Builder(tfds.core.GeneratorBasedBuilder):
    """Writes `image` uint8 `[8, 8, 1]`, `label` 0..9 and `id`, the example's place in scikit-learn's order."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            citation=_CITATION,
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format='png'),
                    'label': tfds.features.ClassLabel(num_classes=10),
                    'id': tfds.features.Scalar(dtype=np.int32),
                }
            ),
            supervised_keys=('image', 'label'),
            disable_shuffling=True,  # the permutation below is the order on disk
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(*digits) for split, digits in split_digits().items()}

    def _generate_examples(self, images, labels, ids):
        images = np.rint(images * 255 / MAX_INK).astype(np.uint8)
        for position, (image, label, i) in enumerate(zip(images, labels, ids)):
            yield position, {'image': _png(image), 'label': int(label), 'id': int(i)}


def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """split -> (ink [N, 8, 8] from 0 to 16, classes [N], places in scikit-learn's order [N])."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState, because NumPy freezes its stream for ever, while that of default_rng may change between releases.
    order = np.random.RandomState(PERMUTATION_SEED).permutation(len(digits.images))  # noqa: NPY002
    ids = {'train': order[:NUM_TRAIN], 'test': order[NUM_TRAIN:]}
    return {split: (digits.images[chosen], digits.target[chosen], chosen) for split, chosen in ids.items()}
