"""U-Nets of diffusers: which settings are read as what, which are refused by name, and what cannot be exported."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.nets import UNet
from diffjax.weights import WeightsError, unet, unet_text
from diffjax.weights.engine import build_network, expected_shapes, import_tensors
from diffjax.weights.sources import open_source
from diffjax.weights.unet_layers import settings_of

PIXELS = {
    'sample_size': 8,
    'block_out_channels': [8, 16],
    'layers_per_block': 1,
    'norm_num_groups': 4,
    'down_block_types': ['DownBlock2D', 'AttnDownBlock2D'],
    'up_block_types': ['AttnUpBlock2D', 'UpBlock2D'],
}
TEXT = PIXELS | {
    'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D'],
    'up_block_types': ['CrossAttnUpBlock2D', 'UpBlock2D'],
    'cross_attention_dim': 6,
}
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    16,
    2**63,
    0.5,
    1e-5,
    float('nan'),
    '',
    'a',
    [],
    [1],
    [-1, 2],
    [2, 4],
    {},
    {'a': 1},
)
VALUES += (['a', 'b'], [[1], [2]], 'DownBlock2D', [None, None], ['DownBlock2D', 'DownBlock2D'], [2**63, 2**63])
ADDED = {'addition_embed_type': 'text_time', 'addition_time_embed_dim': 256}


@pytest.mark.parametrize(
    ('change', 'option', 'value'),
    [
        ({}, 'attention_levels', [1]),
        ({}, 'sinusoids', 'cos_sin'),
        ({'flip_sin_to_cos': False, 'freq_shift': 1}, 'sinusoids', 'sin_cos_to_end'),
        ({'downsample_padding': 0}, 'downsample_zeros', 'end'),
        ({'resnet_time_scale_shift': 'scale_shift'}, 'middle_attention', 'plain'),
        ({'resnet_time_scale_shift': 'scale_shift', 'attn_norm_num_groups': 4}, 'middle_attention', 'normalised'),
        ({'add_attention': False}, 'middle_attention', 'none'),
        ({'block_out_channels': [8, 12]}, 'channel_multipliers', [1, 1.5]),
        ({'num_class_embeds': 7}, 'num_classes', 7),
        ({'sample_size': None}, 'input', {'shape': [16, 16, 3]}),
        ({'attention_head_dim': None}, 'head_dim', 0),
    ],
)
def test_settings_without_text_become_options(change, option, value):
    options = unet.to_options(PIXELS | {'attention_head_dim': 4} | change)
    assert options[option] == value
    assert unet.to_options(unet.to_config(options)) == options


@pytest.mark.parametrize(
    ('change', 'option', 'value'),
    [
        ({}, 'num_heads', [8, 8]),
        ({'attention_head_dim': [1, 2]}, 'num_heads', [1, 2]),
        ({'use_linear_projection': True}, 'projection', 'linear'),
        ({}, 'projection', 'conv'),
        ({'transformer_layers_per_block': [1, 3]}, 'transformer_depth', [1, 3]),
        (ADDED | {'projection_class_embeddings_input_dim': 2816}, 'pooled_size', 1280),
    ],
)
def test_settings_with_text_become_options(change, option, value):
    options = unet_text.to_options(TEXT | change)
    assert options[option] == value
    assert unet_text.to_options(unet_text.to_config(options)) == options


@pytest.mark.parametrize(
    ('architecture', 'change', 'message'),
    [
        (unet, {'act_fn': 'gelu'}, "UNet2DModel: act_fn is 'gelu'; covered: 'silu' or 'swish'"),
        (unet, {'time_embedding_type': 'fourier'}, 'time_embedding_type'),
        (unet, {'center_input_sample': True}, 'center_input_sample'),
        (unet, {'mid_block_scale_factor': 1.4}, 'mid_block_scale_factor'),
        (unet, {'class_embed_type': 'timestep'}, 'class_embed_type'),
        (unet, {'mid_block_type': None}, 'mid_block_type'),
        (unet, {'attn_norm_num_groups': 2}, 'attn_norm_num_groups'),
        (unet, {'attention_head_dim': 3}, 'attention_head_dim is 3; .*divisor'),
        (unet, {'norm_num_groups': 3}, 'norm_num_groups is 3; .*divisor'),
        (unet, {'sample_size': 7}, 'sample_size is 7; .*multiple of 2'),
        (unet, {'down_block_types': ['SkipDownBlock2D', 'AttnDownBlock2D']}, 'down_block_types'),
        (unet, {'down_block_types': ['AttnDownBlock2D', 'AttnDownBlock2D']}, r'up_block_types .*way down, \[0, 1\]'),
        (unet, {'down_block_types': ['ResnetDownsampleBlock2D', 'AttnDownBlock2D']}, 'down_block_types .*all by'),
        (unet, {'fourier_scale': 16}, "settings that are not covered: 'fourier_scale'"),
        (unet_text, {'attention_head_dim': [4]}, 'attention_head_dim'),
        (unet_text, {'attention_head_dim': [4, 3]}, 'attention_head_dim .*divide the channels'),
        (unet_text, {'transformer_layers_per_block': [[1], [2]]}, 'transformer_layers_per_block'),
        (unet_text, {'only_cross_attention': True}, 'only_cross_attention'),
        (unet_text, {'encoder_hid_dim': 12}, 'encoder_hid_dim'),
        (unet_text, {'num_class_embeds': 1000}, 'num_class_embeds'),
        (unet_text, {'time_cond_proj_dim': 256}, 'time_cond_proj_dim'),
        (unet_text, {'addition_embed_type': 'image'}, 'addition_embed_type'),
        (unet_text, ADDED | {'projection_class_embeddings_input_dim': 2560}, "2560; .*the refiner's five"),
        (unet_text, {'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn'}, 'mid_block_type'),
        (unet_text, {'down_block_types': ['SimpleCrossAttnDownBlock2D', 'DownBlock2D']}, 'down_block_types'),
        (unet_text, {'cross_attention_dim': [6, 6]}, 'cross_attention_dim'),
    ],
)
def test_settings_that_are_not_covered_are_refused_by_name(architecture, change, message):
    base = PIXELS | {'attention_head_dim': 4} if architecture is unet else TEXT
    with pytest.raises(WeightsError, match=message):
        architecture.ARCHITECTURE.to_options(base | change)


@pytest.mark.parametrize('architecture', [unet.ARCHITECTURE, unet_text.ARCHITECTURE], ids=lambda a: a.class_name)
def test_any_value_of_any_setting_is_read_or_refused(architecture):
    base = PIXELS | {'attention_head_dim': 4} if architecture.class_name == 'UNet2DModel' else TEXT
    config = architecture.to_config(architecture.to_options(base))
    taken = 0
    for name in [name for name in config if not name.startswith('_')]:
        for value in VALUES:
            try:
                options = architecture.to_options(config | {name: value})
                build_network(architecture, options)
                architecture.table(options)
                taken += 1
            except WeightsError as error:
                assert str(error).startswith(architecture.class_name) and '\n' not in str(error)
    assert taken > 20


OURS = {'base_channels': 32, 'channel_multipliers': [1, 1], 'attention_resolutions': [4], 'num_classes': 3}
OURS |= {'out_channels': 1, 'input': {'shape': [8, 8, 1]}}


def test_a_network_of_our_own_can_be_exported():
    """Heights of attention become levels, the null label a row, and the groups that all normalisations share theirs."""
    config = unet.to_config(OURS | {'num_groups': 8})
    assert config['down_block_types'] == ['DownBlock2D', 'AttnDownBlock2D'] and config['num_class_embeds'] == 4
    assert config['attention_head_dim'] == 8 and config['norm_num_groups'] == 8
    theirs = expected_shapes(unet.ARCHITECTURE, unet.to_options(config))
    assert theirs == expected_shapes(unet.ARCHITECTURE, OURS | {'num_groups': 8})


@pytest.mark.parametrize(
    ('architecture', 'change', 'message'),
    [
        (unet, {}, r'have \[8, 16\] groups'),
        (unet, {'num_groups': 8, 'resampling': 'pool'}, 'resampling="pool"'),
        (unet, {'num_groups': 8, 'text_size': 6}, 'text_size=6'),
        (unet, {'num_groups': 8, 'num_heads': [1, 4], 'attention_levels': [0]}, r'num_heads=\[1, 4\] is neither'),
        (unet_text, {'text_size': 6}, 'num_classes=3 in the place of text'),
        (unet_text, {'num_classes': 0}, 'text_size=0'),
        (unet_text, {'num_classes': 0, 'text_size': 6, 'resampling': 'resnet'}, "resampling='resnet'"),
        (unet_text, {'num_classes': 0, 'text_size': 6, 'middle_attention': 'none'}, "middle_attention='none'"),
    ],
)
def test_what_has_no_equal_is_not_exported(architecture, change, message):
    with pytest.raises(WeightsError, match=message):
        architecture.ARCHITECTURE.to_config(OURS | change)


def test_defaults_are_the_networks():
    network = UNet(base_channels=32, num_classes=3, out_channels=1)
    whole = settings_of({'base_channels': 32, 'num_classes': 3, 'out_channels': 1})
    for name in ('channel_multipliers', 'num_res_blocks', 'attention_resolutions', 'num_heads', 'sinusoids', 'dropout'):
        assert whole[name] == getattr(network, name)


def test_the_names_that_diffusers_wrote_first_are_read(tmp_path):
    """google/ddpm-cifar10-32 names its attention query, key, value and proj_attn."""
    before = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    options = unet.to_options(PIXELS | {'attention_head_dim': None})
    shapes = expected_shapes(unet.ARCHITECTURE, options)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def old(name):
        layer = next((layer for layer in before if f'attentions.0.{layer}.' in name), None)
        return name.replace(f'.{layer}.', f'.{before[layer]}.') if layer else name

    assert len({old(name) for name in tensors} - set(tensors)) == 3 * 8  # of three attentions named 0
    save_file({old(name): a for name, a in tensors.items()}, tmp_path / 'diffusion_pytorch_model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(unet.to_config(options)))
    source = open_source(tmp_path)
    assert set(source.tensors) == set(source.specs) == set(tensors)
    for name, a in tensors.items():
        np.testing.assert_array_equal(source.tensors[name], a)
    both = {old(name): a for name, a in tensors.items()} | tensors
    save_file(both, tmp_path / 'diffusion_pytorch_model.safetensors')
    with pytest.raises(WeightsError, match='unexpected: .*query'):
        import_tensors(source.architecture, options, open_source(tmp_path).tensors)
