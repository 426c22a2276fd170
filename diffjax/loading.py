"""`diffjax.load`: a workdir as a `Run`.

run = diffjax.load('runs/digits')
images = run.sample(labels, solver='heun', num_steps=20, guidance=2.0)
"""

import os
from typing import Any

from diffjax.baselines import BaselineRun
from diffjax.build import build
from diffjax.kinds import DENOISING, kind_of
from diffjax.restoring import restore_params
from diffjax.run import Run, make_sampler
from diffjax.settings import ConfigError
from diffjax.stages import open_ready
from diffjax.workdir import read_config


def load(workdir: str | os.PathLike, *, overrides: dict[str, dict[str, Any]] | None = None) -> Run | BaselineRun:
    """The newest checkpoint of a workdir as a `Run`, or as the `BaselineRun` of a model that draws in one step.

    Args:
        overrides: what to change before building, such as {'sampler': {'params': 'raw'}, 'mesh': {...}}.

    Raises FileNotFoundError where there is no run.
    """
    config = read_config(workdir)
    if config is None:
        raise FileNotFoundError(f'{workdir} holds no run: there is no config.json in it')
    for name, values in (overrides or {}).items():
        there = config.get(name)
        config[name] = {**there, **values} if isinstance(there, dict) and isinstance(values, dict) else values
    kind = kind_of(config)
    if kind.drawing is None:
        raise ConfigError(f'{workdir} holds what draws no samples, its task {config["task"]!r}')
    if kind is not DENOISING:
        return kind.load(config, workdir)
    experiment = build(config, latents=open_ready(config, workdir, for_sampling=True))
    params, step = restore_params(experiment, workdir)
    return Run(
        config=config,
        experiment=experiment,
        network=experiment.task.model,
        params=params,
        schedule=experiment.task.objective.schedule,
        step=step,
        sampler=make_sampler(experiment),
    )
