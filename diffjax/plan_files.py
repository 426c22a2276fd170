"""Plans in files: the JSON that `sampler.solver` may name, and that experiments/learn_plan.py writes."""

import json
import os
from pathlib import Path
from typing import Any

from diffjax.core.solvers.plan_records import PlanRecord, from_data, to_data


def is_plan_file(solver: Any) -> bool:
    """Whether a solver's spec is the path of a plan, PATH.json."""
    return isinstance(solver, str) and solver.endswith('.json')


def read_plan(path: str | os.PathLike) -> PlanRecord:
    """The plan in a file. Nothing in it is executed. Raises ValueError, in one line, where there is none."""
    try:
        data = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise ValueError(f'the plan {path} cannot be read: {error.strerror}') from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets without end
        raise ValueError(f'{path} is no plan: it is no JSON ({error})') from error
    return from_data(data, str(path))


def write_plan(path: str | os.PathLike, record: PlanRecord) -> None:
    """The file appears whole or not at all."""
    part = Path(path).with_suffix('.part')
    part.write_text(json.dumps(to_data(record), indent=1, allow_nan=False) + '\n', encoding='utf-8')
    os.replace(part, path)
