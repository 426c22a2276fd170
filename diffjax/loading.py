"""`diffjax.load`: a workdir as a `Run`.

run = diffjax.load('runs/digits')
images = run.sample(labels, solver='heun', num_steps=20, guidance=2.0)
"""

import os
from typing import Any

from diffjax.build import build
from diffjax.restoring import restore_params
from diffjax.run import Run, make_sampler
from diffjax.settings import ConfigError
from diffjax.stages import open_latents
from diffjax.workdir import read_config


def load(workdir: str | os.PathLike, *, overrides: dict[str, dict[str, Any]] | None = None) -> Run:
    """The newest checkpoint of a workdir as a `Run`.

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
    if 'task' in config:
        raise ConfigError(f'{workdir} holds an autoencoder, which draws no samples; diffjax.load is for what denoises')
    experiment = build(config, latents=open_latents(config, workdir))
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
