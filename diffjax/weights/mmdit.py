"""MM-DiT (Esser et al. 2024): diffusers' SD3Transformer2DModel, Stable Diffusion 3 and 3.5.

The table of positions is read from the file: published ones are not those that diffusers makes by itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.weights.architecture import INPUT, Architecture
from diffjax.weights.rules import ROW, Leaf, array, dense, norm, patches
from diffjax.weights.settings import Settings

CLASS_NAME = 'SD3Transformer2DModel'
QK_NORMS = {None: 'none', 'rms_norm': 'rms', 'layer_norm': 'layer'}


def to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings(CLASS_NAME, config)
    heads = settings.integer('num_attention_heads', 18)
    hidden = heads * settings.integer('attention_head_dim', 64)
    size, patch = settings.integer('sample_size', 128, most=4096), settings.integer('patch_size', 2)
    if size % patch:
        raise settings.wrong('sample_size', f'a multiple of patch_size={patch}')
    settings.choice('caption_projection_dim', 1152, hidden)
    depth, in_channels = settings.integer('num_layers', 18, most=512), settings.integer('in_channels', 16)
    dual = settings.value('dual_attention_layers', ())
    if not isinstance(dual, list | tuple) or list(dual) != list(range(len(dual))) or len(dual) >= depth:
        raise settings.wrong('dual_attention_layers', f'the first blocks, 0, 1, ..., without the last one, {depth - 1}')
    out_channels = settings.value('out_channels', 16)
    options = {
        'patch_size': patch,
        'hidden_size': hidden,
        'depth': depth,
        'num_heads': heads,
        'num_dual_blocks': len(dual),
        'qk_norm': QK_NORMS[settings.choice('qk_norm', None, *QK_NORMS)],
        'pos_embed_max_size': settings.integer('pos_embed_max_size', 96, most=4096),
        'pos_embed_base_size': size // patch,
        'text_size': settings.integer('joint_attention_dim', 4096),
        'pooled_size': settings.integer('pooled_projection_dim', 2048),
        'out_channels': in_channels if out_channels is None else settings.integer('out_channels', 16),
        'scan_layers': False,
        INPUT: {'shape': [size, size, in_channels]},
    }
    settings.done()
    return options


def to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    size, _, in_channels = options[INPUT]['shape']
    return {
        '_class_name': CLASS_NAME,
        'sample_size': size,
        'patch_size': options['patch_size'],
        'in_channels': in_channels,
        'num_layers': options['depth'],
        'attention_head_dim': options['hidden_size'] // options['num_heads'],
        'num_attention_heads': options['num_heads'],
        'joint_attention_dim': options['text_size'],
        'caption_projection_dim': options['hidden_size'],
        'pooled_projection_dim': options['pooled_size'],
        'out_channels': options['out_channels'],
        'pos_embed_max_size': options['pos_embed_max_size'],
        'dual_attention_layers': list(range(options['num_dual_blocks'])),
        'qk_norm': next(theirs for theirs, ours in QK_NORMS.items() if ours == options['qk_norm']),
    }


def inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    def array_of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), np.float32)

    cond = {'text': array_of(4, options['text_size']), 'pooled': array_of(options['pooled_size'])}
    return array_of(*options[INPUT]['shape']), array_of(), cond


def table(options: Mapping[str, Any]) -> list[Leaf]:
    depth, num_dual, qk_norm = options['depth'], options['num_dual_blocks'], options['qk_norm']
    rows = [
        *dense('patch_embed', 'pos_embed.proj', layout=patches(options['patch_size'])),
        *array('pos_embed', 'pos_embed.pos_embed', ROW),
        *condition('timestep', 'text'),
    ]
    for i in range(depth - 1):
        name = f'dual_blocks_{i}' if i < num_dual else f'blocks_{i - num_dual}'
        rows += joint_block(name, f'transformer_blocks.{i}', qk_norm)
        if i < num_dual:
            rows += own_attention(name, f'transformer_blocks.{i}', qk_norm)
    last = f'transformer_blocks.{depth - 1}'
    rows += stream('last_block/image', last, qk_norm, IMAGE)
    rows += stream_inputs('last_block/text', last, qk_norm, TEXT)
    return [*rows, *dense('final/modulation', 'norm_out.linear'), *dense('final/linear', 'proj_out')]


# What Flux has as well ------------------------------------------------------------------------------------------------

# Theirs of a stream: modulation; q, k, v; norms of q and k; output of the attention; MLP.
IMAGE = ('norm1.linear', ('to_q', 'to_k', 'to_v'), ('norm_q', 'norm_k'), 'to_out.0', 'ff')
TEXT = (
    'norm1_context.linear',
    ('add_q_proj', 'add_k_proj', 'add_v_proj'),
    ('norm_added_q', 'norm_added_k'),
    'to_add_out',
    'ff_context',
)


def condition(*vectors: str) -> list[Leaf]:
    """The embeddings of text, and of the vectors that modulate: 'timestep', 'guidance', 'text'."""
    ours = {'timestep': 'time', 'guidance': 'guidance', 'text': 'pooled'}
    rows = dense('condition/text', 'context_embedder')
    for vector in vectors:
        for name, layer in (('in', 'linear_1'), ('out', 'linear_2')):
            rows += dense(f'condition/{ours[vector]}/{name}', f'time_text_embed.{vector}_embedder.{layer}')
    return rows


def joint_block(ours: str, theirs: str, qk_norm: str) -> list[Leaf]:
    """Both streams of a block."""
    return stream(f'{ours}/image', theirs, qk_norm, IMAGE) + stream(f'{ours}/text', theirs, qk_norm, TEXT)


def stream_inputs(ours: str, theirs: str, qk_norm: str, names: tuple) -> list[Leaf]:
    """The modulation, q, k and v."""
    modulation, qkv, norms, *_ = names
    rows = dense(f'{ours}/modulation', f'{theirs}.{modulation}')
    return rows + heads(f'{ours}/heads', f'{theirs}.attn', qk_norm, qkv, norms)


def stream(ours: str, theirs: str, qk_norm: str, names: tuple) -> list[Leaf]:
    """All layers of a stream."""
    *_, out, mlp = names
    return [
        *stream_inputs(ours, theirs, qk_norm, names),
        *dense(f'{ours}/out', f'{theirs}.attn.{out}'),
        *dense(f'{ours}/mlp_in', f'{theirs}.{mlp}.net.0.proj'),
        *dense(f'{ours}/mlp_out', f'{theirs}.{mlp}.net.2'),
    ]


def heads(ours: str, theirs: str, qk_norm: str, qkv: tuple[str, ...], norms: tuple[str, str]) -> list[Leaf]:
    """q, k and v, and their norms."""
    return dense(f'{ours}/qkv', *(f'{theirs}.{name}' for name in qkv)) + qk_norms(ours, theirs, qk_norm, norms)


def qk_norms(ours: str, theirs: str, qk_norm: str, names: tuple[str, str]) -> list[Leaf]:
    """The norms of q and k, where there are some; a layer norm has a bias."""
    if qk_norm == 'none':
        return []
    pairs = zip(('q_norm', 'k_norm'), names, strict=True)
    return [
        leaf for mine, name in pairs for leaf in norm(f'{ours}/{mine}', f'{theirs}.{name}', bias=qk_norm == 'layer')
    ]


def own_attention(ours: str, theirs: str, qk_norm: str) -> list[Leaf]:
    """The image's second attention, of Stable Diffusion 3.5 medium."""
    _, qkv, norms, out, _ = IMAGE
    name = f'{ours}/image/own_attention'
    return heads(name, f'{theirs}.attn2', qk_norm, qkv, norms) + dense(f'{name}/out', f'{theirs}.attn2.{out}')


ARCHITECTURE = Architecture(CLASS_NAME, 'MMDiT', to_options, to_config, table, inputs)
