"""A folder that appears whole or not at all: written beside its place under another name, then renamed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from diffjax.weights.architecture import WeightsError


@contextlib.contextmanager
def appearing(out: str | os.PathLike) -> Iterator[Path]:
    """`with appearing(out) as folder:` gives an empty folder to write to, which is `out` once the block is through.

    What a process that was killed has left beside `out` is removed. WeightsError where `out` is there already.
    """
    out = Path(out).absolute()
    check_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_remains(out)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # says that somebody is at it; falls with the process
        yield folder
        check_absent(out)
        folder.chmod(0o755)
        os.rename(folder, out)
    finally:
        os.close(lock)
        _remove(folder)


def check_absent(out: str | os.PathLike) -> None:
    """Raises WeightsError where there is something at `out`: nothing is ever written over."""
    if os.path.lexists(out):
        raise WeightsError(f'{out} is there already; give another --out, or remove it first')


def check_inside(path: Path, folder: Path) -> None:
    """Raises WeightsError where a file of a folder is a link that leads out of it.

    The cache of Hugging Face is one folder: its snapshots/REVISION link to the blobs beside them.
    """
    try:
        real, home = path.resolve(strict=False), folder.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise WeightsError(f'{path}: a link that leads nowhere') from error
    snapshots = [parent for parent in (home, *home.parents) if parent.name == 'snapshots'][:1]
    if not any(real.is_relative_to(home) for home in (home, *(parent.parent / 'blobs' for parent in snapshots))):
        raise WeightsError(f'{path}: a link that leads out of its folder, to {real}; copy that into the folder')


def _prefix(out: Path) -> str:
    return f'.{out.name}.part-'


def _remove(folder: Path) -> None:
    """Removes a folder, if it is there. After an interrupt, threads may write into it for a moment."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _remove_remains(out: Path) -> None:
    for folder in out.parent.glob(f'{_prefix(out)}*'):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            continue  # another process is writing it
        finally:
            os.close(handle)
