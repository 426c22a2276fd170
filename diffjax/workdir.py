"""The config that a workdir keeps, and whether a command fits the run that is there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffjax.build import ConfigError
from diffjax.json_files import read_json, write_json
from diffjax.training.metrics import read_rows

FREE = ('sampler', 'evaluation', 'encoding')  # sections that may differ between a workdir and the command that uses it
FREE_KEYS = {  # likewise; `num_steps` so that a run can be made longer
    'training': (
        'num_steps',
        'log_every_steps',
        'checkpoint_every_steps',
        'keep_checkpoints',
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
    return read_json(Path(workdir) / 'config.json')


def write_config(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Nothing is written where it is there already."""
    if read_config(workdir) != json.loads(json.dumps(config, default=float)):
        write_json(Path(workdir) / 'config.json', config)


def check_same_run(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Raises ConfigError if the workdir holds a run of another config, naming the differences, or is no folder."""
    _check_place(Path(workdir))
    there = read_config(workdir)
    read_rows(Path(workdir) / 'metrics.csv')  # checks itself
    checkpoints = Path(workdir) / 'checkpoints'
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ConfigError(f'{checkpoints} is no folder: move it away, or give another --workdir')
    if there is None and checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir()):
        raise ConfigError(
            f'{workdir} holds checkpoints and no config.json, so of what they are cannot be told: put it back, or give '
            'another --workdir'
        )
    if there is None:
        return
    differences = list(_differences(there, json.loads(json.dumps(config))))
    if differences:
        shown = '; '.join(f'{key} is {a!r} there and {b!r} here' for key, a, b in differences[:3])
        raise ConfigError(
            f'{workdir} holds another run: {shown}{" ..." if len(differences) > 3 else ""}. '
            'Give another --workdir, or the config it was made with; nothing was changed.'
        )


def _check_place(workdir: Path) -> None:
    there = workdir
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.R_OK | os.X_OK):
        raise ConfigError(f'--workdir={workdir}: {there} is no folder that can be read; give another --workdir')


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
