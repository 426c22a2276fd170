"""Where a run starts that begins with imported weights: `training.init_from`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffjax.build import ConfigError, Experiment
from diffjax.components import parse_component
from diffjax.core.types import PyTree
from diffjax.training.checkpoints import CHECKPOINTS
from diffjax.training.places import place_of, steps_in
from diffjax.weights import WeightsError
from diffjax.weights.fitting import load_for


def imported_params(config: Mapping[str, Any], experiment: Experiment, workdir: Path) -> PyTree:
    """The parameters that `training.init_from` names, verified and arranged as the config's network wants them.

    None where it names nothing, and where the workdir holds a checkpoint, which then counts. Raises ConfigError where
    they are those of another network.
    """
    folder = experiment.training.init_from
    if not folder or steps_in(place_of(workdir, experiment.training.checkpoints) / CHECKPOINTS):
        return None
    make, shapes, _ = experiment.trainer().init(experiment.batch_spec)
    network = parse_component(config['network'], 'network')
    try:
        if 'autoencoder' not in shapes.params:
            return load_for(folder, *network, shapes.params)
        found = {'autoencoder': load_for(folder, *network, shapes.params['autoencoder'])}
        return found if len(shapes.params) == 1 else {**make().params, **found}  # a discriminator is drawn
    except WeightsError as error:
        raise ConfigError(f'training.init_from: {error}') from error
