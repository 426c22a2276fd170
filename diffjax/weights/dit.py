"""DiT (Peebles & Xie 2023): diffusers' DiTTransformer2DModel, and the file that facebookresearch/DiT publishes.

diffusers keeps the embeddings of time and label once in every block; they are all the same. It spaces the frequencies
of the time embedding in its own way (`frequency_shift`), and the second layer norm of a block adds 1e-5 to the variance
where the published model, and ours, adds 1e-6; export asks for the latter.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.nets.layers import sincos_positions
from diffjax.weights.architecture import INPUT, Architecture, WeightsError
from diffjax.weights.rules import ROW, Leaf, array, dense, embed, fixed, patches, shared
from diffjax.weights.settings import Settings

LARGEST_POSITIONS = 2**28  # numbers in a table of positions: it is computed to know the network's shapes
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of S, B, L, XL: the published file does not say


def inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    t, labels = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (np.float32, np.int32))
    return jax.ShapeDtypeStruct((1, *options[INPUT]['shape']), np.float32), t, labels


# diffusers ------------------------------------------------------------------------------------------------------------


def to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings('DiTTransformer2DModel', config)
    heads, head_dim = settings.integer('num_attention_heads', 16), settings.integer('attention_head_dim', 72)
    in_channels = settings.integer('in_channels', 4)
    size, patch = settings.integer('sample_size', 32, most=4096), settings.integer('patch_size', 2)
    if size % patch:
        raise settings.wrong('sample_size', f'a multiple of patch_size={patch}')
    if (size // patch) ** 2 * heads * head_dim > LARGEST_POSITIONS:
        raise settings.wrong('sample_size', f'at most {LARGEST_POSITIONS} tokens times channels')
    settings.choice('norm_type', 'ada_norm_zero', 'ada_norm_zero')
    settings.choice('activation_fn', 'gelu-approximate', 'gelu-approximate')
    settings.choice('attention_bias', True, True)
    settings.choice('norm_elementwise_affine', False, False)
    settings.choice('norm_eps', 1e-5, 1e-5, 1e-6)
    settings.choice('cross_attention_dim', None, None)
    settings.choice('num_vector_embeds', None, None)
    settings.choice('only_cross_attention', False, False)
    settings.choice('caption_channels', None, None)
    out_channels = settings.value('out_channels', None)
    options = {
        'patch_size': patch,
        'hidden_size': heads * head_dim,
        'depth': settings.integer('num_layers', 28, most=512),
        'num_heads': heads,
        'num_classes': settings.integer('num_embeds_ada_norm', 1000),
        'out_channels': in_channels if out_channels is None else settings.integer('out_channels', None),
        'frequency_shift': 1,
        'scan_layers': False,
        INPUT: {'shape': [size, size, in_channels]},
    }
    settings.done(
        *('dropout', 'norm_num_groups', 'upcast_attention'),
        *('use_linear_projection', 'attention_type', 'double_self_attention', 'interpolation_scale'),  # of older files
    )
    return options


def to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    size, _, in_channels = options[INPUT]['shape']
    return {
        '_class_name': 'DiTTransformer2DModel',
        'num_attention_heads': options['num_heads'],
        'attention_head_dim': options['hidden_size'] // options['num_heads'],
        'in_channels': in_channels,
        'out_channels': options['out_channels'],
        'num_layers': options['depth'],
        'dropout': 0.0,
        'norm_num_groups': 32,
        'attention_bias': True,
        'sample_size': size,
        'patch_size': options['patch_size'],
        'activation_fn': 'gelu-approximate',
        'num_embeds_ada_norm': options['num_classes'],
        'upcast_attention': False,
        'norm_type': 'ada_norm_zero',
        'norm_elementwise_affine': False,
        'norm_eps': 1e-6,
    }


def table(options: Mapping[str, Any]) -> list[Leaf]:
    def positions() -> np.ndarray:
        height, width, _ = options[INPUT]['shape']
        return sincos_positions(options['hidden_size'], height // patch, width // patch)

    patch, depth = options['patch_size'], options['depth']
    embeddings = 'transformer_blocks.0.norm1.emb'
    condition = [
        *dense('condition/time/in', f'{embeddings}.timestep_embedder.linear_1'),
        *dense('condition/time/out', f'{embeddings}.timestep_embedder.linear_2'),
        *array('condition/label/table/embedding', f'{embeddings}.class_embedder.embedding_table.weight'),
    ]
    rows = [
        *dense('patch_embed', 'pos_embed.proj', layout=patches(patch)),
        *fixed('pos_embed', positions),
        *shared(condition, *((embeddings, f'transformer_blocks.{i}.norm1.emb') for i in range(1, depth))),
    ]
    for i in range(depth):
        ours, theirs = f'blocks_{i}', f'transformer_blocks.{i}'
        rows += [
            *dense(f'{ours}/modulation', f'{theirs}.norm1.linear'),
            *dense(f'{ours}/attention/qkv', *(f'{theirs}.attn1.to_{name}' for name in 'qkv')),
            *dense(f'{ours}/attention/out', f'{theirs}.attn1.to_out.0'),
            *dense(f'{ours}/mlp_in', f'{theirs}.ff.net.0.proj'),
            *dense(f'{ours}/mlp_out', f'{theirs}.ff.net.2'),
        ]
    return [*rows, *dense('final_modulation', 'proj_out_1'), *dense('final', 'proj_out_2')]


ARCHITECTURE = Architecture('DiTTransformer2DModel', 'DiT', to_options, to_config, table, inputs)


# facebookresearch/DiT -------------------------------------------------------------------------------------------------


def original_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """What the shapes in a file of facebookresearch/DiT say, None for a file of something else."""
    names = 'x_embedder.proj.weight', 'y_embedder.embedding_table.weight', 'final_layer.linear.weight', 'pos_embed'
    if not all(name in shapes for name in names):
        return None
    patch_embed, labels, final, positions = (shapes[name] for name in names)
    depth = len({name.split('.')[1] for name in shapes if name.startswith('blocks.')})
    if [len(shape) for shape in (patch_embed, labels, final, positions)] != [4, 2, 2, 3]:
        raise WeightsError(f'this looks like a DiT of facebookresearch, and its tensors have the wrong axes: {names}')
    return {
        'hidden_size': patch_embed[0],
        'patch_size': patch_embed[2],
        'in_channels': patch_embed[1],
        'out_features': final[0],
        'num_classes': labels[0] - 1,
        'num_tokens': positions[1],
        'depth': depth,
    }


def original_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings('the DiT of facebookresearch', config)
    hidden, patch = settings.integer('hidden_size', None), settings.integer('patch_size', None, most=256)
    if hidden not in HEADS:
        raise settings.wrong('hidden_size', f'{", ".join(map(str, HEADS))} (S, B, L, XL)')
    side = round(settings.integer('num_tokens', None, most=2**20) ** 0.5)
    if side**2 != config['num_tokens']:
        raise settings.wrong('num_tokens', 'a square number: the published models take square images')
    if settings.integer('out_features', None) % patch**2:
        raise settings.wrong('out_features', f'a multiple of {patch**2}, the pixels of a patch')
    options = {
        'patch_size': patch,
        'hidden_size': hidden,
        'depth': settings.integer('depth', None, most=512),
        'num_heads': HEADS[hidden],
        'num_classes': settings.integer('num_classes', None),
        'out_channels': config['out_features'] // patch**2,
        'scan_layers': False,
        INPUT: {'shape': [side * patch, side * patch, settings.integer('in_channels', None)]},
    }
    settings.done()
    return options


def original_table(options: Mapping[str, Any]) -> list[Leaf]:
    rows = [
        *dense('patch_embed', 'x_embedder.proj', layout=patches(options['patch_size'])),
        *array('pos_embed', 'pos_embed', ROW),
        *dense('condition/time/in', 't_embedder.mlp.0'),
        *dense('condition/time/out', 't_embedder.mlp.2'),
        *embed('condition/label/table', 'y_embedder.embedding_table'),
    ]
    for i in range(options['depth']):
        ours, theirs = f'blocks_{i}', f'blocks.{i}'
        rows += [
            *dense(f'{ours}/modulation', f'{theirs}.adaLN_modulation.1'),
            *dense(f'{ours}/attention/qkv', f'{theirs}.attn.qkv'),
            *dense(f'{ours}/attention/out', f'{theirs}.attn.proj'),
            *dense(f'{ours}/mlp_in', f'{theirs}.mlp.fc1'),
            *dense(f'{ours}/mlp_out', f'{theirs}.mlp.fc2'),
        ]
    last = dense('final_modulation', 'final_layer.adaLN_modulation.1')
    return [*rows, *last, *dense('final', 'final_layer.linear')]


def original_to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: their program is told the model's name (`DiT-XL/2`) on its command line."""
    del options
    return {}


ORIGINAL = Architecture('facebookresearch/DiT', 'DiT', original_options, original_to_config, original_table, inputs)
