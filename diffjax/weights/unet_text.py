"""diffusers' UNet2DConditionModel: the U-Nets of Stable Diffusion 1 and 2 and of SDXL.

Its setting `attention_head_dim` is the number of heads of each level, whatever it is called.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffjax.weights.architecture import INPUT, Architecture, WeightsError
from diffjax.weights.rules import CONV, LINEAR, Leaf, dense, norm
from diffjax.weights.settings import Settings
from diffjax.weights.unet_layers import (
    Layer,
    attention_levels,
    frame,
    kinds,
    layers,
    settings_of,
    shared_config,
    shared_options,
    widths_in,
    widths_of,
)

DOWN = ('DownBlock2D', 'CrossAttnDownBlock2D')
UP = ('UpBlock2D', 'CrossAttnUpBlock2D')
MIDDLE = 'UNetMidBlock2DCrossAttn'
NUM_SIZES = 6  # height and width, top and left, height and width
REFINER = 1280 + 5 * 256  # SDXL's second model is told five numbers

FIXED = {  # settings with one value that is covered
    'only_cross_attention': False,
    'mid_block_only_cross_attention': None,
    'dual_cross_attention': False,
    'reverse_transformer_layers_per_block': None,
    'encoder_hid_dim': None,
    'encoder_hid_dim_type': None,
    'num_attention_heads': None,
    'num_class_embeds': None,
    'resnet_skip_time_act': False,
    'resnet_out_scale_factor': 1.0,
    'time_embedding_act_fn': None,
    'timestep_post_act': None,
    'time_cond_proj_dim': None,
    'conv_in_kernel': 3,
    'conv_out_kernel': 3,
    'attention_type': 'default',
    'class_embeddings_concat': False,
    'cross_attention_norm': None,
}


def to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings('UNet2DConditionModel', config)
    widths = widths_in(settings, (320, 640, 1280, 1280))
    for name, value in FIXED.items():
        settings.choice(name, value, value, *([int(value)] if type(value) is float else []))
    settings.choice('mid_block_type', MIDDLE, MIDDLE)
    options = shared_options(settings, widths, channels=4)
    heads = _each(settings, 'attention_head_dim', 8, len(widths), most=4096)
    if any(width % count for width, count in zip(widths, heads, strict=True)):
        raise settings.wrong('attention_head_dim', f'numbers of heads that divide the channels {list(widths)}')
    linear = settings.choice('use_linear_projection', False, True, False)
    options |= {
        'attention_levels': _levels(settings, len(widths)),
        'resampling': 'conv',
        'num_heads': heads,
        'transformer_depth': _each(settings, 'transformer_layers_per_block', 1, len(widths), most=64),
        'projection': 'linear' if linear else 'conv',
        'text_size': settings.integer('cross_attention_dim', 1280),
        'num_classes': 0,
    }
    options |= _added(settings)
    # Logits are float32 here anyway; the number of heads belongs to an embedding that is refused.
    settings.done('upcast_attention', 'addition_embed_type_num_heads')
    return options


def _each(settings: Settings, name: str, default: int, levels: int, *, most: int) -> list[int]:
    """One whole number for each level, of which theirs may name one for all."""
    value = settings.value(name, default)
    each = [value] * levels if type(value) is int else value
    valid = isinstance(each, list | tuple) and len(each) == levels
    if not valid or any(type(item) is not int or not 1 <= item <= most for item in each):
        raise settings.wrong(name, f'a whole number from 1 to {most}, or {levels} of them')
    return list(each)


def _levels(settings: Settings, num_levels: int) -> list[int]:
    down = kinds(settings, 'down_block_types', [*3 * [DOWN[1]], DOWN[0]], DOWN, num_levels)
    up = kinds(settings, 'up_block_types', [UP[0], *3 * [UP[1]]], UP, num_levels)
    levels = [level for level, name in enumerate(down) if name == DOWN[1]]
    if levels != [level for level, name in enumerate(reversed(up)) if name == UP[1]]:
        raise settings.wrong('up_block_types', f'attention at the levels that have it on the way down, {levels}')
    return levels


def _added(settings: Settings) -> dict[str, int]:
    """SDXL's added embeddings, of the pooled text and of six numbers."""
    if settings.choice('addition_embed_type', None, None, 'text_time') is None:
        for name in ('addition_time_embed_dim', 'projection_class_embeddings_input_dim'):
            settings.value(name, None)
        return {}
    frequencies = settings.integer('addition_time_embed_dim', None, least=2)
    size = settings.integer('projection_class_embeddings_input_dim', None)
    if size <= NUM_SIZES * frequencies or size == REFINER or frequencies % 2:
        right = f'the features of the pooled text and {NUM_SIZES} times addition_time_embed_dim={frequencies}, even'
        raise settings.wrong('projection_class_embeddings_input_dim', f"{right}; the refiner's five numbers are not")
    return {'pooled_size': size - NUM_SIZES * frequencies, 'size_frequencies': frequencies}


def to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    options = settings_of(options)
    widths, levels = widths_of(options), attention_levels(options)
    _check_exportable(options)
    depth, pooled, frequencies = (options[name] for name in ('transformer_depth', 'pooled_size', 'size_frequencies'))
    added = {'addition_embed_type': None, 'addition_time_embed_dim': None}
    if pooled:
        added = {'addition_embed_type': 'text_time', 'addition_time_embed_dim': frequencies}
        added['projection_class_embeddings_input_dim'] = pooled + NUM_SIZES * frequencies
    return (
        shared_config(options)
        | FIXED
        | added
        | {
            '_class_name': 'UNet2DConditionModel',
            'time_embedding_type': 'positional',
            'down_block_types': [DOWN[level in levels] for level in range(len(widths))],
            'mid_block_type': MIDDLE,
            'up_block_types': [UP[level in levels] for level in reversed(range(len(widths)))],
            'mid_block_scale_factor': 1,
            'cross_attention_dim': options['text_size'],
            'transformer_layers_per_block': depth if isinstance(depth, int) else list(depth),
            'attention_head_dim': _num_heads(options, widths),
            'use_linear_projection': options['projection'] == 'linear',
            'class_embed_type': None,
            'upcast_attention': False,
        }
    )


def _num_heads(options: Mapping[str, Any], widths: Sequence[int]) -> list[int]:
    if options['head_dim']:
        return [max(1, width // options['head_dim']) for width in widths]
    heads = options['num_heads']
    return [heads] * len(widths) if isinstance(heads, int) else list(heads)


def _check_exportable(options: Mapping[str, Any]) -> None:
    wrong = [
        given
        for given, refused in (
            (f'text_size={options["text_size"]}', options['text_size'] == 0),
            (f'num_classes={options["num_classes"]} in the place of text', options['num_classes'] > 0),
            (f'resampling={options["resampling"]!r}', options['resampling'] != 'conv'),
            (f'middle_attention={options["middle_attention"]!r}', options['middle_attention'] != 'normalised'),
        )
        if refused
    ]
    if wrong:
        raise WeightsError(f"diffusers' UNet2DConditionModel has no equal of a U-Net with {', '.join(wrong)}")


def table(options: Mapping[str, Any]) -> list[Leaf]:
    options = settings_of(options)
    _check_exportable(options)
    rows = frame(options)
    if options['pooled_size']:
        rows += dense('condition/added/in', 'add_embedding.linear_1')
        rows += dense('condition/added/out', 'add_embedding.linear_2')
    for layer in layers(options):
        if layer.kind == 'attention':
            rows += transformer(layer, options)
    return rows


def transformer(layer: Layer, options: Mapping[str, Any]) -> list[Leaf]:
    layout = LINEAR if options['projection'] == 'linear' else CONV
    rows = norm(f'{layer.ours}/norm', f'{layer.theirs}.norm')
    for end in ('in', 'out'):
        rows += dense(f'{layer.ours}/project_{end}', f'{layer.theirs}.proj_{end}', layout=layout)
    depth = options['transformer_depth']
    for i in range(depth if isinstance(depth, int) else depth[layer.level]):
        ours, theirs = f'{layer.ours}/blocks_{i}', f'{layer.theirs}.transformer_blocks.{i}'
        for place in (1, 2, 3):
            rows += norm(f'{ours}/norm_{place}', f'{theirs}.norm{place}')
        rows += dense(f'{ours}/self_attention/qkv', *(f'{theirs}.attn1.to_{name}' for name in 'qkv'), bias=False)
        rows += dense(f'{ours}/self_attention/out', f'{theirs}.attn1.to_out.0')
        rows += dense(f'{ours}/cross_attention/q', f'{theirs}.attn2.to_q', bias=False)
        rows += dense(f'{ours}/cross_attention/kv', *(f'{theirs}.attn2.to_{name}' for name in 'kv'), bias=False)
        rows += dense(f'{ours}/cross_attention/out', f'{theirs}.attn2.to_out.0')
        rows += dense(f'{ours}/mlp_in', f'{theirs}.ff.net.0.proj')
        rows += dense(f'{ours}/mlp_out', f'{theirs}.ff.net.2')
    return rows


def inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    cond = {'text': array(1, 77, options['text_size'])}
    if pooled := options.get('pooled_size'):
        cond |= {'pooled': array(1, pooled), 'size': array(1, NUM_SIZES)}
    return array(1, *options[INPUT]['shape']), array(1), cond


ARCHITECTURE = Architecture('UNet2DConditionModel', 'UNet', to_options, to_config, table, inputs)
