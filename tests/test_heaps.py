"""From how many heaps glibc gives memory to threads, counted by its own `malloc_info` in fresh processes."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has heaps of threads')

ALLOCATE = """
import ctypes, os, sys, threading
from diffjax.main import few_heaps

if sys.argv[1] == 'few':
    few_heaps()
library = ctypes.CDLL(None)
library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
library.fopen.restype = ctypes.c_void_p
num_threads = 4 * os.cpu_count()
together = threading.Barrier(num_threads)


def allocate():
    library.malloc(5000)
    together.wait()


threads = [threading.Thread(target=allocate) for _ in range(num_threads)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = ctypes.c_void_p(library.fopen(sys.argv[2].encode(), b'w'))
library.malloc_info(0, file)
library.fclose(file)
"""


def num_heaps(tmp_path, what, **environment):
    """After four threads for each core have allocated side by side."""
    ours = {name: value for name, value in os.environ.items() if name not in ('GLIBC_TUNABLES', 'MALLOC_ARENA_MAX')}
    info = tmp_path / 'info.xml'
    subprocess.run([sys.executable, '-c', ALLOCATE, what, info], env=ours | environment, check=True)
    return info.read_text().count('<heap nr=')


def test_one_heap_for_two_cores(tmp_path):
    assert num_heaps(tmp_path, 'as glibc does') == 4 * os.cpu_count() + 1
    assert num_heaps(tmp_path, 'few') == max(1, os.cpu_count() // 2)


def test_what_the_environment_says_stays(tmp_path):
    assert num_heaps(tmp_path, 'few', MALLOC_ARENA_MAX='3') == 3
    assert num_heaps(tmp_path, 'few', GLIBC_TUNABLES='glibc.malloc.arena_max=4') == 4
    assert num_heaps(tmp_path, 'few', GLIBC_TUNABLES='glibc.malloc.mmap_max=0') == max(1, os.cpu_count() // 2)
