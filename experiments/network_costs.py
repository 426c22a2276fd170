"""What networks cost: parameters, tokens and operations; and what a sample costs, predicted beside measured.

    python experiments/network_costs.py                          published networks, nothing of which is allocated
    python experiments/network_costs.py --workdir=runs/digits    a trained run: predicted, then drawn and timed

Operations are multiply-adds, as papers count them; FLOPs are twice that. A sample costs

    evaluations of the network  x  branches of guidance  x  operations of a forward pass

and, with --workdir, as many seconds as so many forward passes of the same batch take by themselves. What the loop, the
solver and the guidance add shows in the difference.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import nets
from diffjax.evaluation import markdown_table
from diffjax.training.flops import count_flops

ROUNDS = 5  # of timed forward passes


class Published(NamedTuple):
    """A network as its paper has it. x: [H, W, C]; text: (tokens, features), pooled: features, 0 for none."""

    network: str
    options: dict[str, Any]
    x: tuple[int, int, int]
    patch: int = 0  # pixels of a token's side; 0: no tokens
    text: tuple[int, int] = (0, 0)
    pooled: int = 0
    more: tuple[tuple[str, int], ...] = ()  # further conditions, and their features (0: one number)
    evaluations: int = 50
    branches: int = 2


def dit(size: str, patch: int) -> Published:
    depth, width, heads = {'S': (12, 384, 6), 'B': (12, 768, 12), 'L': (24, 1024, 16), 'XL': (28, 1152, 16)}[size]
    options = {'patch_size': patch, 'hidden_size': width, 'depth': depth, 'num_heads': heads}
    return Published('DiT', options | {'num_classes': 1000, 'out_channels': 8}, (32, 32, 4), patch, evaluations=250)


ADM = {'num_res_blocks': 2, 'attention_resolutions': (32, 16, 8), 'head_dim': 64, 'resampling': 'resnet'}
ADM |= {'num_classes': 1000, 'null_label': False, 'out_channels': 6}
ADM |= {'base_channels': 256, 'channel_multipliers': (1, 1, 2, 2, 4, 4)}
SD = {'base_channels': 320, 'num_res_blocks': 2, 'time_conditioning': 'additive', 'num_groups': 32, 'out_channels': 4}
SD |= {'attention_resolutions': (), 'num_classes': 0}
SD_1_5 = SD | {'channel_multipliers': (1, 2, 4, 4), 'attention_levels': (0, 1, 2), 'num_heads': 8}
SD_1_5 |= {'text_size': 768, 'projection': 'conv'}
SDXL = SD | {'channel_multipliers': (1, 2, 4), 'attention_levels': (1, 2), 'head_dim': 64}
SDXL |= {'text_size': 2048, 'pooled_size': 1280, 'transformer_depth': (1, 2, 10)}
PIXART = {'patch_size': 2, 'hidden_size': 1152, 'depth': 28, 'num_heads': 16, 'out_channels': 8}
SD3 = {'hidden_size': 1536, 'depth': 24, 'num_heads': 24, 'out_channels': 16}
FLUX = {'hidden_size': 3072, 'depth': 19, 'single_depth': 38, 'num_heads': 24, 'out_channels': 16}
UVIT = {'patch_size': 2, 'hidden_size': 1152, 'depth': 29, 'num_heads': 16, 'num_classes': 1000, 'out_channels': 4}

PUBLISHED = {
    **{f'DiT-{size}/{patch}': dit(size, patch) for size in ('S', 'B', 'L', 'XL') for patch in (2, 4, 8)},
    'U-ViT-H/2': Published('UViT', UVIT, (32, 32, 4), 2),
    'PixArt-alpha 512': Published('PixArt', PIXART, (64, 64, 4), 2, (120, 4096), evaluations=20),
    'SD3 medium, 1024': Published('MMDiT', SD3, (128, 128, 16), 2, (154, 4096), 2048, evaluations=28),
    'FLUX.1 dev, 1024': Published(
        'Flux', FLUX | {'guidance': 'embedded'}, (128, 128, 16), 2, (512, 4096), 768, (('guidance', 0),), 28, 1
    ),
    'ADM 256': Published('UNet', ADM, (256, 256, 3), evaluations=250),
    'SD 1.5, 512': Published('UNet', SD_1_5, (64, 64, 4), text=(77, 768)),
    'SDXL, 1024': Published('UNet', SDXL, (128, 128, 4), text=(77, 2048), pooled=1280, more=(('size', 6),)),
    **{
        f'EDM2-{size}': Published(
            'EDM2', {'base_channels': width, 'num_classes': 1000, 'out_channels': 4}, (64, 64, 4), evaluations=63
        )
        for size, width in (('XS', 128), ('S', 192), ('M', 256), ('L', 320), ('XL', 384), ('XXL', 448))
    },
}


def abstract(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def condition(row: Published) -> Any:
    """What the network is told, as shapes."""
    if not row.text[0]:
        return abstract(1, dtype=np.int32) if row.options.get('num_classes') else None
    cond = {'text': abstract(1, *row.text)} | ({'pooled': abstract(1, row.pooled)} if row.pooled else {})
    return cond | {name: abstract(1, *([features] if features else [])) for name, features in row.more}


def costs(name: str, row: Published) -> dict[str, Any]:
    """The line of a published network."""
    model = nets.as_model(getattr(nets, row.network)(**row.options))
    inputs = abstract(1, *row.x), abstract(1), condition(row)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    products = count_flops(jax.make_jaxpr(model.apply)(params, *inputs)) / 2
    return {
        'network': name,
        'parameters, M': nets.count_parameters(params) / 1e6,
        'x': 'x'.join(map(str, row.x)),
        'tokens': row.x[0] * row.x[1] // row.patch**2 if row.patch else '',
        'G multiply-adds': products / 1e9,
        'evaluations': row.evaluations,
        'branches': row.branches,
        'T multiply-adds a sample': products * row.evaluations * row.branches / 1e12,
    }


def of_run(workdir: str, num_samples: int) -> dict[str, Any]:
    """A trained run's cost of a sample, predicted and measured, on this machine."""
    import diffjax

    run = diffjax.load(workdir)
    experiment, size = run.experiment, run.sampler.batch_size
    plan, guidance = experiment.plan(), experiment.guidance()
    calls, branches = plan.num_evaluations, 1 if guidance is None else 2
    classes = experiment.task.num_classes
    labels = np.arange(size * branches, dtype=np.int32) % max(classes, 1)
    x, t = jnp.zeros((size * branches, *experiment.sample_shape)), jnp.full(size * branches, 500.0)
    cond = labels if classes else None
    products = count_flops(jax.make_jaxpr(run.network.apply)(run.params, x, t, cond)) / 2 / len(labels)

    forward = jax.jit(run.network.apply)
    forward(run.params, x, t, cond).block_until_ready()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        forward(run.params, x, t, cond).block_until_ready()
        seconds.append(time.perf_counter() - began)

    count = -(-num_samples // size) * size
    wanted = np.resize(labels, count)
    options = experiment.sampling_options()
    run.sampler(run.params, plan, wanted[:1], **options)  # compiles
    began = time.perf_counter()
    run.sampler(run.params, plan, wanted, **options)
    measured = (time.perf_counter() - began) / count
    predicted = calls * float(np.median(seconds)) / size
    return {
        'run': workdir,
        'evaluations': calls,
        'branches': branches,
        'M multiply-adds': products / 1e6,
        'G multiply-adds a sample': products * calls * branches / 1e9,
        'predicted, ms a sample': 1e3 * predicted,
        'measured, ms a sample': 1e3 * measured,
        'measured / predicted': measured / predicted,
    }


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', help='a trained run, instead of the published networks')
    parser.add_argument('--num_samples', type=int, default=512, help='drawn with --workdir; default: %(default)s')
    parser.add_argument('--networks', default='', help='names of the table, separated by semicolons; default: all')
    parser.add_argument('--out', type=Path, help='a CSV to write')
    options = parser.parse_args(argv)
    names = options.networks.split(';') if options.networks else list(PUBLISHED)
    if unknown := [name for name in names if name not in PUBLISHED]:
        parser.error(f'--networks: unknown {"; ".join(unknown)}; valid: {"; ".join(PUBLISHED)}')
    if options.num_samples < 1:
        parser.error(f'--num_samples is at least 1, got {options.num_samples}')
    if options.workdir:
        try:
            rows = [of_run(options.workdir, options.num_samples)]
        except (OSError, ValueError) as error:
            parser.error(f'--workdir: {error}')
    else:
        rows = [costs(name, PUBLISHED[name]) for name in names]
    print(markdown_table(rows))
    if options.out:
        with open(options.out, 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return rows


if __name__ == '__main__':
    main()
