"""PixArt-alpha (Chen et al. 2023) and PixArt-Sigma: diffusers' PixArtTransformer2DModel."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.weights.architecture import INPUT, Architecture
from diffjax.weights.rules import Leaf, array, dense, patches
from diffjax.weights.settings import Settings

CLASS_NAME = 'PixArtTransformer2DModel'


def to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings(CLASS_NAME, config)
    heads = settings.integer('num_attention_heads', 16, most=512)
    hidden = heads * settings.integer('attention_head_dim', 72, most=4096)
    in_channels = settings.integer('in_channels', 4, most=4096)
    size, patch = settings.integer('sample_size', 128, most=4096), settings.integer('patch_size', 2, most=256)
    if size % patch:
        raise settings.wrong('sample_size', f'a multiple of patch_size={patch}')
    settings.choice('cross_attention_dim', 1152, hidden)
    settings.choice('norm_type', 'ada_norm_single', 'ada_norm_single')
    settings.choice('activation_fn', 'gelu-approximate', 'gelu-approximate')
    settings.choice('attention_bias', True, True)
    settings.choice('attention_type', 'default', 'default')
    settings.choice('norm_elementwise_affine', False, False)
    settings.choice('norm_eps', 1e-6, 1e-6)
    settings.choice('num_vector_embeds', None, None)  # of older files, as the next
    settings.choice('only_cross_attention', False, False)
    out_channels = settings.value('out_channels', 8)
    scale = settings.value('interpolation_scale', None)
    sizes = settings.choice('use_additional_conditions', None, None, True, False)
    options = {
        'patch_size': patch,
        'hidden_size': hidden,
        'depth': settings.integer('num_layers', 28, most=512),
        'num_heads': heads,
        'text_size': settings.integer('caption_channels', None),
        'size_conditions': 'embedded' if (size == 128 if sizes is None else sizes) else 'none',
        'base_size': size // patch,
        # What nothing stands for, in diffusers: one for 512 pixels, two for 1024.
        'interpolation_scale': max(size // 64, 1) if scale is None else settings.number('interpolation_scale', 1),
        'num_classes': 0,
        'out_channels': in_channels if out_channels is None else settings.integer('out_channels', 8, most=4096),
        'scan_layers': False,
        INPUT: {'shape': [size, size, in_channels]},
    }
    if options['interpolation_scale'] <= 0:
        raise settings.wrong('interpolation_scale', 'a positive number')
    settings.done(
        *('dropout', 'norm_num_groups', 'upcast_attention', 'num_embeds_ada_norm'),
        *('use_linear_projection', 'double_self_attention'),  # of older files
    )
    return options


def to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    size, _, in_channels = options[INPUT]['shape']
    return {
        '_class_name': CLASS_NAME,
        'num_attention_heads': options['num_heads'],
        'attention_head_dim': options['hidden_size'] // options['num_heads'],
        'in_channels': in_channels,
        'out_channels': options['out_channels'],
        'num_layers': options['depth'],
        'dropout': 0.0,
        'norm_num_groups': 32,
        'cross_attention_dim': options['hidden_size'],
        'attention_bias': True,
        'sample_size': size,
        'patch_size': options['patch_size'],
        'activation_fn': 'gelu-approximate',
        'num_embeds_ada_norm': 1000,
        'upcast_attention': False,
        'norm_type': 'ada_norm_single',
        'norm_elementwise_affine': False,
        'norm_eps': 1e-6,
        'interpolation_scale': options['interpolation_scale'],
        'use_additional_conditions': options['size_conditions'] == 'embedded',
        'caption_channels': options['text_size'],
        'attention_type': 'default',
    }


def table(options: Mapping[str, Any]) -> list[Leaf]:
    rows = [
        *dense('patch_embed', 'pos_embed.proj', layout=patches(options['patch_size'])),
        *dense('text_in', 'caption_projection.linear_1'),
        *dense('text_out', 'caption_projection.linear_2'),
        *dense('modulation', 'adaln_single.linear'),
        *array('final_modulation_table', 'scale_shift_table'),
        *dense('final', 'proj_out'),
    ]
    embedders = {'time': 'timestep'}
    if options['size_conditions'] == 'embedded':
        embedders |= {'resolution': 'resolution', 'aspect_ratio': 'aspect_ratio'}
    for ours, theirs in embedders.items():
        for i, layer in enumerate(('in', 'out'), 1):
            rows += dense(f'{ours}/{layer}', f'adaln_single.emb.{theirs}_embedder.linear_{i}')
    for i in range(options['depth']):
        ours, theirs = f'blocks_{i}', f'transformer_blocks.{i}'
        rows += [
            *array(f'{ours}/modulation_table', f'{theirs}.scale_shift_table'),
            *dense(f'{ours}/attention/qkv', *(f'{theirs}.attn1.to_{name}' for name in 'qkv')),
            *dense(f'{ours}/attention/out', f'{theirs}.attn1.to_out.0'),
            *dense(f'{ours}/cross_attention/q', f'{theirs}.attn2.to_q'),
            *dense(f'{ours}/cross_attention/kv', f'{theirs}.attn2.to_k', f'{theirs}.attn2.to_v'),
            *dense(f'{ours}/cross_attention/out', f'{theirs}.attn2.to_out.0'),
            *dense(f'{ours}/mlp_in', f'{theirs}.ff.net.0.proj'),
            *dense(f'{ours}/mlp_out', f'{theirs}.ff.net.2'),
        ]
    return rows


def inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    def abstract(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    cond = {'text': abstract(1, 8, options['text_size'])}
    if options['size_conditions'] == 'embedded':
        cond |= {'resolution': abstract(1, 2), 'aspect_ratio': abstract(1, 1)}
    return abstract(1, *options[INPUT]['shape']), abstract(1), cond


ARCHITECTURE = Architecture(CLASS_NAME, 'PixArt', to_options, to_config, table, inputs)
