"""Tables in JSON files, read with suspicion and written at once."""

import json
import os
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26  # of such a file


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """The table in a file, None where there is no file. Raises ValueError, in one line, for anything else."""
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f'{path} is no file of settings: it is too long')
        found = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    except RecursionError as error:
        raise ValueError(f'{path} is damaged: its brackets have no end') from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is damaged: it is no text') from error
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is damaged: it is no JSON ({error})') from error
    if not isinstance(found, dict):
        raise ValueError(f'{path} is damaged: it holds no table of keys and values')
    return found


def write_json(path: Path, values: Any) -> None:
    """At once: whoever reads finds the old file or the new one."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(values, indent=2, default=float) + '\n')
    os.replace(part, path)
