"""Training for a given time, as studies do that compare models after equally long training."""

import csv
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command_line import Stop

from diffjax.build import Experiment
from diffjax.data import to_global
from diffjax.main import train_experiment
from diffjax.training.flops import count_flops
from diffjax.training.sharding import batch_sharding
from diffjax.workdir import write_json

TIMED_STEPS, TIMED_SECONDS = 24, 10.0  # at most
LOGGED = {'log_every_steps': 200, 'checkpoint_every_steps': 5}  # at most so often in a run
PLAN = 'num_steps.json'  # in a run's folder


def step_cost(experiment: Experiment) -> dict[str, float | None]:
    """Of the compiled step: the median of single ones' seconds, for the machine may be busy now and then; its MB of
    temporaries, None where the compiler does not tell.
    """
    trainer = experiment.trainer()
    batch = experiment.source.read(range(experiment.training.batch_size))
    batch = to_global(batch, batch_sharding(experiment.mesh))
    make, _, shardings = trainer.init(batch)
    state, taken = make(), []
    step = trainer.step(shardings).lower(state, trainer.frozen, batch).compile()
    while len(taken) < TIMED_STEPS and (len(taken) < 7 or sum(taken) < TIMED_SECONDS):
        began = time.perf_counter()
        state, metrics = step(state, trainer.frozen, batch)
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - began)
    memory = step.memory_analysis()
    return {
        'seconds_per_step': float(np.median(taken[3:])),
        'mb_of_a_step': None if memory is None else memory.temp_size_in_bytes / 1e6,
    }


def seconds_of_steps(folder: Path) -> list[tuple[int, float]]:
    """(step, what the steps up to it took) from a run's metrics.csv: without compiling, and without what followed."""
    with open(folder / 'metrics.csv', newline='') as file:
        rows = [(int(row['step']), float(row['steps_per_second'])) for row in csv.DictReader(file)]
    taken = itertools.accumulate(
        (step - before) / rate for (before, _), (step, rate) in itertools.pairwise([(0, 1.0), *rows])
    )
    return list(zip((step for step, _ in rows), taken))


def trained_seconds(folder: Path) -> float:
    """What all of a run's steps took."""
    return seconds_of_steps(folder)[-1][1]


def num_steps_for(seconds: float, folder: Path, experiment: Experiment) -> int:
    """How many steps fit, by the compiled step's time; kept in the folder, so that a second call is told the same."""
    plan = folder / PLAN
    if not plan.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cost = step_cost(experiment)
        plan.write_text(json.dumps({'num_steps': max(round(seconds / cost['seconds_per_step']), 4), **cost}))
    return json.loads(plan.read_text())['num_steps']


def of_length(config: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """The config with so many steps, its warm-up within their first quarter, and logs as often as they want."""
    warmup = min(config['optimizer']['warmup_steps'], num_steps // 4)
    every = {key: max(config['training'][key], num_steps // n) for key, n in LOGGED.items()}
    return config | {
        'optimizer': config['optimizer'] | {'warmup_steps': warmup},
        'training': config['training'] | {'num_steps': num_steps, **every},
    }


def train_whole(config: dict[str, Any], experiment: Experiment, folder: Path) -> None:
    """Trains and measures; goes on where it was stopped. Raises Stop where it is stopped again."""
    if not train_experiment(config, experiment, folder):
        raise Stop('stopped; the same command goes on from there')


def check_same_study(out: Path, study: dict[str, Any]) -> None:
    """Keeps what is compared in --out. Raises Stop where it holds another study."""
    path, study = out / 'study.json', json.loads(json.dumps(study))
    there = json.loads(path.read_text()) if path.exists() else study
    if different := [key for key in study if there[key] != study[key]]:
        raise Stop(f'{out} holds a study of another {different[0]}: give another --out; nothing was changed')
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, study)


def call_flops(experiment: Experiment) -> int:
    """Of the network on one image or clip."""
    model, shape = experiment.task.model, experiment.sample_shape
    x, t, label = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, label))
    return count_flops(jax.make_jaxpr(lambda p: model.apply(p, x, t, label))(params))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """For a report: numbers of four digits."""
    return {key: f'{value:.4g}' if isinstance(value, float) else value for key, value in row.items()}
