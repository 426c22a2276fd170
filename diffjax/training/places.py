"""Where the checkpoints and snapshots of a run lie: in its workdir, in another folder, or in a bucket.

All of them are `epath.Path`, so that the same code reads and writes them. A bucket has no folders and no renames: an
object is there whole or not at all, and of a step Orbax writes last a file that says so (`COMMITTED`). On a disk it
writes that file too, and then renames the folder: a copy of a run's checkpoints is whole in a bucket.
"""

import importlib.util
import os
from pathlib import Path

from etils import epath

COMMITTED = 'commit_success.txt'  # Orbax's name; the last object of a step in a bucket


def in_bucket(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith('gs://')


def absolute(path: str | os.PathLike) -> epath.Path:
    """An absolute path, which that of a bucket always is."""
    return epath.Path(path if in_bucket(path) else Path(path).absolute())


def check_place(checkpoints: str) -> None:
    """Raises ValueError, in one line, for a `training.checkpoints` that is neither a folder nor in a bucket."""
    scheme, separator, rest = str(checkpoints).partition('://')
    if not isinstance(checkpoints, str) or (separator and (scheme != 'gs' or not rest.partition('/')[0])):
        raise ValueError(f'training.checkpoints is a folder here, or gs://BUCKET/FOLDER; got {checkpoints!r}')


def place_of(workdir: str | os.PathLike, checkpoints: str) -> epath.Path:
    """The folder of a run's checkpoints and snapshots: what `training.checkpoints` says, '' the workdir itself.

    Raises ValueError, as `check_place`, and where what reads buckets is not installed.
    """
    check_place(checkpoints)
    if not checkpoints:
        return absolute(workdir)
    if not in_bucket(checkpoints):
        return absolute(Path(checkpoints).expanduser())
    if importlib.util.find_spec('gcsfs') is None:
        raise ValueError(f"training.checkpoints={checkpoints} needs gcsfs: pip install 'diffjax[gcs]'")
    # epath takes TensorFlow's files where TensorFlow is installed; and what gcsfs remembers of a listing is not what
    # TensorStore, or another process, has written since.
    os.environ.setdefault('EPATH_USE_TF', 'false')
    import fsspec

    fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
    return epath.Path(checkpoints)


def steps_in(folder: epath.Path) -> list[int]:
    """The steps that lie whole in a folder of checkpoints, [] where there is none."""
    return [int(path.name) for path in _numbered(folder) if is_whole(path)]


def half_written(folder: epath.Path) -> list[epath.Path]:
    """What saves have left in a folder of checkpoints that were killed or could not go on."""
    if in_bucket(folder):
        return [path for path in _numbered(folder) if not is_whole(path)]
    return list(folder.glob('*.orbax-checkpoint-tmp*'))


def is_whole(step: epath.Path) -> bool:
    return not in_bucket(step) or (step / COMMITTED).exists()


def _numbered(folder: epath.Path) -> list[epath.Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name.isdecimal()]
