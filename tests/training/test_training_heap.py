"""What glibc is told: counted by its own `malloc_info` in fresh processes, and by Linux."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from diffjax.training import loop
from diffjax.training.heap import give_back

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has heaps of threads')

ROOT = Path(__file__).parents[2]
ALLOCATE = """
import ctypes, os, sys, threading
from diffjax.training.heap import few_heaps

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


def test_main_says_so_before_jax_starts_its_threads(tmp_path):
    heard = (
        'import ctypes, sys; import diffjax.main as main; '
        "main.few_heaps = lambda: print('asked' if 'jax' not in sys.modules else 'late') or sys.exit(); "
        "sys.argv = ['main', '--config=configs/digits.py:smoke', '--workdir=RUN']; main.app.run(main.main, "
        'flags_parser=main.parse)'
    ).replace('RUN', str(tmp_path / 'run'))
    found = subprocess.run([sys.executable, '-c', heard], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == 'asked\n'


def resident():
    """Megabytes of this process that no file holds, as Linux counts them."""
    (line,) = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('RssAnon')]
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize('said', ['', 'glibc.malloc.trim_threshold=17179869184'])
def test_what_was_freed_goes_back(monkeypatch, said):
    """A thousand pieces, of which the last is kept: the system gets nothing of the others by itself.

    Where the environment asks glibc to keep what is freed, it is kept.
    """
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes, library.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    give_back()  # what others have freed is not there to be used again
    before = resident()
    pieces = [library.malloc(100_000) for _ in range(1000)]
    for piece in pieces:
        library.memset(piece, 1, 100_000)
    for piece in pieces[:-1]:
        library.free(piece)
    kept = resident()
    monkeypatch.setenv('GLIBC_TUNABLES', said)  # glibc reads it when a process starts: this is for us alone
    give_back()
    left = resident()
    library.free(pieces[-1])
    assert kept > before + 50
    assert (left < kept - 50) is (not said)


def test_training_gives_back_after_compiling_and_at_saves(trainer, stream, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(loop, 'give_back', lambda: told.append(len(list(tmp_path.glob('checkpoints/*')))))
    loop.train(trainer(11), stream(), tmp_path, announce=lambda text: None)
    assert told[0] == 0 and len(told) == 1 + 3  # saves at 4, 8 and 11
