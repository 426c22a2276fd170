"""What the embedded datasets of clips have in common: their length, their rate, and how they are written."""

import numpy as np

NUM_FRAMES = 16
FRAME_RATE = 8.0  # frames per second at which a clip is meant to be seen
MAX_ACTORS = 2  # of what moves in a clip; tables have so many rows


def clip_info(builder, description: str, shape: tuple[int, ...], features: dict):
    """TFDS's facts of a dataset of clips: `video` uint8 `[T, H, W, C]`, compressed by zlib, and other features."""
    import tensorflow_datasets as tfds

    video = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding='zlib')
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({'video': video, **features}),
        metadata=tfds.core.MetadataDict(frame_rate=FRAME_RATE),
        disable_shuffling=True,  # example i is clip i
    )


def table(rows, shape: tuple[int, ...], dtype) -> np.ndarray:
    """[len(rows), ...] filled up to `shape` with -1."""
    rows = np.asarray(rows, dtype)
    filled = np.full(shape, -1, dtype)
    filled[: len(rows)] = rows
    return filled
