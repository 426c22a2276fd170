"""Tables in JSON files, read with suspicion and written at once."""

import json
import os
from typing import Any

from etils import epath

from diffjax.training.places import in_bucket

MOST_BYTES = 2**26  # of such a file


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """The table in a file, None where there is no file. Raises ValueError, in one line, for anything else."""
    path = epath.Path(path)
    try:
        with path.open('rb') as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f'{path} is no file of settings: it is too long')
        found = json.loads(data.decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror or error}') from error
    except RecursionError as error:
        raise ValueError(f'{path} is damaged: its brackets have no end') from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is damaged: it is no text') from error
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is damaged: it is no JSON ({error})') from error
    if not isinstance(found, dict):
        raise ValueError(f'{path} is damaged: it holds no table of keys and values')
    return found


def write_json(path: str | os.PathLike, values: Any) -> None:
    """At once: whoever reads finds the old file or the new one."""
    path, text = epath.Path(path), json.dumps(values, indent=2, default=float) + '\n'
    if in_bucket(path):  # where an object is there whole or not at all
        path.write_text(text)
        return
    part = path.with_suffix('.part')
    part.write_text(text)
    part.replace(path)
