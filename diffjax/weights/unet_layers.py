"""The layers of a U-Net by our names and by diffusers', in the order in which they run: what both tables share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diffjax.nets import UNet
from diffjax.nets.unet_blocks import num_groups
from diffjax.weights.architecture import INPUT, WeightsError
from diffjax.weights.rules import POINTWISE, Leaf, conv, dense, norm
from diffjax.weights.settings import Settings

DEFAULTS = {name: field.default for name, field in UNet.__dataclass_fields__.items()}

SINUSOIDS = {  # flip_sin_to_cos and freq_shift
    (True, 0): 'cos_sin',
    (False, 0): 'sin_cos',
    (True, 1): 'cos_sin_to_end',
    (False, 1): 'sin_cos_to_end',
}
MOST_LEVELS, MOST_PIXELS = 10, 2**14

ZEROS = {1: 'both', 0: 'end'}  # downsample_padding
CONDITIONING = {'default': 'additive', 'scale_shift': 'scale_shift'}  # resnet_time_scale_shift


class Layer(NamedTuple):
    """A layer: kind is 'residual', 'attention' or 'resample'; width in and out of it."""

    kind: str
    ours: str
    theirs: str
    level: int
    inputs: int
    width: int


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, with the network's own default for everything that is not named."""
    return DEFAULTS | dict(options)


def widths_of(options: Mapping[str, Any]) -> list[int]:
    """Channels of each level."""
    return [round(options['base_channels'] * multiplier) for multiplier in options['channel_multipliers']]


def attention_levels(options: Mapping[str, Any]) -> list[int]:
    """The levels with attention, also where the options name heights of an image instead."""
    height, levels = options[INPUT]['shape'][0], range(len(options['channel_multipliers']))
    return [i for i in levels if i in options['attention_levels'] or height >> i in options['attention_resolutions']]


def layers(options: Mapping[str, Any]) -> Iterator[Layer]:
    """Every residual block, attention and resampling of the network. options: as `settings_of` gives them."""
    widths, blocks, attention = widths_of(options), options['num_res_blocks'], attention_levels(options)
    last, kept, h = len(widths) - 1, [widths[0]], widths[0]
    for level, width in enumerate(widths):
        if level > 0:
            yield Layer('resample', f'down_{level}', f'down_blocks.{level - 1}.downsamplers.0', level, h, h)
            kept.append(h)
        for i in range(blocks):
            ours, theirs = f'down_{level}_{i}', f'down_blocks.{level}'
            yield Layer('residual', ours, f'{theirs}.resnets.{i}', level, h, width)
            if level in attention:
                yield Layer('attention', f'{ours}_attention', f'{theirs}.attentions.{i}', level, width, width)
            h = width
            kept.append(h)
    yield Layer('residual', 'middle_in', 'mid_block.resnets.0', last, h, h)
    if options['middle_attention'] != 'none':
        yield Layer('attention', 'middle_attention', 'mid_block.attentions.0', last, h, h)
    yield Layer('residual', 'middle_out', 'mid_block.resnets.1', last, h, h)
    for level in reversed(range(len(widths))):
        theirs, width = f'up_blocks.{last - level}', widths[level]
        for i in range(blocks + 1):
            ours = f'up_{level}_{i}'
            yield Layer('residual', ours, f'{theirs}.resnets.{i}', level, h + kept.pop(), width)
            if level in attention:
                yield Layer('attention', f'{ours}_attention', f'{theirs}.attentions.{i}', level, width, width)
            h = width
        if level > 0:
            yield Layer('resample', f'up_{level}', f'{theirs}.upsamplers.0', level, h, h)


def frame(options: Mapping[str, Any]) -> list[Leaf]:
    """Rows of everything but attention."""
    rows = [
        *conv('conv_in', 'conv_in'),
        *dense('condition/time/in', 'time_embedding.linear_1'),
        *dense('condition/time/out', 'time_embedding.linear_2'),
        *norm('norm_out', 'conv_norm_out'),
        *conv('conv_out', 'conv_out'),
    ]
    for layer in layers(options):
        if layer.kind == 'residual' or (layer.kind == 'resample' and options['resampling'] == 'resnet'):
            rows += residual(layer)
        elif layer.kind == 'resample':
            rows += conv(layer.ours, f'{layer.theirs}.conv')
    return rows


def residual(layer: Layer) -> list[Leaf]:
    ours, theirs = layer.ours, layer.theirs
    rows = [
        *norm(f'{ours}/norm_in', f'{theirs}.norm1'),
        *conv(f'{ours}/conv_in', f'{theirs}.conv1'),
        *dense(f'{ours}/modulation', f'{theirs}.time_emb_proj'),
        *norm(f'{ours}/norm_out', f'{theirs}.norm2'),
        *conv(f'{ours}/conv_out', f'{theirs}.conv2'),
    ]
    if layer.inputs != layer.width:
        rows += dense(f'{ours}/skip', f'{theirs}.conv_shortcut', layout=POINTWISE)
    return rows


# Settings that both classes have --------------------------------------------------------------------------------------


def shared_options(settings: Settings, widths: Sequence[int], *, channels: int) -> dict[str, Any]:
    """What both classes say alike, as options; channels: theirs by default, in and out."""
    for name, default, *valid in (
        ('center_input_sample', False, False),
        ('time_embedding_type', 'positional', 'positional'),
        ('time_embedding_dim', None, None, 4 * widths[0]),
        ('act_fn', 'silu', 'silu', 'swish'),
        ('mid_block_scale_factor', 1, 1, 1.0),
        ('class_embed_type', None, None),
    ):
        settings.choice(name, default, *valid)
    groups = settings.integer('norm_num_groups', 32)
    if any(width % groups for width in widths):
        raise settings.wrong('norm_num_groups', f'a divisor of all of block_out_channels, {list(widths)}')
    flip, shift = settings.choice('flip_sin_to_cos', True, True, False), settings.choice('freq_shift', 0, 0, 1)
    return {
        'base_channels': widths[0],
        'channel_multipliers': [w / widths[0] if w % widths[0] else w // widths[0] for w in widths],
        'num_res_blocks': settings.integer('layers_per_block', 2, most=64),
        'attention_resolutions': [],
        'time_conditioning': CONDITIONING[settings.choice('resnet_time_scale_shift', 'default', *CONDITIONING)],
        'downsample_zeros': ZEROS[settings.choice('downsample_padding', 1, *ZEROS)],
        'sinusoids': SINUSOIDS[flip, shift],
        'num_groups': groups,
        'norm_epsilon': settings.number('norm_eps', 1e-5),
        'dropout': settings.number('dropout', 0.0),
        'out_channels': settings.integer('out_channels', channels),
        INPUT: {'shape': input_shape(settings, len(widths), channels)},
    }


def shared_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same, from options to their config."""
    flip, shift = _theirs(SINUSOIDS, options['sinusoids'])
    height, width, channels = options[INPUT]['shape']
    return {
        'sample_size': height if height == width else [height, width],
        'in_channels': channels,
        'out_channels': options['out_channels'],
        'center_input_sample': False,
        'flip_sin_to_cos': flip,
        'freq_shift': shift,
        'block_out_channels': widths_of(options),
        'layers_per_block': options['num_res_blocks'],
        'downsample_padding': _theirs(ZEROS, options['downsample_zeros']),
        'dropout': options['dropout'],
        'act_fn': 'silu',
        'norm_num_groups': common_groups(options),
        'norm_eps': options['norm_epsilon'],
        'resnet_time_scale_shift': {ours: theirs for theirs, ours in CONDITIONING.items()}[
            options['time_conditioning']
        ],
    }


def _theirs(names: Mapping[Any, str], ours: str) -> Any:
    return next(theirs for theirs, name in names.items() if name == ours)


def common_groups(options: Mapping[str, Any]) -> int:
    """The one number of groups of all normalisations, as theirs has it."""
    if options['num_groups']:
        return options['num_groups']
    channels = {channels for layer in layers(options) for channels in (layer.inputs, layer.width)}
    groups = {num_groups(count) for count in channels | {widths_of(options)[0]}}
    if len(groups) > 1:
        raise WeightsError(
            f'the normalisations of this network have {sorted(groups)} groups, by their channels; '
            f'diffusers has one number for all: only networks with num_groups set can be exported'
        )
    return groups.pop()


def widths_in(settings: Settings, default: Sequence[int]) -> tuple[int, ...]:
    """block_out_channels: one width for each level."""
    widths = settings.integers('block_out_channels', default)
    if len(widths) > MOST_LEVELS:
        raise settings.wrong('block_out_channels', f'at most {MOST_LEVELS} levels')
    return widths


def kinds(settings: Settings, name: str, default: Sequence[str], valid: Sequence[str], levels: int) -> list[str]:
    """down_block_types and up_block_types: the kind of each level."""
    names = settings.value(name, default)
    if (
        not isinstance(names, list | tuple)
        or len(names) != levels
        or any(kind not in valid for kind in map(str, names))
    ):
        raise settings.wrong(name, f'{levels} of {", ".join(valid)}')
    return list(names)


def input_shape(settings: Settings, levels: int, in_channels: int) -> list[int]:
    """[H, W, C] of x. A config need not say the size; the parameters do not depend on it."""
    least = 2 ** (levels - 1)
    size = settings.value('sample_size', None)
    sides = [8 * least, 8 * least] if size is None else size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= MOST_PIXELS or side % least for side in sides):
        raise settings.wrong('sample_size', f'null, or a multiple of {least}, which {levels} levels need')
    return [*sides, settings.integer('in_channels', in_channels)]
