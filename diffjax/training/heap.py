"""How the C library keeps memory for this process. Only glibc is told anything, the one of most Linux systems.

This module imports no JAX: what it sets must be set before JAX starts its threads.
"""

import ctypes
import functools
import os
import sys

M_ARENA_MAX = -8  # of glibc's malloc.h


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != 'linux':
        return None
    library = ctypes.CDLL(None)  # this process, in which the C library is
    return library if hasattr(library, 'gnu_get_libc_version') else None


def _said(variable: str, tunable: str) -> bool:
    """Whether the environment has told glibc already."""
    return variable in os.environ or tunable in os.environ.get('GLIBC_TUNABLES', '')


def few_heaps() -> None:
    """Lets the C library share out memory from one heap for two cores, where it would open up to eight for each core.

    Its heaps belong to threads, of which JAX and Orbax have about ninety: what one frees, others do not find, and a run
    grows for hours. What glibc's environment variables say stays as it is.
    """
    if _glibc() is not None and not _said('MALLOC_ARENA_MAX', 'arena_max'):
        _glibc().mallopt(M_ARENA_MAX, max(1, (os.cpu_count() or 1) // 2))


def give_back() -> None:
    """Gives what was freed back to the system: a compiler leaves hundreds of megabytes, a save a few. 10 to 30 ms.

    Nothing where glibc's environment variables say how much it may keep.
    """
    if _glibc() is not None and not _said('MALLOC_TRIM_THRESHOLD_', 'trim_threshold'):
        _glibc().malloc_trim(ctypes.c_size_t(0))
