"""DiT in plain PyTorch, as a yardstick: the paper's equations with `scaled_dot_product_attention` and nothing more.

It takes the parameters of our own network, so that a benchmark can first see that both compute the same function.
Images are NCHW, as PyTorch likes them. Not a part of diffjax: it needs the extra `parity`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Equations (1) to (3) of diffjax/nets/dit.py."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, c):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_1 * self.attend(norm(x) * (1 + scale_1) + shift_1)
        h = self.mlp_in(norm(x) * (1 + scale_2) + shift_2)
        return x + gate_2 * self.mlp_out(F.gelu(h, approximate='tanh'))

    def attend(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(batch, length, width))


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class TorchDiT(nn.Module):
    """`x [B, C, H, W], t [B], labels [B] -> [B, out_channels, H, W]`."""

    def __init__(self, *, size, channels, out_channels, patch_size, hidden_size, depth, num_heads, num_classes):
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.patch_embed = nn.Linear(patch_size**2 * channels, hidden_size)
        self.positions = nn.Parameter(torch.zeros((size // patch_size) ** 2, hidden_size), requires_grad=False)
        self.time_in, self.time_out = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.label = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.final = nn.Linear(hidden_size, patch_size**2 * out_channels)

    def forward(self, x, t, labels):
        p, (batch, channels, height, width) = self.patch_size, x.shape
        x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
        x = self.patch_embed(x.reshape(batch, -1, p * p * channels)) + self.positions
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        h = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], dim=-1))))
        c = F.silu(h + self.label(labels))
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        x = self.final(norm(x) * (1 + scale) + shift)
        x = x.reshape(batch, height // p, width // p, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, self.out_channels, height, width)

    @torch.no_grad()
    def take(self, params: dict) -> None:
        """Copies the parameters of an unrolled `diffjax.nets.DiT`."""

        def linear(layer, values):
            layer.weight.copy_(torch.from_numpy(np.array(values['kernel']).T.copy()))
            layer.bias.copy_(torch.from_numpy(np.array(values['bias'])))

        self.positions.copy_(torch.from_numpy(np.array(params['pos_embed'])))
        self.label.weight.copy_(torch.from_numpy(np.array(params['condition']['label']['table']['embedding'])))
        linear(self.time_in, params['condition']['time']['in'])
        linear(self.time_out, params['condition']['time']['out'])
        for name in ('patch_embed', 'final_modulation', 'final'):
            linear(getattr(self, name), params[name])
        for i, block in enumerate(self.blocks):
            ours = params[f'blocks_{i}']
            for name in ('modulation', 'mlp_in', 'mlp_out'):
                linear(getattr(block, name), ours[name])
            linear(block.qkv, ours['attention']['qkv'])
            linear(block.out, ours['attention']['out'])
