"""The config that a workdir keeps, and whether a command fits the run that is there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from diffjax.build import ConfigError
from diffjax.json_files import read_json, write_json
from diffjax.training.checkpoints import CHECKPOINTS
from diffjax.training.metrics import read_rows
from diffjax.training.places import in_bucket, place_of, steps_in

FREE = ('sampler', 'evaluation', 'encoding')  # sections that may differ between a workdir and the command that uses it
FREE_KEYS = {  # likewise; `num_steps` so that a run can be made longer
    'training': (
        'num_steps',
        'log_every_steps',
        'checkpoint_every_steps',
        'keep_checkpoints',
        'checkpoints',  # as long as they are there: see `check_same_run`
        'num_microbatches',
        'ema_snapshot_every_steps',
        'init_from',
        'on_nan',
        'max_skipped_in_a_row',
    ),
    'network': ('attention', 'remat'),  # the same function of the same parameters
    'dataset': ('data_dir',),
    'first_stage': ('workdir', 'encoding', 'tile', 'overlap', 'batch_size'),
    'mesh': ('data', 'fsdp', 'sequence', 'tensor', 'rules'),
}


def read_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The config of the run in a workdir, None where there is none. Raises ValueError where it is damaged."""
    return read_json(epath.Path(workdir) / 'config.json')


def write_config(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Into the workdir and to the checkpoints, if they lie elsewhere. Nothing is written where it is there already."""
    for folder in _folders(workdir, config):
        if read_config(folder) != json.loads(json.dumps(config, default=float)):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / 'config.json', config)


def _folders(workdir: str | os.PathLike, config: dict[str, Any]) -> list[epath.Path]:
    """The workdir, and where the checkpoints lie. Raises ConfigError."""
    training = config.get('training')
    try:
        place = place_of(workdir, training.get('checkpoints', '') if isinstance(training, dict) else '')
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return list(dict.fromkeys((place_of(workdir, ''), place)))


def check_same_run(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Raises ConfigError if the workdir holds a run of another config, naming the differences, or is no folder.

    The folder of `training.checkpoints` is looked at in the same way: a workdir may be fresh and its checkpoints not.
    """
    _check_place(Path(workdir), f'--workdir={workdir}', '--workdir')
    rows = read_rows(Path(workdir) / 'metrics.csv')  # checks itself
    home, *elsewhere = _folders(workdir, config)
    _check_folder(home, str(workdir), config, '--workdir')
    for place in elsewhere:
        _check_place(place, f'training.checkpoints={place}', 'training.checkpoints')
        _check_folder(place, str(place), config, 'training.checkpoints')
    before, place = _folders(workdir, read_config(home) or config)[-1], [home, *elsewhere][-1]
    if rows and before != place and not steps_in(place / CHECKPOINTS):
        raise ConfigError(
            f'{workdir} holds a run whose checkpoints are in {before}, and {place} has none: copy them there, or set '
            'training.checkpoints as it was; nothing was changed'
        )


def _check_folder(folder: epath.Path, name: str, config: dict[str, Any], setting: str) -> None:
    there, checkpoints = read_config(folder), folder / CHECKPOINTS
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ConfigError(f'{checkpoints} is no folder: move it away, or give another {setting}')
    if there is None and steps_in(checkpoints):
        raise ConfigError(
            f'{name} holds checkpoints and no config.json, so of what they are cannot be told: put it back, or give '
            f'another {setting}'
        )
    if there is None:
        return
    differences = list(_differences(there, json.loads(json.dumps(config))))
    if differences:
        shown = '; '.join(f'{key} is {a!r} there and {b!r} here' for key, a, b in differences[:3])
        raise ConfigError(
            f'{name} holds another run: {shown}{" ..." if len(differences) > 3 else ""}. '
            f'Give another {setting}, or the config it was made with; nothing was changed.'
        )


def _check_place(folder: Path | epath.Path, given: str, setting: str) -> None:
    if in_bucket(folder):
        bucket = epath.Path(f'gs://{folder.parts[2]}')
        if not bucket.exists():
            raise ConfigError(f'{given}: {bucket} is not there, or these credentials may not see it')
        return
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.R_OK | os.X_OK):
        raise ConfigError(f'{given}: {there} is no folder that can be read; give another {setting}')


def _differences(there: Any, here: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*there, *here}):
        within = path[2:] if path[:2] == ('first_stage', 'config') else path  # a config of its own
        if (not within and key in FREE) or (within and key in FREE_KEYS.get(within[0], ())):
            continue
        a, b = there.get(key, 'absent'), here.get(key, 'absent')
        if 'absent' in (a, b) and (isinstance(a, dict) or isinstance(b, dict)):  # a section of free keys may be absent
            a, b = ({} if value == 'absent' else value for value in (a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, (*path, key))
        elif a != b:
            yield '.'.join((*path, key)), a, b
