"""Writing a dataset of encodings: each image or clip of a dataset through a function, into a TFDS dataset.

    write_encoded(out, 'shapes_latents', {'train': source}, encode, ...)   ->   out/shapes_latents/1.0.0

The examples of a split are cut into shards of a fixed number; process p of P writes shards p, p + P, ... A shard is
encoded in batches that begin with it, so that its bytes depend on neither what ran before nor on how many processes
there are, and it takes its name when it is whole: started again, the work goes on with the shards that are not there.
Process 0 gives the dataset its name at the end, with the moments of each latent channel in its metadata:

    mean_c = E[m_c],   std_c^2 = E[m_c^2 + s_c^2] - mean_c^2       for latents drawn from N(m, s^2)                (1)
"""

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.sources import KINDS, CorruptExample, Source

VERSION = '1.0.0'
MOMENTS = 'mean', 'std'
RECORD = 'encoding.json'  # what is being written here, beside the shards
LOCK = '.lock'  # of each process that writes, held until it ends, however it ends
Encode = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """The `encoding` section: which images or clips become latents, and where these are written."""

    dataset: str = ''  # '': the dataset that the first stage has learned from
    data_dir: str = ''  # where its images are; '': dataset.data_dir
    splits: str = ''  # names with commas between them; '': the splits of the section `dataset`
    out: str = ''  # the data_dir of the latents; '': WORKDIR/latents
    batch_size: int = 64
    examples_per_shard: int = 2048
    mirrored: bool = False  # each twice, the second time mirrored left to right
    on_corrupt: str = 'error'  # 'skip': images that cannot be decoded are left out and counted

    def __post_init__(self):
        if min(self.batch_size, self.examples_per_shard) < 1:
            raise ValueError(
                f'encoding.batch_size and examples_per_shard are at least 1, got {self.batch_size} and '
                f'{self.examples_per_shard}'
            )
        if self.mirrored and self.batch_size < 2:
            raise ValueError('encoding.mirrored needs a batch_size of at least 2, an image and its mirror image')
        if self.on_corrupt not in ('error', 'skip'):
            raise ValueError(f"encoding.on_corrupt is 'error' or 'skip', got {self.on_corrupt!r}")


def write_encoded(
    out: Path,
    name: str,
    sources: Mapping[str, Source],
    encode: Encode,
    settings: EncodingSettings,
    *,
    encoder: Mapping[str, Any],
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[int], Any] = lambda done: None,
) -> Path:
    """Encodes whole splits and returns the dataset's folder; where it is there already, nothing is done.

    Args:
      encode: uint8 `[settings.batch_size, (T,) H, W, C]` -> arrays, one row each: `mean` and `std`, and others.
      encoder: what tells this encoding from others, as JSON; kept in the metadata.
      process: (index, number of processes).
      wait: until every process is here.
      progress: is told how many images have been done, those of shards that were there at once.

    Raises `CorruptExample` at an image that cannot be decoded, and ValueError where `out` holds another encoding.
    """
    final = out / name / VERSION
    record = {'encoder': dict(encoder), **_described(sources, settings)}
    if final.exists():
        _check_same(final / RECORD, record)
        return final
    unfinished = out / name / f'{VERSION}.unfinished'
    unfinished.mkdir(parents=True, exist_ok=True)
    if (unfinished / RECORD).exists():
        _check_same(unfinished / RECORD, record)
    elif process[0] == 0:
        _write_json(unfinished / RECORD, record)
    wait()
    with _alone(unfinished, process):
        _write_shards(unfinished, name, sources, encode, settings, process, progress)
        wait()
        if process[0] == 0:
            _finish(unfinished, name, sources, encode, record, settings)
            os.replace(unfinished, final)
    wait()
    return final


@contextlib.contextmanager
def _alone(folder: Path, process: tuple[int, int]) -> Iterator[None]:
    """Holds the lock of this process's part. Raises ValueError where another run is at it."""
    with open(folder / f'{LOCK}-{process[0]}', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f'{folder} is being written by another run: wait for it, then run this again') from error
        yield


def _write_shards(unfinished: Path, name: str, sources, encode: Encode, settings, process, progress) -> None:
    features = None
    for split, source in sources.items():
        for index in range(_num_shards(source, settings)):
            if index % process[1] == process[0]:
                stem = unfinished / _shard_name(name, split, index, _num_shards(source, settings))
                first = index * settings.examples_per_shard
                indices = range(first, min(first + settings.examples_per_shard, len(source)))
                if not stem.with_name(stem.name + '.json').exists():
                    features = features or _features(source, encode, settings)
                    _write_shard(stem, source, indices, encode, features, settings, progress)
                else:
                    progress(len(indices))


def _described(sources: Mapping[str, Source], settings: EncodingSettings) -> dict[str, Any]:
    first = next(iter(sources.values()))
    return {
        'splits': {split: len(source) for split, source in sources.items()},
        'source': first.name,
        'image_shape': list(first.image_shape),
        **({'frame_rate': first.frame_rate} if first.kind == 'video' else {}),
        'cropped': first.cropped,
        'examples_per_shard': settings.examples_per_shard,
        'batch_size': settings.batch_size,
        'mirrored': settings.mirrored,
        'on_corrupt': settings.on_corrupt,
    }


def _check_same(path: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError where a folder holds something else than what is to be written there."""
    there = json.loads(path.read_text()) if path.exists() else {}
    here = json.loads(json.dumps(record))
    if different := [key for key in here if there.get(key) != here[key]]:
        raise ValueError(
            f'{path.parent} holds latents of another kind ({different[0]}: {there.get(different[0])!r} there and '
            f'{here[different[0]]!r} here). Give another encoding.out, or remove that folder; nothing was changed.'
        )


def _num_shards(source: Source, settings: EncodingSettings) -> int:
    return max(-(-len(source) // settings.examples_per_shard), 1)


def _shard_name(name: str, split: str, index: int, number: int) -> str:
    return f'{name}-{split}.array_record-{index:05d}-of-{number:05d}'


def _features(source: Source, encode: Encode, settings: EncodingSettings):
    """TFDS's features of the encodings; what else the source tells of an image goes along, other pictures do not."""
    import tensorflow_datasets as tfds

    blank = np.zeros((settings.batch_size, *source.image_shape), np.uint8)
    made = encode(blank)
    latents = {key: tfds.features.Tensor(shape=a.shape[1:], dtype=a.dtype.type) for key, a in made.items()}
    kept = {
        key: feature
        for key, feature in source.features.items()
        if not isinstance(feature, tfds.features.Image)
        and key not in KINDS[source.kind]
        and (key == 'label' or not settings.mirrored)
    }
    if settings.mirrored:
        latents['mirrored'] = tfds.features.Scalar(np.bool_)
    return tfds.features.FeaturesDict({**latents, **kept})


def _encoded(
    source: Source, indices: range, encode: Encode, settings: EncodingSettings, progress: Callable[[int], Any]
) -> Iterator[dict[str, Any]]:
    """The examples of a shard as TFDS takes them, one after the other; None for each that was left out."""
    sides = (False, True) if settings.mirrored else (False,)
    size = settings.batch_size // len(sides) or 1
    for start in range(0, len(indices), size):
        images, records = [], []
        for index in indices[start : start + size]:
            try:
                record, pixels = source.record_and_pixels(index)
            except CorruptExample:
                if settings.on_corrupt == 'error':
                    raise
                yield None
                continue
            for mirrored in sides:
                images.append(pixels[..., ::-1, :] if mirrored else pixels)
                records.append(record | ({'mirrored': mirrored} if settings.mirrored else {}))
        if images:
            batch = np.zeros((settings.batch_size, *source.image_shape), np.uint8)
            batch[: len(images)] = images
            made = {key: np.asarray(a) for key, a in encode(batch).items()}
            for i, record in enumerate(records):
                yield record | {key: a[i] for key, a in made.items()}
        progress(len(indices[start : start + size]))


def _write_shard(stem: Path, source: Source, indices: range, encode, features, settings, progress) -> None:
    """Shard and what is known of it, each under a name of its own until it is whole."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    to_proto = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info()).get_tf_example
    part = stem.with_name(stem.name + '.part')
    facts = {'length': 0, 'num_bytes': 0, 'skipped': 0, 'count': 0}
    sums = np.zeros(0)
    with contextlib.closing(ArrayRecordWriter(os.fspath(part), 'group_size:1')) as writer:
        for example in _encoded(source, indices, encode, settings, progress):
            if example is None:
                facts['skipped'] += 1
                continue
            proto = to_proto(features.encode_example({key: _plain(example[key]) for key in features}))
            encoded = proto.SerializeToString(deterministic=True)  # else the order of features is each process's own
            writer.write(encoded)
            facts['length'] += 1
            facts['num_bytes'] += len(encoded)
            if wrong := [key for key in features if not _is_finite(example[key])]:
                raise ValueError(
                    f'{wrong[0]} of an example of {stem.name} is not finite as {example[wrong[0]].dtype}: has the '
                    'first stage been trained?'
                )
            if 'std' in example:
                mean, std = (
                    np.asarray(example[key], np.float64).reshape(-1, example[key].shape[-1]) for key in MOMENTS
                )
                facts['count'] += len(mean)
                sums = (sums if sums.size else 0) + np.stack([mean.sum(0), (mean**2 + std**2).sum(0)])
    os.replace(part, stem)
    _write_json(stem.with_name(stem.name + '.json'), facts | {'sums': sums.tolist()})


def _is_finite(value: Any) -> bool:
    return np.asarray(value).dtype.kind != 'f' or bool(np.isfinite(value).all())


def _plain(value: Any) -> Any:
    """Scalars as TFDS's features want them."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and not np.ndim(value) else value


def _finish(folder: Path, name: str, sources, encode: Encode, record: Mapping[str, Any], settings) -> None:
    """The metadata by which TFDS reads the shards."""
    import tensorflow_datasets as tfds

    features = _features(next(iter(sources.values())), encode, settings)
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix='array_record')
    splits, moments, skipped = [], {}, {}
    for split, source in sources.items():
        number = _num_shards(source, settings)
        paths = [folder / (_shard_name(name, split, i, number) + '.json') for i in range(number)]
        facts = [json.loads(path.read_text()) for path in paths]
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[fact['length'] for fact in facts],
                num_bytes=sum(fact['num_bytes'] for fact in facts),
                filename_template=template.replace(split=split),
            )
        )
        skipped[split] = sum(fact['skipped'] for fact in facts)
        count = sum(fact['count'] for fact in facts)
        if count:
            mean, square = np.sum([fact['sums'] for fact in facts if fact['count']], axis=0) / count
            moments[split] = {'mean': mean.tolist(), 'std': np.sqrt(square - mean**2).tolist()}
    _write_json(folder / RECORD, {**record, 'skipped': skipped})
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features,
            split_infos=splits,
            filename_template=template,
            version=VERSION,
            check_data=False,
            description=f'Encodings of {record["source"]}.',
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                {'latents': moments, 'skipped': skipped, 'encoder': record['encoder']}
                | {key: record[key] for key in ('frame_rate',) if key in record}
            ),
        )
    for path in (*folder.glob('*.array_record-*.json'), *folder.glob(f'{LOCK}-*')):
        path.unlink()


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + '.part')
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')
    os.replace(part, path)
