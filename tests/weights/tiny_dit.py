"""A tiny DiT as diffusers would have saved it, its names written out by hand."""

import numpy as np

HIDDEN, DEPTH, PATCH, CHANNELS, CLASSES = 16, 2, 2, 3, 5
CONFIG = {
    '_class_name': 'DiTTransformer2DModel',
    '_diffusers_version': '0.42.0',
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': 8,
    'dropout': 0.0,
    'in_channels': CHANNELS,
    'norm_elementwise_affine': False,
    'norm_eps': 1e-5,
    'norm_num_groups': 32,
    'norm_type': 'ada_norm_zero',
    'num_attention_heads': 2,
    'num_embeds_ada_norm': CLASSES,
    'num_layers': DEPTH,
    'out_channels': 4,
    'patch_size': PATCH,
    'sample_size': 4,
    'upcast_attention': False,
}


def linear(name, inputs, outputs):
    return {f'{name}.weight': (outputs, inputs), f'{name}.bias': (outputs,)}


def their_shapes():
    shapes = {'pos_embed.proj.weight': (HIDDEN, CHANNELS, PATCH, PATCH), 'pos_embed.proj.bias': (HIDDEN,)}
    for i in range(DEPTH):
        block = f'transformer_blocks.{i}'
        shapes |= linear(f'{block}.norm1.emb.timestep_embedder.linear_1', 256, HIDDEN)
        shapes |= linear(f'{block}.norm1.emb.timestep_embedder.linear_2', HIDDEN, HIDDEN)
        shapes[f'{block}.norm1.emb.class_embedder.embedding_table.weight'] = (CLASSES + 1, HIDDEN)
        shapes |= linear(f'{block}.norm1.linear', HIDDEN, 6 * HIDDEN)
        for name in ('to_q', 'to_k', 'to_v', 'to_out.0'):
            shapes |= linear(f'{block}.attn1.{name}', HIDDEN, HIDDEN)
        shapes |= linear(f'{block}.ff.net.0.proj', HIDDEN, 4 * HIDDEN) | linear(f'{block}.ff.net.2', 4 * HIDDEN, HIDDEN)
    return shapes | linear('proj_out_1', HIDDEN, 2 * HIDDEN) | linear('proj_out_2', HIDDEN, PATCH**2 * 4)


def draw(dtype=np.float32, seed=0):
    """Random tensors of a tiny DiT in diffusers' names; embeddings alike in all blocks, as in published files."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in their_shapes().items():
        first = name.replace('transformer_blocks.1.norm1.emb', 'transformer_blocks.0.norm1.emb')
        tensors[name] = tensors[first] if first in tensors else rng.standard_normal(shape).astype(dtype)
    return tensors


def original(tensors):
    """The same weights in the names of facebookresearch/DiT, as diffusers' conversion script pairs them."""
    embeddings = 'transformer_blocks.0.norm1.emb'
    pairs = {
        'x_embedder.proj': 'pos_embed.proj',
        't_embedder.mlp.0': f'{embeddings}.timestep_embedder.linear_1',
        't_embedder.mlp.2': f'{embeddings}.timestep_embedder.linear_2',
        'final_layer.adaLN_modulation.1': 'proj_out_1',
        'final_layer.linear': 'proj_out_2',
    }
    for i in range(DEPTH):
        theirs = f'transformer_blocks.{i}'
        pairs |= {
            f'blocks.{i}.adaLN_modulation.1': f'{theirs}.norm1.linear',
            f'blocks.{i}.attn.proj': f'{theirs}.attn1.to_out.0',
            f'blocks.{i}.mlp.fc1': f'{theirs}.ff.net.0.proj',
            f'blocks.{i}.mlp.fc2': f'{theirs}.ff.net.2',
        }
    out = {f'{a}.{kind}': tensors[f'{b}.{kind}'] for a, b in pairs.items() for kind in ('weight', 'bias')}
    for i in range(DEPTH):
        for kind in ('weight', 'bias'):
            parts = [tensors[f'transformer_blocks.{i}.attn1.to_{part}.{kind}'] for part in 'qkv']
            out[f'blocks.{i}.attn.qkv.{kind}'] = np.concatenate(parts)
    out['y_embedder.embedding_table.weight'] = tensors[f'{embeddings}.class_embedder.embedding_table.weight']
    return out
