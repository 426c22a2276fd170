"""Writing datasets to disk as array_record, and the clear words when one is not there.

Our own builders live beside this file: `digits` (its images come inside scikit-learn), `shapes` (drawn here) and clips
of both in motion, `moving_digits` and `moving_shapes`, all embedded; and `imagenet256_latents` and
`imagenet512_latents`, written from shards that the user computed. Any other name is a builder of TFDS itself, which
needs TensorFlow once, to download and to write; reading never does.
"""

import contextlib
import difflib
import importlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

EMBEDDED = ('digits', 'shapes', 'moving_digits', 'moving_shapes')
LATENTS = ('imagenet256_latents', 'imagenet512_latents')
OURS = (*EMBEDDED, *LATENTS)


class DatasetNotPrepared(ValueError):
    """A known dataset is not on disk. The message says what is missing, where it was sought and how to prepare it."""


class UnknownDataset(ValueError):
    """No dataset of that name exists, neither on disk nor as a builder. The message suggests names that do."""


def default_data_dir() -> Path:
    """TFDS's default directory: `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`."""
    return Path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()


def resolve_data_dir(data_dir: str | os.PathLike | None) -> Path:
    """`data_dir` as a path, with TFDS's default directory for None."""
    return Path(data_dir).expanduser() if data_dir else default_data_dir()


def base_name(name: str) -> str:
    """The bare dataset name of `name[/config][:version]`. Raises ValueError for anything else."""
    parts = re.fullmatch(r'([a-z]\w*)(/[\w.+-]+)?(:[\d*]+\.[\d*]+\.[\d*]+)?', name, re.ASCII | re.IGNORECASE)
    if not parts:
        raise ValueError(f'A dataset is called name[/config][:version], for example mnist:3.0.1, but not {name!r}.')
    return parts[1]


def _command(name: str, *options: str, data_dir: str | os.PathLike | None) -> str:
    words = ['python -m diffjax.data prepare', name, *options]
    if data_dir:
        words.append(f'--data_dir={data_dir}')
    return ' '.join(words)


def explain_missing(name: str, data_dir: str | os.PathLike | None) -> ValueError:
    """The error for a dataset that was not found: `DatasetNotPrepared` if its name is known, else `UnknownDataset`."""
    import tensorflow_datasets as tfds

    base = base_name(name)
    if base in LATENTS:
        instructions = _our_builder(base).MANUAL_DOWNLOAD_INSTRUCTIONS
        how = f'{instructions}, then run: {_command(name, "--manual_dir=DIR", data_dir=data_dir)}'
    elif base in OURS:
        how = f'run: {_command(name, data_dir=data_dir)}'
    else:
        known = sorted({*OURS, *tfds.list_builders(with_community_datasets=False)})
        if base not in known:
            close = difflib.get_close_matches(base, known, n=3)
            hint = f' Did you mean {" or ".join(close)}?' if close else ''
            return UnknownDataset(
                f'There is no dataset called {name!r}.{hint} Embedded: {", ".join(EMBEDDED)}. '
                f'Others: {", ".join(LATENTS)} and the image datasets of TFDS, for example cifar10.'
            )
        how = (
            f"run: pip install tensorflow-cpu (only TFDS's own builders need it, once), "
            f'then: {_command(name, data_dir=data_dir)}'
        )
    return DatasetNotPrepared(
        f'The dataset {name!r} is not prepared: nothing in {resolve_data_dir(data_dir) / base}. To prepare it, {how}'
    )


def _our_builder(name: str):
    """The builder class of one of our own datasets."""
    return importlib.import_module(f'diffjax.data.{name}.{name}_dataset_builder').Builder


def latent_features(name: str) -> dict[str, Any]:
    """The features of one of our datasets of latents, whether or not it is prepared."""
    with tempfile.TemporaryDirectory() as nowhere:
        return dict(_our_builder(name)(data_dir=nowhere).info.features.items())


def published_features(name: str) -> dict[str, Any]:
    """The features of a dataset of TFDS's own, whether or not it is prepared; its builder knows them by itself."""
    import tensorflow_datasets as tfds

    with tempfile.TemporaryDirectory() as nowhere:
        return dict(tfds.builder(name, data_dir=nowhere).info.features.items())


def _is_whole(directory: Path) -> bool:
    return (directory / 'dataset_info.json').exists()


def prepare_ours(name: str, data_dir: Path, manual_dir: str | os.PathLike | None = None) -> Path:
    """Write one of our own datasets under `data_dir` and return its directory.

    Safe when several processes, or several hosts on one file system, do so at once: each writes into a directory of
    its own and renames it into place. A rename onto a dataset that is already there fails, which is as good; whatever
    carries the dataset's name is therefore whole.

    Raises ValueError if something that is not a dataset occupies the place, or the directory cannot be written.
    """
    import tensorflow_datasets as tfds

    builder_cls = _our_builder(name)
    version = str(builder_cls.VERSION)
    target = data_dir / name / version
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f'.{name}-unfinished-', dir=data_dir))
    except OSError as error:
        raise ValueError(
            f'Cannot write the dataset {name!r} under {data_dir} ({error.strerror}): '
            f'give another data_dir, or set TFDS_DATA_DIR.'
        ) from error
    try:
        builder = builder_cls(data_dir=scratch, file_format='array_record')
        config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints lines about the scratch directory
            builder.download_and_prepare(download_config=config)
        # Losing the race is fine; whether the winner left a whole dataset is checked below.
        with contextlib.suppress(OSError):
            os.rename(scratch / name / version, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not _is_whole(target):
        raise ValueError(f'{target} is in the way: it is not a whole dataset. Remove it and try again.')
    return target


def prepare_quietly(name: str, data_dir: Path) -> Path:
    """`prepare_ours` without TFDS's progress bars, for an embedded dataset on its first use."""
    with contextlib.redirect_stderr(io.StringIO()):
        return prepare_ours(name, data_dir)


def prepare_dataset(
    name: str, *, data_dir: str | os.PathLike | None = None, manual_dir: str | os.PathLike | None = None
) -> Path:
    """Write a dataset to disk as array_record, once, and return its directory. Shows TFDS's progress.

    Args:
      name: one of ours, or a TFDS name, `name[/config][:version]`.
      data_dir: where datasets live; TFDS's default directory for None.
      manual_dir: where data that the user provides lies, for datasets that need it.

    Raises `UnknownDataset` for a name that nobody knows, `DatasetNotPrepared` if what the preparation needs is missing
    (the user's shards; TensorFlow, for TFDS's own builders).
    """
    import tensorflow_datasets as tfds

    root = resolve_data_dir(data_dir)
    if name in EMBEDDED:
        return prepare_ours(name, root)
    if name in OURS:
        whole = _is_whole(root / name / str(_our_builder(name).VERSION))
        if not whole and manual_dir is None:
            raise explain_missing(name, data_dir)
        if not whole and not any(Path(manual_dir).expanduser().glob('train/*.npz')):
            raise DatasetNotPrepared(f'There is no shard {manual_dir}/train/*.npz. {explain_missing(name, data_dir)}')
        return prepare_ours(name, root, manual_dir)
    if base_name(name) not in tfds.list_builders(with_community_datasets=False):
        raise explain_missing(name, data_dir)
    if importlib.util.find_spec('tensorflow') is None:
        raise DatasetNotPrepared(f'TensorFlow is not installed. {explain_missing(name, data_dir)}')
    builder = tfds.builder(name, data_dir=root, file_format='array_record')
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return Path(builder.data_dir)
