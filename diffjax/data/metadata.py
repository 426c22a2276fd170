"""The JSON that describes a dataset on disk, checked before TFDS believes it.

TFDS imports whatever module features.json names, and joins what dataset_info.json calls splits and shards to the
dataset's folder. Here the features have to be TFDS's own, and names have to be names: nothing in a dataset's files
runs code or leads out of its folder.
"""

import json
import re
from pathlib import Path
from typing import Any

INFO, FEATURES = 'dataset_info.json', 'features.json'
CLASSES = 'pythonClassName', 'python_class_name', 'type'  # keys of features.json whose values TFDS imports
OURS = r'tensorflow_datasets(\.\w+)+|\w+'  # of TFDS; a lone word is no module
MOST_BYTES = 2**26


def check_metadata(root: Path, base: str) -> None:
    """Checks every dataset `base` under `root`. Raises ValueError, in one line, for one that cannot be trusted."""
    for pattern in (f'{base}/*/{INFO}', f'{base}/*/*/{INFO}'):
        for path in sorted(root.glob(pattern)):
            _check_folder(path.parent)


def _check_folder(folder: Path) -> None:
    info, features = _read(folder / INFO), _read(folder / FEATURES)
    if not isinstance(info.get('splits', []), list) or not all(isinstance(s, dict) for s in info.get('splits', [])):
        raise ValueError(f'{folder / INFO} is damaged: its splits are no list of tables')
    names = [info.get(key, '') for key in ('name', 'configName', 'version')]
    for split in info.get('splits', []):
        names += [split.get(key, '') for key in ('name', 'filepathTemplate', 'filepath_template')]
        lengths = split.get('shardLengths', split.get('shard_lengths', []))
        if not isinstance(lengths, list) or not all(re.fullmatch(r'\d{1,15}', str(length)) for length in lengths):
            raise ValueError(f'{folder / INFO} is damaged: shards have whole numbers as lengths, got {lengths!r:.80}')
    for name in names:
        if not isinstance(name, str) or re.search(r'[/\\\0]', name) or name in ('.', '..'):
            raise ValueError(f'{folder / INFO}: {name!r:.80} is no name: it would lead out of the folder')
    _check_features(folder / FEATURES, features)


def _check_features(path: Path, node: Any) -> None:
    if isinstance(node, list):
        for each in node:
            _check_features(path, each)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if re.search(r'[/\\\0]', key) or key in ('.', '..'):
            raise ValueError(f'{path}: {key!r:.80} is no name of a feature: it would lead out of the folder')
        if key in CLASSES and isinstance(value, str) and not re.fullmatch(OURS, value):
            raise ValueError(f'{path}: {value!r:.80} is no feature of tensorflow_datasets; nothing else is imported')
        _check_features(path, value)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError('it is too long')
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f'{path} is missing: prepare the dataset anew') from error
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: it is no JSON') from error
    if not isinstance(found, dict):
        raise ValueError(f'{path} is damaged: it holds no table')
    return found
