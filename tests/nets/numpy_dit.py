"""A DiT in NumPy, float64, one sample at a time, with loops where the network has reshapes: what it should compute."""

import jax
import numpy as np


def linear(h, layer):
    return h @ layer['kernel'] + layer.get('bias', 0)


def silu(h):
    return h / (1 + np.exp(-h))


def gelu(h):
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))


def standardised(h):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)


def over_rms(h):
    return h / np.sqrt(np.mean(h**2, -1, keepdims=True) + 1e-6)


def embedded_time(t, layer):
    angles = t * 10_000 ** (-np.arange(128) / 128)
    return linear(silu(linear(np.concatenate([np.cos(angles), np.sin(angles)]), layer['in'])), layer['out'])


def rotated(h, places):
    """h [L, head_dim], pairs as complex numbers: half of them turned by rows, half by columns."""
    points, quarter = h[:, ::2] + 1j * h[:, 1::2], h.shape[1] // 4
    for j in range(2 * quarter):
        axis, power = divmod(j, quarter)
        points[:, j] *= np.exp(1j * places[:, axis] * 10_000 ** (-power / quarter))
    return np.stack([points.real, points.imag], -1).reshape(h.shape)


def head_normed(h, layer, name, qk_norm):
    if qk_norm == 'none':
        return h
    scale = layer[f'{name}_norm']['scale']
    return over_rms(h) * scale if qk_norm == 'rms' else standardised(h) * scale + layer[f'{name}_norm']['bias']


def attend(h, layer, heads, qk_norm, places):
    d = h.shape[-1] // heads
    q, k, v = np.split(linear(h, layer['qkv']), 3, axis=-1)
    out = np.zeros_like(q)
    for i in range(heads):
        cut = slice(i * d, (i + 1) * d)
        one, other = (head_normed(a[:, cut], layer, name, qk_norm) for a, name in ((q, 'q'), (k, 'k')))
        if places is not None:
            one, other = rotated(one, places), rotated(other, places)
        weights = np.exp(one @ other.T / np.sqrt(d))
        out[:, cut] = weights / weights.sum(-1, keepdims=True) @ v[:, cut]
    return linear(out, layer['out'])


def numpy_dit(
    params,
    x,
    t,
    label,
    p,
    heads,
    *,
    positions='sincos',
    qk_norm='none',
    norm='layer',
    mlp='gelu',
    conditioning='adaln',
    num_registers=0,
):
    """One sample: `x: [H, W, C] -> [H, W, out_channels]`, with the unrolled parameters of `diffjax.nets.DiT`."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    height, width, _ = x.shape

    def normed(h, layer, name):
        return standardised(h) if norm == 'layer' else over_rms(h) * layer[name]['scale']

    def modulations(c, layer, name, parts):
        single = conditioning == 'adaln_single'
        return [*(c.reshape(parts, -1) + layer[f'{name}_table'])] if single else np.split(linear(c, layer[name]), parts)

    corners = [(i, j) for i in range(0, height, p) for j in range(0, width, p)]
    tokens = np.stack([x[i : i + p, j : j + p].reshape(-1) for i, j in corners])
    tokens = linear(tokens, params['patch_embed'])
    if positions != 'rope':
        tokens = tokens + params['pos_embed']
    places = np.array([(0, 0)] * num_registers + [(i // p, j // p) for i, j in corners])
    if num_registers:
        tokens = np.concatenate([params['registers'], tokens])

    condition = embedded_time(t, params['condition']['time'])
    condition = condition + params['condition']['label']['table']['embedding'][label]
    c = silu(condition)
    told = linear(c, params['modulation']) if conditioning == 'adaln_single' else c
    for i in range(sum(name.startswith('blocks_') for name in params)):
        block = params[f'blocks_{i}']
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulations(told, block, 'modulation', 6)
        h = normed(tokens, block, 'norm_1') * (1 + scale_1) + shift_1
        turned_by = None if positions == 'sincos' else places
        tokens = tokens + gate_1 * attend(h, block['attention'], heads, qk_norm, turned_by)
        h = linear(normed(tokens, block, 'norm_2') * (1 + scale_2) + shift_2, block['mlp_in'])
        if mlp == 'swiglu':
            inside = h.shape[-1] // 2
            h = silu(h[:, :inside]) * h[:, inside:]
        else:
            h = gelu(h)
        tokens = tokens + gate_2 * linear(h, block['mlp_out'])

    told = np.concatenate([condition, condition]) if conditioning == 'adaln_single' else c
    shift, scale = modulations(told, params, 'final_modulation', 2)
    tokens = linear(normed(tokens, params, 'final_norm') * (1 + scale) + shift, params['final'])[num_registers:]
    out = np.zeros((height, width, tokens.shape[-1] // p**2))
    for token, (i, j) in zip(tokens, corners, strict=True):
        out[i : i + p, j : j + p] = token.reshape(p, p, -1)
    return out
