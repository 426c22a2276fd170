"""Flux: diffusers' FluxTransformer2DModel, FLUX.1 dev and schnell.

Theirs is given packed latents: a token holds 2 x 2 pixels channel by channel, [C, 2, 2]. Ours cuts its own patches, a
token being [2, 2, C]; the layouts of both ends put one order into the other.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.nets.flux import PATCH_SIZE
from diffjax.weights.architecture import INPUT, Architecture
from diffjax.weights.mmdit import IMAGE, condition, joint_block, qk_norms
from diffjax.weights.rules import Layout, Leaf, array, dense
from diffjax.weights.settings import Settings

CLASS_NAME = 'FluxTransformer2DModel'
SIDE = 128  # of the latents of a usual image, 1024 x 1024; theirs has no size of its own

UNPACKED_IN = Layout(  # [out, C * 4] <-> [4 * C, out]
    lambda a: a.reshape(a.shape[0], -1, PATCH_SIZE**2).transpose(2, 1, 0).reshape(-1, a.shape[0]),
    lambda a: a.reshape(PATCH_SIZE**2, -1, a.shape[-1]).transpose(2, 1, 0).reshape(a.shape[-1], -1),
)
UNPACKED_OUT = Layout(  # [C * 4, in] <-> [in, 4 * C]
    lambda a: a.reshape(-1, PATCH_SIZE**2, a.shape[-1]).transpose(2, 1, 0).reshape(a.shape[-1], -1),
    lambda a: a.reshape(a.shape[0], PATCH_SIZE**2, -1).transpose(2, 1, 0).reshape(-1, a.shape[0]),
)
UNPACKED_BIAS = Layout(  # [C * 4] <-> [4 * C]
    lambda a: a.reshape(-1, PATCH_SIZE**2).transpose(1, 0).reshape(-1),
    lambda a: a.reshape(PATCH_SIZE**2, -1).transpose(1, 0).reshape(-1),
)


def to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings(CLASS_NAME, config)
    settings.choice('patch_size', 1, 1)
    heads, head_dim = settings.integer('num_attention_heads', 24), settings.integer('attention_head_dim', 128)
    sizes = settings.integers('axes_dims_rope', (16, 56, 56))
    if len(sizes) != 3 or any(size % 2 for size in sizes) or sum(sizes) != head_dim:
        raise settings.wrong('axes_dims_rope', f'three even numbers whose sum is attention_head_dim={head_dim}')
    in_channels = settings.integer('in_channels', 64)
    out_channels = settings.value('out_channels', None) or in_channels
    for name, channels in (('in_channels', in_channels), ('out_channels', out_channels)):
        if type(channels) is not int or channels % PATCH_SIZE**2:
            raise settings.wrong(name, f'a multiple of {PATCH_SIZE**2}, the pixels of a patch')
    guided = settings.choice('guidance_embeds', False, False, True)
    options = {
        'hidden_size': heads * head_dim,
        'depth': settings.integer('num_layers', 19, most=512),
        'single_depth': settings.integer('num_single_layers', 38, most=512),
        'num_heads': heads,
        'rope_sizes': list(sizes),
        'text_size': settings.integer('joint_attention_dim', 4096),
        'pooled_size': settings.integer('pooled_projection_dim', 768),
        'guidance': 'embedded' if guided else 'none',
        'out_channels': out_channels // PATCH_SIZE**2,
        'scan_layers': False,
        INPUT: {'shape': [SIDE, SIDE, in_channels // PATCH_SIZE**2]},
    }
    settings.done()
    return options


def to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    in_channels, out_channels = PATCH_SIZE**2 * options[INPUT]['shape'][2], PATCH_SIZE**2 * options['out_channels']
    return {
        '_class_name': CLASS_NAME,
        'patch_size': 1,
        'in_channels': in_channels,
        'out_channels': None if out_channels == in_channels else out_channels,
        'num_layers': options['depth'],
        'num_single_layers': options['single_depth'],
        'attention_head_dim': options['hidden_size'] // options['num_heads'],
        'num_attention_heads': options['num_heads'],
        'joint_attention_dim': options['text_size'],
        'pooled_projection_dim': options['pooled_size'],
        'guidance_embeds': options['guidance'] == 'embedded',
        'axes_dims_rope': list(options['rope_sizes']),
    }


def inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    def array_of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), np.float32)

    cond = {'text': array_of(4, options['text_size']), 'pooled': array_of(options['pooled_size'])}
    cond |= {'guidance': array_of()} if options['guidance'] == 'embedded' else {}
    return array_of(*options[INPUT]['shape']), array_of(), cond


def table(options: Mapping[str, Any]) -> list[Leaf]:
    size, guided = options['hidden_size'], options['guidance'] == 'embedded'
    rows = [
        *dense('patch_embed', 'x_embedder', layout=UNPACKED_IN),
        *condition('timestep', *(['guidance'] if guided else []), 'text'),
    ]
    for i in range(options['depth']):
        rows += joint_block(f'double_blocks_{i}', f'transformer_blocks.{i}', 'rms')
    _, qkv, norms, *_ = IMAGE
    for i in range(options['single_depth']):
        ours, theirs = f'single_blocks_{i}', f'single_transformer_blocks.{i}'
        parts = (*(f'{theirs}.attn.{name}' for name in qkv), f'{theirs}.proj_mlp')
        rows += [
            *dense(f'{ours}/modulation', f'{theirs}.norm.linear'),
            *dense(f'{ours}/in', *parts, sizes=(size, size, size, 4 * size)),
            *qk_norms(ours, f'{theirs}.attn', 'rms', norms),
            *dense(f'{ours}/out', f'{theirs}.proj_out'),
        ]
    return [
        *rows,
        *dense('final/modulation', 'norm_out.linear'),
        *array('final/linear/kernel', 'proj_out.weight', UNPACKED_OUT),
        *array('final/linear/bias', 'proj_out.bias', UNPACKED_BIAS),
    ]


ARCHITECTURE = Architecture(CLASS_NAME, 'Flux', to_options, to_config, table, inputs)
