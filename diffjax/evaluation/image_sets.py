"""Sets of images that are read in parts: arrays, NPZ archives as ADM writes them, and folders of pictures."""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
ARRAY = 'arr_0'  # what `np.savez(path, images)` calls its first array; ADM's archives of samples and of references


class ImageSet(NamedTuple):
    """uint8 images of one size. `parts(start, stop, size)` yields those from start to stop, `size` at a time."""

    name: str  # for a report
    shape: tuple[int, int, int, int]  # [N, H, W, C]
    parts: Callable[[int, int, int], Iterator[np.ndarray]]

    def first(self, count: int) -> 'ImageSet':
        """The first `count` of them, or all where there are not so many."""
        return self._replace(shape=(min(count, self.shape[0]), *self.shape[1:]))


def image_array(name: str, images: np.ndarray) -> ImageSet:
    """Images `[N, H, W, C]` in memory. Raises ValueError unless they are uint8."""
    _check(name, images.dtype, images.shape)

    def parts(start, stop, size):
        return (images[i : min(i + size, stop)] for i in range(start, stop, size))

    return ImageSet(name, images.shape, parts)


def open_images(path: str | os.PathLike) -> ImageSet:
    """The images of an NPZ archive (`arr_0`, uint8 `[N, H, W, C]`), or of a folder of pictures of one size.

    Raises ValueError, naming what was found, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    images = archived_images(path)
    if images is None:
        raise ValueError(f'{path} holds no images: its arrays are {", ".join(array_names(path))}, none called {ARRAY}')
    return images


def archived_images(path: str | os.PathLike) -> ImageSet | None:
    """The images of an archive, None where it holds none. They are read as they are asked for, never all at once."""
    if ARRAY not in array_names(path):
        return None
    with _opened(path) as (_, shape, dtype, fortran):
        _check(str(path), dtype, shape)
        if fortran:
            raise ValueError(f'{path}: {ARRAY} is stored by columns; write it with np.ascontiguousarray')
    bytes_each = int(np.prod(shape[1:]))

    def parts(start, stop, size):
        with _opened(path) as (file, *_):
            for skipped in range(0, start, size):
                _read(path, file, min(size, start - skipped) * bytes_each)
            for i in range(start, stop, size):
                count = min(size, stop - i)
                yield np.frombuffer(_read(path, file, count * bytes_each), np.uint8).reshape(count, *shape[1:])

    return ImageSet(Path(path).name, shape, parts)


def array_names(path: str | os.PathLike) -> list[str]:
    """The names of the arrays in an NPZ archive. Raises ValueError, FileNotFoundError for what is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} is neither an NPZ archive nor a folder of pictures: there is nothing')
    if not zipfile.is_zipfile(path):
        raise ValueError(f'{path} is no NPZ archive (np.savez writes one), or it is cut off')
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix('.npy') for name in archive.namelist()]


class _opened:
    """`with _opened(path) as (file, shape, dtype, fortran)`: the images' bytes as a stream, behind their header."""

    def __init__(self, path: str | os.PathLike):
        self._path = path

    def __enter__(self):
        self._archive = zipfile.ZipFile(self._path)
        self._file = self._archive.open(f'{ARRAY}.npy')
        version = np.lib.format.read_magic(self._file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(self._file)
        return self._file, shape, dtype, fortran

    def __exit__(self, *error):
        self._file.close()
        self._archive.close()


def _read(path: str | os.PathLike, file, count: int) -> bytes:
    try:
        data = file.read(count)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if len(data) != count:
        raise ValueError(f'{path} is cut off: {count - len(data)} bytes of images are missing')
    return data


def _folder(path: Path) -> ImageSet:
    """Pictures in the order of their names, those of sub-folders too."""
    files = sorted(file for file in path.rglob('*') if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f'{path} holds no pictures ({", ".join(PICTURES)})')
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        with _picture(file) as picture:  # reads the header alone
            sizes.setdefault(picture.size, file)
    if len(sizes) > 1:
        (a, first), (b, other), *_ = sizes.items()
        raise ValueError(f'pictures of one size are needed: {first} is {a[0]}x{a[1]} and {other} {b[0]}x{b[1]}')

    def load(file):
        with _picture(file) as picture:
            return np.asarray(picture.convert('RGB'))

    def parts(start, stop, size):
        return (np.stack([load(f) for f in files[i : min(i + size, stop)]]) for i in range(start, stop, size))

    (width, height), *_ = sizes
    return ImageSet(path.name, (len(files), height, width, 3), parts)


@contextlib.contextmanager
def _picture(file: Path):
    """A picture, opened. Raises ValueError, naming the file, for what is none, also when it is decoded in the block."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of which Pillow raises
        raise ValueError(f'{file} cannot be read as a picture: {error}') from error


def _check(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8 or len(shape) != 4 or not all(shape) or shape[-1] not in (1, 3):
        raise ValueError(f'{name}: images are uint8 [N, H, W, 1 or 3], got {dtype} {list(shape)}')
