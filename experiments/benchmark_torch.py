"""One training step of DiT as PyTorch does it at its best: torch.compile, autocast, fused AdamW, averages in one call.

It learns eps with the simple loss alone: our recipe's bound on the variance is more work, which PyTorch is spared. That
both networks compute the same function is what `benchmark_networks.py` looks at first.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from stopwatch import Seconds
from torch_dit import TorchDiT

DECAY = 0.9999
CHANNELS, SIDE = 4, 32  # of ImageNet 256's latents
SIZES = 'patch_size', 'hidden_size', 'depth', 'num_heads'


class Theirs(NamedTuple):
    by: str
    queued: Seconds
    compile_seconds: float  # of the first two steps
    memory: int  # bytes at the worst time; 0 on a CPU


def make_step(network: dict[str, Any], batch_size: int, device: str):
    """A function without arguments that trains one step."""
    sizes = {name: network[name] for name in SIZES}
    module = TorchDiT(size=SIDE, channels=CHANNELS, out_channels=2 * CHANNELS, num_classes=1000, **sizes).to(device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    called = torch.compile(module)
    lower = torch.autocast(device, torch.bfloat16, enabled=network.get('compute_dtype') == 'bfloat16')
    rng = np.random.default_rng(0)
    moments = [torch.from_numpy(rng.standard_normal((batch_size, CHANNELS, SIDE, SIDE), np.float32)) for _ in '12']
    labels = torch.arange(batch_size) % 1000
    beta = torch.linspace(1e-4, 0.02, 1000, device=device)
    kept = torch.cumprod(1 - beta, dim=0)

    def step():
        mean, std, label = (a.to(device, non_blocking=True) for a in (*moments, labels))
        x0 = 0.18215 * (mean + std * torch.randn_like(mean))
        t, eps = torch.randint(1000, (batch_size,), device=device), torch.randn_like(x0)
        alpha = kept[t].sqrt()[:, None, None, None]
        x = alpha * x0 + (1 - alpha**2).sqrt() * eps
        label = torch.where(torch.rand(batch_size, device=device) < 0.1, 1000, label)
        optimizer.zero_grad(set_to_none=True)
        with lower:
            out = called(x, t.float(), label)
        ((out[:, :CHANNELS].float() - eps) ** 2).mean().backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - DECAY)

    return step


def torch_times(network: dict[str, Any], batch_size: int, rounds: int, num_steps: int) -> Theirs:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.set_float32_matmul_precision('high')  # as JAX's default does
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    step, began = make_step(network, batch_size, device), time.perf_counter()
    step(), step(), wait()
    compiled, taken = time.perf_counter() - began, []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(num_steps):
            step()
        wait()
        taken.append((time.perf_counter() - began) / num_steps)
    memory = torch.cuda.max_memory_allocated() if device == 'cuda' else 0
    return Theirs(f'torch {torch.__version__} compiled', Seconds(tuple(taken[1:])), compiled, memory)
