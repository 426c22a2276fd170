"""The models that the benchmarks measure: real configs, as the command would train them, without their data."""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax import nets
from diffjax.build import ConfigError, Experiment, build
from diffjax.data import Prefetched
from diffjax.training.estimates import product_traffic
from diffjax.training.flops import count_flops
from diffjax.training.hlo import count_runs, parse
from diffjax.training.sharding import batch_sharding

CONFIGS = Path(__file__).parents[1] / 'configs'
PLAIN = {'attention': 'xla', 'remat': 'none'}  # the model's own operations: nothing twice, nothing inside a kernel


class Listed(NamedTuple):
    config: str
    argument: str = ''
    network: dict[str, Any] | None = None  # in the place of the config's


SD3_MEDIUM = {'name': 'MMDiT', 'patch_size': 2, 'hidden_size': 1536, 'depth': 24, 'num_heads': 24}
SD3_MEDIUM |= {'compute_dtype': 'bfloat16'}
MODELS = {
    **{f'DiT-{size}/2': Listed('dit_b', f'model={size}/2') for size in ('S', 'B', 'L', 'XL')},
    'UNet': Listed('cifar10_unet'),
    'MMDiT': Listed('dit_b', 'recipe=sit', SD3_MEDIUM),  # 2 B parameters, on ImageNet's latents with their labels
    'digits-DiT': Listed('digits'),
    'digits-UNet': Listed('digits_unet'),
    'digits-MMDiT': Listed('digits_networks', 'network=mmdit'),
    'smoke': Listed('digits', 'smoke'),
}
LARGE, SMALL = 'DiT-S/2,DiT-B/2,DiT-L/2,DiT-XL/2,UNet,MMDiT', 'digits-DiT,digits-UNet,digits-MMDiT'


def config_of(name: str, **network: Any) -> dict[str, Any]:
    """A model's config. network: its options, of which those of value '' stay the config's own."""
    listed = MODELS[name]
    get_config = runpy.run_path(str(CONFIGS / f'{listed.config}.py'))['get_config']
    config = get_config(*([listed.argument] if listed.argument else [])).to_dict()
    given = {key: value for key, value in network.items() if value != ''}
    fields = getattr(nets, (listed.network or config['network'])['name']).__dataclass_fields__
    if unknown := [key for key in given if key not in fields]:
        raise ConfigError(f'--{unknown[0]}: the network of {name} has no such option')
    return config | {'network': (listed.network or config['network']) | given}


def open_model(config: dict[str, Any], batch_size: int = 0, sampler: dict[str, Any] | None = None) -> Experiment:
    """Its experiment, data or none. batch_size: of training; 0 is the config's own. sampler: keys of that section."""
    training = config['training'] | ({'batch_size': batch_size} if batch_size else {})
    return build(config | {'training': training, 'sampler': config['sampler'] | (sampler or {})}, for_sampling=True)


def batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    size = experiment.training.batch_size
    return {name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for name, a in experiment.batch_spec.items()}


class Same:
    """The same batch for ever, on the host: random bytes, latents and labels."""

    def __init__(self, experiment: Experiment):
        rng, limits = np.random.default_rng(0), {'label': max(experiment.source.num_classes, 1)}

        def draw(name, a):
            if a.dtype.kind in 'iu':
                return rng.integers(limits.get(name, 256), size=a.shape).astype(a.dtype)
            return np.abs(rng.standard_normal(a.shape)).astype(a.dtype)

        self._batch = {name: draw(name, a) for name, a in batch_shapes(experiment).items()}

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batch

    def get_state(self) -> dict:
        return {}


def batches(experiment: Experiment) -> Prefetched:
    """As training is given them: each is copied to the devices anew."""
    return Prefetched(Same(experiment), batch_sharding(experiment.mesh))


class Work(NamedTuple):
    """Of one training step, whatever computes it."""

    flops: int
    traffic: int  # bytes, the least there are: what products read and write, parameters and averages once


def trace_plain(name: str, batch_size: int, **network: Any) -> tuple[Any, Any]:
    """(the training step as it is traced, what it is given): nothing recomputed, and attention written out."""
    config = config_of(name, **network)
    fields = getattr(nets, config['network']['name']).__dataclass_fields__
    config['network'] |= {key: value for key, value in PLAIN.items() if key in fields}
    experiment = open_model(config, batch_size)
    trainer, raw = experiment.trainer(), batch_shapes(experiment)
    _, shapes, shardings = trainer.init(raw)
    return trainer.step(shardings).trace(shapes, trainer.frozen, raw), (shapes, raw)


def count_work(name: str, batch_size: int, **network: Any) -> Work:
    """Of `trace_plain`: the logits of attention count as bytes."""
    traced, given = trace_plain(name, batch_size, **network)
    program = parse(traced.lower().compiler_ir('hlo').as_hlo_module().to_string())
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(given))
    return Work(count_flops(traced.jaxpr), product_traffic(program, count_runs(program)) + 2 * held)
