"""diffusers' UNet2DModel: the U-Nets of DDPM and ADM, without text.

Levels may have attention or none, and resample by convolutions (`DownBlock2D`) or by residual blocks
(`ResnetDownsampleBlock2D`), all in the same way; up and down are mirror images. A table of `num_class_embeds` rows has
none for the null label, as far as the config says.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.weights.architecture import INPUT, Architecture, WeightsError
from diffjax.weights.rules import Leaf, dense, embed, norm
from diffjax.weights.settings import Settings
from diffjax.weights.unet_layers import (
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

DOWN = {'DownBlock2D': 'conv', 'ResnetDownsampleBlock2D': 'resnet', 'AttnDownBlock2D': None}
UP = {'UpBlock2D': 'conv', 'ResnetUpsampleBlock2D': 'resnet', 'AttnUpBlock2D': None}


def to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings('UNet2DModel', config)
    widths = widths_in(settings, (224, 448, 672, 896))
    levels, resampling = _levels(settings, len(widths))
    options = shared_options(settings, widths, channels=3)
    settings.choice('mid_block_type', 'UNetMidBlock2D', 'UNetMidBlock2D')
    middle = 'normalised' if settings.choice('add_attention', True, True, False) else 'none'
    groups = settings.choice('attn_norm_num_groups', None, None, options['num_groups'])
    if groups is None and options['time_conditioning'] == 'scale_shift' and middle == 'normalised':
        middle = 'plain'  # their middle attention has a norm by default only where conditioning is additive
    classes = settings.value('num_class_embeds', None)
    options |= {
        'attention_levels': levels,
        'middle_attention': middle,
        'resampling': resampling,
        'num_classes': 0 if classes is None else settings.integer('num_class_embeds', None),
        'null_label': False,
    }
    head_dim = settings.value('attention_head_dim', 8)
    options['head_dim'] = 0 if head_dim is None else settings.integer('attention_head_dim', 8)
    options['num_heads'] = 1
    attended = [widths[i] for i in {*levels, *([len(widths) - 1] if middle != 'none' else [])}]
    if head_dim is not None and any(width % head_dim for width in attended):
        raise settings.wrong('attention_head_dim', f'null or a divisor of the channels with attention, {attended}')
    settings.done('num_train_timesteps')  # for learned embeddings of time, which are refused above
    return options


def _levels(settings: Settings, num_levels: int) -> tuple[list[int], str]:
    """The levels with attention, and how all levels resample."""
    sides, ways = [], set()
    for field, types, kind in (('down_block_types', DOWN, 'downsample_type'), ('up_block_types', UP, 'upsample_type')):
        default = ['DownBlock2D', *3 * ['AttnDownBlock2D']] if types is DOWN else [*3 * ['AttnUpBlock2D'], 'UpBlock2D']
        names = kinds(settings, field, default, tuple(types), num_levels)
        way = settings.choice(kind, 'conv', 'conv', 'resnet')
        ways |= {types[name] or way for name in names[:-1]}  # the last of them does not resample
        names = names if types is DOWN else names[::-1]
        sides.append([level for level, name in enumerate(names) if types[name] is None])
    if sides[0] != sides[1]:
        raise settings.wrong('up_block_types', f'attention at the levels that have it on the way down, {sides[0]}')
    if len(ways) > 1:
        raise settings.wrong('down_block_types', 'all levels, up and down, resample by "conv" or all by "resnet"')
    return sides[0], ways.pop() if ways else 'conv'


def to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    options = settings_of(options)
    widths, levels = widths_of(options), attention_levels(options)
    if options['resampling'] == 'pool' or options['text_size']:
        given = 'resampling="pool"' if options['resampling'] == 'pool' else f'text_size={options["text_size"]}'
        raise WeightsError(f"diffusers' UNet2DModel has no equal of a U-Net with {given}")
    plain_down, plain_up = [
        next(name for name, way in types.items() if way == options['resampling']) for types in (DOWN, UP)
    ]
    down = ['AttnDownBlock2D' if level in levels else plain_down for level in range(len(widths))]
    up = ['AttnUpBlock2D' if level in levels else plain_up for level in range(len(widths))][::-1]
    config = shared_config(options)
    classes = options['num_classes'] + (1 if options['null_label'] else 0)
    return config | {
        '_class_name': 'UNet2DModel',
        'time_embedding_type': 'positional',
        'down_block_types': down,
        'mid_block_type': 'UNetMidBlock2D',
        'up_block_types': up,
        'mid_block_scale_factor': 1,
        'downsample_type': options['resampling'],
        'upsample_type': options['resampling'],
        'attention_head_dim': _head_dim(options),
        'attn_norm_num_groups': None if options['middle_attention'] == 'plain' else config['norm_num_groups'],
        'add_attention': options['middle_attention'] != 'none',
        'class_embed_type': None,
        'num_class_embeds': classes if options['num_classes'] else None,
    }


def _head_dim(options: Mapping[str, Any]) -> int | None:
    """Theirs: channels of each head, the same at all levels; None: one head."""
    if options['head_dim']:
        return options['head_dim']
    heads, sizes = options['num_heads'], set()
    for layer in layers(options):
        if layer.kind == 'attention':
            count = heads if isinstance(heads, int) else heads[layer.level]
            sizes.add(None if count == 1 else layer.width // count)
    if len(sizes) > 1:
        raise WeightsError(
            f"diffusers' UNet2DModel has heads of one size, or one head at all levels; num_heads={heads} is neither"
        )
    return sizes.pop() if sizes else None


def table(options: Mapping[str, Any]) -> list[Leaf]:
    options = settings_of(options)
    rows = frame(options)
    if options['num_classes']:
        rows += embed('condition/label/table', 'class_embedding')
    for layer in layers(options):
        if layer.kind == 'attention':
            ours, theirs = layer.ours, layer.theirs
            if layer.ours != 'middle_attention' or options['middle_attention'] == 'normalised':
                rows += norm(f'{ours}/norm', f'{theirs}.group_norm')
            rows += dense(f'{ours}/attention/qkv', *(f'{theirs}.to_{name}' for name in 'qkv'))
            rows += dense(f'{ours}/attention/out', f'{theirs}.to_out.0')
    return rows


def inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    t, labels = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (np.float32, np.int32))
    x = jax.ShapeDtypeStruct((1, *options[INPUT]['shape']), np.float32)
    return x, t, labels if options['num_classes'] else None


ARCHITECTURE = Architecture('UNet2DModel', 'UNet', to_options, to_config, table, inputs)
