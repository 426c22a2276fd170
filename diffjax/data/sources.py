"""Opening a prepared dataset: `open_source(name, split) -> Source`, random access to examples as NumPy arrays.

Any TFDS dataset with a feature `image` (and, if it has one, a class feature `label`) is an image source; one with a
tensor `video` `[T, H, W, C]` is a source of clips; one with the features `mean` and `std` is a source of latents, of
images or of clips. Files are read as array_record through TFDS's `as_data_source`, without TensorFlow and without the
network.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.images import decode, encode
from diffjax.data.metadata import check_metadata
from diffjax.data.preparation import (
    EMBEDDED,
    LATENTS,
    OURS,
    DatasetNotPrepared,
    base_name,
    explain_missing,
    latent_features,
    prepare_quietly,
    published_features,
    resolve_data_dir,
)

KINDS = {'image': ('image',), 'video': ('video',), 'latent': ('mean', 'std')}  # kind -> what its examples hold
DELIVERED = (*(name for names in KINDS.values() for name in names), 'label')  # unasked


class CorruptExample(ValueError):
    """An example of a dataset that cannot be read. The message names it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One split of a dataset, with the facts that a model needs.

    `source[i]` is a dict of NumPy arrays: `image` uint8 `[H, W, C]` for kind 'image', `video` uint8 `[T, H, W, C]` for
    kind 'video', `mean` and `std` float `[H, W, C]` or `[T, H, W, C]` for kind 'latent', and `label`, an int32 scalar,
    where the dataset has one (`num_classes` > 0). Beside them stand the `annotations` that were asked for, under their
    own names.
    """

    name: str
    split: str
    kind: str  # 'image', 'video' or 'latent'
    image_shape: tuple[int, ...]  # [H, W, C], of the latents for kind 'latent'; of clips [T, H, W, C]
    num_classes: int  # 0: no labels
    num_bytes: int  # of all examples, decoded
    records: Sequence[dict[str, Any]]
    annotations: Mapping[str, Callable[[Any], np.ndarray]] = field(default_factory=dict)  # each reads a record's value
    features: Mapping[str, Any] = field(default_factory=dict)  # TFDS's connectors of all that a record holds
    cropped: bool = False  # images are cut to their middle square and resized
    moments: Mapping[str, Any] = field(default_factory=dict)  # `mean` and `std` [C] of drawn latents, where known
    encoder: Mapping[str, Any] = field(default_factory=dict)  # what has made them, as `write_encoded` was told
    frame_rate: float = 0.0  # of clips, also those that are latents here, in frames per second; 0: not known
    frames: tuple[int | None, ...] = (None,)  # of `slice`: those that clips are read with

    @property
    def num_examples(self) -> int:
        return len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._example(*self._records([index]), index)

    def _records(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Those on disk. Raises `CorruptExample` where their file cannot be read."""
        try:
            return [self.records[indices[0]]] if len(indices) == 1 else self.records.__getitems__(indices)
        except (RuntimeError, KeyError) as error:  # of array_record: no such file, or its checksums differ; of TFDS
            raise CorruptExample(
                f'Example {indices[0]} of {self.name!r}, split {self.split!r}, cannot be read: {error}'
            ) from error

    def record_and_pixels(self, index: int) -> tuple[dict[str, Any], np.ndarray]:
        """Example `index` as it is on disk, and its image or clip, uint8. Raises `CorruptExample`."""
        (record,) = self._records([index])
        return record, self._example(record, index)[self.kind]

    def _example(self, record: dict[str, Any], index: int) -> dict[str, np.ndarray]:
        if self.kind == 'image':
            try:
                example = {'image': decode(record['image'], self.image_shape, cropped=self.cropped)}
            except (OSError, ValueError, SyntaxError) as error:  # all of which Pillow raises
                raise CorruptExample(
                    f'The image of example {index} of {self.name!r}, split {self.split!r}, cannot be decoded: {error}'
                ) from error
        elif self.kind == 'video':
            example = {'video': record['video'][slice(*self.frames)]}
        else:
            example = {'mean': record['mean'], 'std': record['std']}
        if self.num_classes:
            example['label'] = np.asarray(record['label'], np.int32)
            if not 0 <= example['label'] < self.num_classes:
                raise CorruptExample(
                    f'The label of example {index} of {self.name!r}, split {self.split!r}, is {example["label"]}, and '
                    f'its {self.num_classes} classes are 0 to {self.num_classes - 1}'
                )
        return example | {name: read(record[name]) for name, read in self.annotations.items()}

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at the given indices, at least one, read from disk and stacked: a dict of arrays `[n, ...]`."""
        indices = [int(i) for i in indices]
        examples = [self._example(record, i) for i, record in zip(indices, self._records(indices))]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every example, in the order on disk, decoded once and then kept in memory: read-only arrays `[N, ...]`."""
        arrays = self.read(range(len(self)))
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    def clipped(self, num_frames: int, stride: int = 1) -> 'Source':
        """Clips of so many frames: the first, and every `stride`-th. Annotations stay those of the whole clip.

        Raises ValueError where the clips are too short.
        """
        whole = self.image_shape[0]
        most = -(-whole // stride)
        if not 1 <= num_frames <= most:
            raise ValueError(
                f'{self.name!r} has clips of {whole} frames, of which with stride {stride} from 1 to {most} can be '
                f'taken, and not {num_frames}'
            )
        if (num_frames, stride) == (whole, 1):
            return self
        return dataclasses.replace(
            self,
            image_shape=(num_frames, *self.image_shape[1:]),
            num_bytes=self.num_bytes // whole * num_frames,
            frame_rate=self.frame_rate / stride,
            frames=(0, num_frames * stride, stride),
        )


def _find_builder(name: str, data_dir: str | os.PathLike | None):
    """The builder of a dataset on disk, embedded ones prepared on first use. It reads; it cannot generate."""
    import tensorflow_datasets as tfds

    base, root = base_name(name), resolve_data_dir(data_dir)
    check_metadata(root, base)
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError):
        pass
    except Exception as error:  # TFDS, protobuf and JSON raise their own, all of which mean the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f'The dataset {name!r} in {root / base} is damaged: {reason} Remove it, and prepare it anew.'
        ) from error
    if name in EMBEDDED:
        return tfds.builder_from_directory(prepare_quietly(name, root))
    missing = explain_missing(name, data_dir)
    configs = sorted(path.parent.parent.name for path in root.glob(f'{base}/*/*/dataset_info.json'))
    if configs:
        raise ValueError(f'{name!r} has configurations in {root}: ask for {base}/ and one of {configs}.')
    raise missing


def _facts(name: str, features: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Kind, image shape, number of classes and decoded bytes per example. Raises ValueError for other datasets."""
    kind = next((kind for kind, names in KINDS.items() if all(name in features for name in names)), None)
    if kind is None:
        raise ValueError(f'{name!r} is no image dataset: its features are {sorted(features)}, none called image.')
    feature, ranks = features[KINDS[kind][0]], {'image': (3,), 'video': (4,), 'latent': (3, 4)}[kind]
    shape = feature.shape
    if resolution and kind == 'video':
        raise ValueError(f'dataset.resolution crops images, and {name!r} has clips: leave it at 0.')
    if resolution and kind == 'image':
        shape = (resolution, resolution, *shape[2:])
    if len(shape) not in ranks or None in shape or (kind != 'latent' and shape[-1] not in (1, 3, 4)):
        right = (
            'clips are tensors of one fixed [T, H, W, C], C = 1, 3 or 4.'
            if kind == 'video'
            else 'batches need one fixed [H, W, C], C = 1, 3 or 4: give a dataset.resolution, such as 256, to which '
            'they are cropped.'
        )
        raise ValueError(f'{name!r} has {kind}s of shape {shape}; {right}')
    dtype = np.dtype(feature.np_dtype)
    if kind != 'latent' and dtype != np.uint8:
        raise ValueError(f'{name!r} has {kind}s of type {dtype}, expected uint8.')
    return {
        'kind': kind,
        'image_shape': tuple(shape),
        'num_classes': getattr(features.get('label'), 'num_classes', None) or 0,
        'num_bytes': len(KINDS[kind]) * math.prod(shape) * dtype.itemsize,
        'cropped': bool(resolution),
    }


def _annotations(
    name: str, features: Mapping[str, Any], wanted: Sequence[str]
) -> tuple[dict[str, Callable[[Any], np.ndarray]], int]:
    """(what reads each, the bytes of all in one example). Raises ValueError for what is no array of fixed shape."""
    import tensorflow_datasets as tfds

    def is_array(feature):
        shape = feature.shape
        return isinstance(shape, tuple) and None not in shape and np.dtype(feature.np_dtype).kind in 'biuf'

    known = sorted(key for key in features if key not in DELIVERED and is_array(features[key]))
    if unknown := [key for key in wanted if key not in known]:
        raise ValueError(
            f'{name!r} has no annotation {unknown[0]!r} that is an array; it has: {", ".join(known) or "none"}.'
        )
    readers, num_bytes = {}, 0
    for key in wanted:
        is_map, shape = isinstance(features[key], tfds.features.Image), tuple(features[key].shape)
        readers[key] = functools.partial(decode, shape=shape) if is_map else np.asarray
        num_bytes += math.prod(shape) * np.dtype(features[key].np_dtype).itemsize
    return readers, num_bytes


def list_splits(name: str, *, data_dir: str | os.PathLike | None = None) -> dict[str, int]:
    """The splits of a dataset and their numbers of examples. Raises what `open_source` raises."""
    splits = _find_builder(name, data_dir).info.splits
    return {split: info.num_examples for split, info in splits.items()}


def _num_examples(builder, name: str, split: str) -> int:
    """Of a split or a slice of it. Raises ValueError for what is neither."""
    try:
        info = builder.info.splits[split]
        files = [Path(each.filename) for each in info.file_instructions] if info.num_examples else []
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f'{name!r} has no split {split!r}; its splits are {sorted(builder.info.splits)}, of which parts are '
            'written train[:90%]'
        ) from error
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f'{name!r}, split {split!r}: {missing[0]} is not there, one of its files. Prepare it anew.')
    home = Path(builder.data_dir).resolve()
    if strays := [file for file in files if not file.resolve().is_relative_to(home)]:
        raise ValueError(f'{strays[0]} is a link that leads out of its dataset: copy what it means into the folder')
    return info.num_examples


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    resolution: int = 0,
    annotations: Sequence[str] = (),
) -> Source:
    """Open a split of a dataset that is on disk.

    The embedded ones (`digits`, say) are written on their first use, which takes seconds and no network.

    Args:
      name: `digits`, `imagenet256_latents`, or any prepared TFDS image dataset, `name[/config][:version]`.
      split: a split's name, or a slice of it as in TFDS: `train[:90%]`.
      data_dir: where datasets live; TFDS's default directory for None.
      resolution: images are cropped to their middle square and resized to so many pixels; 0: all have one size already.
      annotations: further features of the dataset that examples shall hold: numbers, tables and maps of a fixed shape,
        such as `shape`, `centre` or `segmentation` of `shapes`, in the dataset's own dtypes. None are read unasked.

    Raises `DatasetNotPrepared` with the way to prepare it, `UnknownDataset` for a name that nobody knows, and
    ValueError for a split or an annotation that does not exist, or a dataset without images of one size.
    """
    import tensorflow_datasets as tfds

    builder = _find_builder(name, data_dir)
    if split.isidentifier() and split not in builder.info.splits:
        raise ValueError(f'{name!r} has no split {split!r}; its splits are {sorted(builder.info.splits)}.')
    length = _num_examples(builder, name, split)
    features = dict(builder.info.features.items())
    facts = _facts(name, features, resolution)
    readers, num_bytes = _annotations(name, features, annotations)
    pictures = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in pictures} or None
    try:
        records = builder.as_data_source(split=split, decoders=decoders) if length else ()
    except NotImplementedError as error:
        raise DatasetNotPrepared(
            f'The dataset {name!r} in {builder.data_dir} is not array_record: remove it, or give another data_dir, '
            f'and run: python -m diffjax.data prepare {name}'
        ) from error
    facts['num_bytes'] = (facts['num_bytes'] + num_bytes) * len(records)
    metadata = builder.info.metadata or {}
    return Source(
        name=name,
        split=split,
        records=records,
        annotations=readers,
        features=features,
        moments=(metadata.get('latents') or {}).get(split.partition('[')[0], {}),
        encoder=metadata.get('encoder') or {},
        frame_rate=float(metadata.get('frame_rate') or 0),
        **facts,
    )


def blank_source(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Source:
    """One blank example in the place of a dataset that is not prepared: what sampling has to know of it.

    It stands for latents of ours, and for a dataset of TFDS whose images have one size. Raises `DatasetNotPrepared`, as
    `open_source` does, for any other.
    """
    missing = explain_missing(name, data_dir)
    if name in LATENTS:
        features = latent_features(name)
        example = {key: np.zeros(features[key].shape, features[key].np_dtype) for key in features}
        return Source(name=name, split=split, records=(example,), **_facts(name, features, 0))
    if not isinstance(missing, DatasetNotPrepared) or name in OURS or name != base_name(name):
        raise missing
    try:
        features = published_features(name)
    except ImportError:  # a builder that needs TensorFlow to tell what it holds
        raise missing from None
    shape = features['image'].shape if 'image' in features else (None,)
    if None in shape:
        raise missing
    example = {'image': encode(np.zeros(shape, np.uint8)), 'label': 0}
    return Source(name=name, split=split, records=(example,), **_facts(name, features, 0))
