"""The autoencoders of latent diffusion: diffusers' AutoencoderKL (Stable Diffusion 1 to 3, SDXL, Flux) and VQModel.

Both lay their blocks out alike; what differs is the middle. A VQModel with attention in its lowest level (f16) is
covered, one with spatial normalisation (Kandinsky's) is not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffjax.weights.architecture import INPUT, Architecture, WeightsError
from diffjax.weights.rules import POINTWISE, Leaf, array, conv, dense, norm
from diffjax.weights.settings import Settings

DOWN = {'DownEncoderBlock2D': False, 'AttnDownEncoderBlock2D': True}  # does it attend?
UP = {'UpDecoderBlock2D': False, 'AttnUpDecoderBlock2D': True}


def inputs(options: Mapping[str, Any]) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct((1, *options[INPUT]['shape']), np.float32),)


def _common(settings: Settings) -> dict[str, Any]:
    """The options that both kinds have."""
    widths = settings.integers('block_out_channels', (64,))
    levels = _levels(settings, len(widths))
    channels, groups = settings.integer('in_channels', 3), settings.integer('norm_num_groups', 32)
    if wrong := [width for width in widths if width % groups]:
        raise settings.wrong('block_out_channels', f'multiples of norm_num_groups={groups}, unlike {wrong[0]}')
    settings.choice('out_channels', 3, channels)
    settings.choice('act_fn', 'silu', 'silu')
    base = int(np.gcd.reduce(widths))
    return {
        'out_channels': channels,
        'base_channels': base,
        'channel_multipliers': [width // base for width in widths],
        'num_res_blocks': settings.integer('layers_per_block', 1, most=64),
        'attention_levels': levels,
        'middle_attention': settings.choice('mid_block_add_attention', True, True, False),
        'num_groups': groups,
        'latent_scale': settings.number('scaling_factor', 0.18215),
        INPUT: {'shape': [2 ** (len(widths) - 1)] * 2 + [channels], 'sample_size': settings.value('sample_size', 32)},
    }


def _levels(settings: Settings, number: int) -> list[int]:
    """The levels that attend. The lists of blocks have to be as long as the levels and mirror each other."""
    down = settings.value('down_block_types', ('DownEncoderBlock2D',))
    up = settings.value('up_block_types', ('UpDecoderBlock2D',))
    for name, blocks, known in (('down_block_types', down, DOWN), ('up_block_types', up, UP)):
        if (
            not isinstance(blocks, list | tuple)
            or len(blocks) != number
            or not all(b in known for b in map(str, blocks))
        ):
            raise settings.wrong(name, f'{number} of {", ".join(known)}, as many as block_out_channels')
    attends = [DOWN[block] for block in down]
    if attends != [UP[block] for block in reversed(up)]:
        raise settings.wrong('up_block_types', 'attention at the levels where down_block_types has it')
    return [level for level in range(number) if attends[level]]


def _config(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in ('patch_size', 'frames'):
        if options.get(name, 1) != 1:
            raise WeightsError(f'diffusers has no such autoencoder: {name} is {options[name]}, and theirs have 1')
    attends = [level in options['attention_levels'] for level in range(len(options['channel_multipliers']))]
    down, up = ({has: name for name, has in blocks.items()} for blocks in (DOWN, UP))
    return {
        'act_fn': 'silu',
        'block_out_channels': [options['base_channels'] * m for m in options['channel_multipliers']],
        'down_block_types': [down[has] for has in attends],
        'up_block_types': [up[has] for has in reversed(attends)],
        'in_channels': options['out_channels'],
        'out_channels': options['out_channels'],
        'layers_per_block': options['num_res_blocks'],
        'latent_channels': options['latent_channels'],
        'mid_block_add_attention': options['middle_attention'],
        'norm_num_groups': options['num_groups'],
        'sample_size': options[INPUT]['sample_size'],
        'scaling_factor': options['latent_scale'],
    }


# AutoencoderKL --------------------------------------------------------------------------------------------------------


def kl_to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings('AutoencoderKL', config)
    before = settings.choice('use_quant_conv', True, True, False)
    settings.choice('use_post_quant_conv', True, before)
    for name in ('latents_mean', 'latents_std'):
        settings.choice(name, None, None)
    shift = settings.value('shift_factor', None)
    options = _common(settings) | {
        'bottleneck': 'kl',
        'latent_channels': settings.integer('latent_channels', 4),
        'pointwise': before,
        'latent_shift': 0.0 if shift is None else settings.number('shift_factor', 0.0),
    }
    settings.done('force_upcast')
    return options


def kl_to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    return _config(options) | {
        '_class_name': 'AutoencoderKL',
        'use_quant_conv': options['pointwise'],
        'use_post_quant_conv': options['pointwise'],
        'shift_factor': options['latent_shift'] or None,
        'force_upcast': True,
    }


# VQModel --------------------------------------------------------------------------------------------------------------


def vq_to_options(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = Settings('VQModel', config)
    latent_channels = settings.integer('latent_channels', 3)
    code_size = settings.value('vq_embed_dim', None)
    settings.choice('norm_type', 'group', 'group')
    options = _common(settings) | {
        'bottleneck': 'vq',
        'latent_channels': latent_channels,
        'pointwise': True,
        'codebook_size': settings.integer('num_vq_embeddings', 256, least=2),
        'code_size': latent_channels if code_size is None else settings.integer('vq_embed_dim', None),
    }
    settings.done('force_upcast', 'lookup_from_codebook')
    return options


def vq_to_config(options: Mapping[str, Any]) -> dict[str, Any]:
    return _config(options) | {
        '_class_name': 'VQModel',
        'num_vq_embeddings': options['codebook_size'],
        'vq_embed_dim': options['code_size'],
        'norm_type': 'group',
    }


# The table ------------------------------------------------------------------------------------------------------------


def residual(ours: str, theirs: str, *, skip: bool) -> list[Leaf]:
    rows = [
        *norm(f'{ours}/norm_in', f'{theirs}.norm1'),
        *conv(f'{ours}/conv_in', f'{theirs}.conv1'),
        *norm(f'{ours}/norm_out', f'{theirs}.norm2'),
        *conv(f'{ours}/conv_out', f'{theirs}.conv2'),
    ]
    return rows + (dense(f'{ours}/skip', f'{theirs}.conv_shortcut', layout=POINTWISE) if skip else [])


def attends(ours: str, theirs: str) -> list[Leaf]:
    return [
        *norm(f'{ours}/norm', f'{theirs}.group_norm'),
        *dense(f'{ours}/attention/qkv', *(f'{theirs}.to_{name}' for name in 'qkv')),
        *dense(f'{ours}/attention/out', f'{theirs}.to_out.0'),
    ]


def _ends(side: str, options: Mapping[str, Any]) -> list[Leaf]:
    """What encoder and decoder both have."""
    middle = f'{side}/middle', f'{side}.mid_block'
    rows = [
        *conv(f'{side}/conv_in', f'{side}.conv_in'),
        *residual(f'{middle[0]}/in', f'{middle[1]}.resnets.0', skip=False),
        *residual(f'{middle[0]}/out', f'{middle[1]}.resnets.1', skip=False),
        *norm(f'{side}/norm_out', f'{side}.conv_norm_out'),
        *conv(f'{side}/conv_out', f'{side}.conv_out'),
    ]
    if options['middle_attention']:
        rows += attends(f'{middle[0]}/attention', f'{middle[1]}.attentions.0')
    return rows


def table(options: Mapping[str, Any]) -> list[Leaf]:
    multipliers, blocks = options['channel_multipliers'], options['num_res_blocks']
    last = len(multipliers) - 1
    rows = [*_ends('encoder', options), *_ends('decoder', options)]
    for level, multiplier in enumerate(multipliers):
        sides = (  # side, ours, theirs, channels that come in, residual blocks, resampled after it, how
            ('encoder', 'down', level, multipliers[max(level - 1, 0)], blocks, level < last, 'downsamplers'),
            ('decoder', 'up', last - level, multipliers[min(level + 1, last)], blocks + 1, level > 0, 'upsamplers'),
        )
        for side, ours, place, before, number, resampled, how in sides:
            block = f'{side}.{ours}_blocks.{place}'
            for i in range(number):
                name = f'{side}/{ours}_{level}_{i}'
                rows += residual(name, f'{block}.resnets.{i}', skip=i == 0 and before != multiplier)
                if level in options['attention_levels']:
                    rows += attends(f'{name}_attention', f'{block}.attentions.{i}')
            if resampled:
                rows += conv(f'{side}/{ours}_{level}', f'{block}.{how}.0.conv')
    if options['pointwise']:
        rows += dense('to_code', 'quant_conv', layout=POINTWISE)
        rows += dense('from_code', 'post_quant_conv', layout=POINTWISE)
    if options['bottleneck'] == 'vq':
        rows += array('codebook', 'quantize.embedding.weight')
    return rows


KL = Architecture('AutoencoderKL', 'Autoencoder', kl_to_options, kl_to_config, table, inputs)
VQ = Architecture('VQModel', 'Autoencoder', vq_to_options, vq_to_config, table, inputs)
