"""A forward pass and a train step of our networks beside PyTorch's, in one run. Needs the extra `parity`.

    python experiments/benchmark_networks.py --networks=dit,unet

The same network on both sides (their outputs are compared first), the same batch, AdamW. Ours is one compiled program
with its state donated; PyTorch runs eagerly, or through torch.compile with `--compile`. Both run in turns, and what
counts is the median over the rounds of the ratio of their times, ours / theirs, which a noisy machine moves little.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from stopwatch import append_rows, in_turns, measure_peak

from diffjax import nets
from diffjax.evaluation import markdown_table
from diffjax.training.flops import count_flops

MAX_DIFFERENCE = {'float32': 1e-3, 'bfloat16': 5e-2}  # of outputs, relative to the largest


class Pair(NamedTuple):
    """One network twice. x is NHWC, NumPy."""

    network: nets.DiT | nets.UNet
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray | None]  # x, t, labels
    theirs: Callable  # params -> (torch module, forward(module, x NCHW, t, labels))


def dit(batch_size: int, dtype: str) -> Pair:
    """DiT-S/2 on 32 x 32 x 4 latents."""
    from torch_dit import TorchDiT

    size = {'patch_size': 2, 'hidden_size': 384, 'depth': 12, 'num_heads': 6, 'out_channels': 8, 'num_classes': 1000}
    network = nets.DiT(**size, compute_dtype=dtype)

    def theirs(params):
        module = TorchDiT(size=32, channels=4, **size)
        module.take(nets.stacking.unstack_layers(params) if 'blocks' in params else params)
        return module, lambda module, *inputs: module(*inputs)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, 32, 32, 4), np.float32)
    return Pair(network, (x, rng.uniform(0, 1000, batch_size).astype(np.float32), np.arange(batch_size)), theirs)


def unet(batch_size: int, dtype: str) -> Pair:
    """The 35 M U-Net of DDPM on CIFAR-10: 128/256/256/256 channels, attention at 16 x 16."""
    from diffusers import UNet2DModel

    from diffjax.weights import ARCHITECTURES, export_tensors
    from diffjax.weights.engine import build_network

    blocks = ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D']
    config = {
        'sample_size': 32,
        'block_out_channels': [128, 256, 256, 256],
        'down_block_types': blocks,
        'up_block_types': [name.replace('Down', 'Up') for name in blocks[::-1]],
        'downsample_padding': 0,
        'flip_sin_to_cos': False,
        'freq_shift': 1,
        'norm_eps': 1e-6,
        'attention_head_dim': None,
    }

    import torch

    with torch.device('meta'):
        whole = dict(UNet2DModel(**config).config)
    architecture = ARCHITECTURES['UNet2DModel']
    options = architecture.to_options(whole)
    network = build_network(architecture, options | {'compute_dtype': dtype})

    def theirs(params):
        module = UNet2DModel(**config)
        tensors = export_tensors(architecture, options, params)
        module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()})
        return module, lambda module, x, t, labels: module(x, t).sample

    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, 32, 32, 3), np.float32)
    return Pair(network, (x, rng.uniform(0, 1000, batch_size).astype(np.float32), None), theirs)


NETWORKS = {'dit': dit, 'unet': unet}


def ours(pair: Pair) -> tuple[Callable[[], None], Callable[[], None], dict, np.ndarray, int]:
    """(forward, train step, params on the host, output of the forward pass, FLOPs of it)."""
    model, (x, t, labels) = nets.as_model(pair.network), pair.inputs
    params = jax.jit(model.init)(jax.random.key(0), x[:1], t[:1], None if labels is None else labels[:1])
    rng = np.random.default_rng(1)  # zero-initialised layers would make the comparison of outputs empty
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.02 * rng.standard_normal(a.shape, np.float32)), params)
    host = jax.tree.map(np.array, params)
    adam = optax.adamw(1e-4)
    x, t, labels, target = jax.device_put((x, t, labels, np.zeros((*x.shape[:-1], pair.network.out_channels))))
    apply = jax.jit(model.apply)

    def step(state, x, t, labels, target):
        params, opt_state = state
        gradient = jax.grad(lambda p: jnp.mean((model.apply(p, x, t, labels) - target) ** 2))(params)
        updates, opt_state = adam.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, donate_argnums=0)
    fixed = jax.device_put(host)
    holder = [(params, adam.init(params))]
    out = np.array(apply(fixed, x, t, labels))
    flops = count_flops(jax.make_jaxpr(model.apply)(fixed, x, t, labels))

    def train():
        holder[0] = step(holder[0], x, t, labels, target)
        jax.block_until_ready(holder[0])

    return lambda: apply(fixed, x, t, labels).block_until_ready(), train, host, out, flops


def torchs(pair: Pair, params: dict, options) -> tuple[Callable[[], None], Callable[[], None], np.ndarray]:
    """(forward, train step, output of the forward pass)."""
    import torch

    device = 'cuda' if jax.default_backend() == 'gpu' and torch.cuda.is_available() else 'cpu'
    x, t, labels = (None if a is None else torch.from_numpy(a).to(device) for a in pair.inputs)
    module, call = pair.theirs(params)
    module = module.to(device).train()  # neither network has dropout
    x = x.permute(0, 3, 1, 2).contiguous()
    called = torch.compile(module) if options.compile else module
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    lower = torch.autocast(device, torch.bfloat16, enabled=options.dtype == 'bfloat16')

    def wait():
        if device == 'cuda':
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad(), lower:
            out = call(called, x, t, labels)
        wait()
        return out

    def train():
        optimizer.zero_grad(set_to_none=True)
        with lower:
            loss = (call(called, x, t, labels) ** 2).mean()
        loss.backward()
        optimizer.step()
        wait()

    return forward, train, forward().float().permute(0, 2, 3, 1).cpu().numpy()


def benchmark(name: str, options) -> list[dict]:
    """The rows of one network."""
    pair = NETWORKS[name](options.batch_size, options.dtype)
    forward, train, params, out, flops = ours(pair)
    their_forward, their_train, their_out = torchs(pair, params, options)
    difference = float(np.abs(out - their_out).max() / np.abs(their_out).max())
    if not difference < MAX_DIFFERENCE[options.dtype]:
        raise AssertionError(f'{name}: ours and theirs differ by {difference:.2g} of the largest output')
    rows = []
    for what, run, their_run, factor in (('forward', forward, their_forward, 1), ('train', train, their_train, 3)):
        times = in_turns({'ours': run, 'theirs': their_run}, options.rounds, options.seconds)
        mine, other = (np.array(times[key]) for key in ('ours', 'theirs'))
        rows.append(
            {
                'network': name,
                'what': what,
                'diffjax, ms': 1e3 * float(np.median(mine)),
                'PyTorch, ms': 1e3 * float(np.median(other)),
                'ratio': float(np.median(mine / other)),
                'fastest ratio': float(mine.min() / other.min()),
                'TFLOP/s': factor * flops / float(np.median(mine)) / 1e12,
                'outputs differ by': difference,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', default='dit,unet', help=f'of {", ".join(NETWORKS)}; default: %(default)s')
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument('--dtype', choices=MAX_DIFFERENCE, default='float32', help='of matrix products')
    parser.add_argument('--compile', action='store_true', help='torch.compile on their side')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--seconds', type=float, default=2.0, help='of each contestant in each round')
    parser.add_argument('--out', type=Path, help='a CSV to which the rows are appended')
    options = parser.parse_args(argv)
    names = options.networks.split(',')
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f'--networks: unknown {", ".join(unknown)}; valid: {", ".join(NETWORKS)}')
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        parser.error(f"{error.name} is not installed: pip install -e '.[parity]'")
    peak = measure_peak(options.dtype).flops / 1e12
    rows = [row | {'of peak': row['TFLOP/s'] / peak} for name in names for row in benchmark(name, options)]
    print(
        f'{jax.devices()[0].device_kind}, batch {options.batch_size}, {options.dtype}, jax {jax.__version__}, torch '
        f'{torch.__version__}{" compiled" if options.compile else " eager"}, {torch.get_num_threads()} threads; '
        f'a matrix product reaches {peak:.3g} TFLOP/s\n\n{markdown_table(rows)}'
    )
    if options.out:
        append_rows(options.out, rows)
    return rows


if __name__ == '__main__':
    main()
