"""What a run has to write and cannot: the disk is full, a quota is reached, the folder is gone, a bucket says no."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffjax.training.places import in_bucket

# In errors of TensorStore, gcsfs and aiohttp, after they have tried for a while.
NO_ANSWER = 'PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|Forbidden|HttpError|Cannot connect'


class CannotWrite(RuntimeError):
    """A file of the run could not be written; what was whole before is whole still."""


@contextmanager
def writing(what: str, path: str | os.PathLike, then: str) -> Iterator[None]:
    """Turns an error of the disk into one line for whoever has to make room: the path, the cause, what is left there.

    Args:
        what: 'the checkpoint of step 7', say.
        then: what stands now, and how to go on.

    Raises CannotWrite. Errors of another kind pass.
    """
    try:
        yield
    except Exception as error:
        if (reason := refused(error)) is None:
            raise
        raise CannotWrite(f'{what} could not be written to {path} ({reason}{_free(path)}); {then}') from error


def refused(error: BaseException | None) -> str | None:
    """What the system said, where it refused to write; TensorStore's errors are ValueErrors that quote it."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            return error.strerror.lower()
        if 'os_error_code' in text:
            return text.partition(' [os_error_code')[0].rpartition(': ')[2].lower()
        if (found := unanswered(error)) is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


def unanswered(error: BaseException) -> str | None:
    """Why a bucket has not answered, by its own account or by that of the network; None for errors of another kind."""
    found = re.search(NO_ANSWER, f'{type(error).__name__}: {error}')
    return None if found is None or 'os_error_code' in str(error) else found[0].replace('_', ' ').lower()


def _free(path: str | os.PathLike) -> str:
    """', 12.3 MB are free there'; '' where the disk cannot be asked."""
    if in_bucket(path):
        return ''
    path = Path(path)
    there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    return '' if there is None else f', {shutil.disk_usage(there).free / 1e6:,.1f} MB are free there'
