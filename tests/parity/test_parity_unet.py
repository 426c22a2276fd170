"""U-Nets beside diffusers' UNet2DModel and UNet2DConditionModel: outputs, round trips, full-size names and shapes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='parity with PyTorch needs the extra `parity`')
pytest.importorskip('diffusers', reason='parity with diffusers needs the extra `parity`')

from networks import check_published_shapes, nchw, network_case, nhwc, tensor  # noqa: E402

from diffjax.weights import unet, unet_text  # noqa: E402

pytestmark = pytest.mark.usefixtures('fast_compilation')
TINY = {'sample_size': 8, 'block_out_channels': [8, 16], 'layers_per_block': 1, 'norm_num_groups': 4}
PIXELS = {
    'ddpm': {
        'sample_size': 8,
        'block_out_channels': [8, 16, 16],
        'layers_per_block': 1,
        'norm_num_groups': 4,
        'norm_eps': 1e-6,
        'down_block_types': ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'],
        'up_block_types': ['UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
        'attention_head_dim': None,
        'downsample_padding': 0,
        'flip_sin_to_cos': False,
        'freq_shift': 1,
    },
    'adm': TINY
    | {
        'layers_per_block': 2,
        'out_channels': 6,
        'down_block_types': ['ResnetDownsampleBlock2D', 'AttnDownBlock2D'],
        'up_block_types': ['AttnUpBlock2D', 'ResnetUpsampleBlock2D'],
        'downsample_type': 'resnet',
        'upsample_type': 'resnet',
        'resnet_time_scale_shift': 'scale_shift',
        'attention_head_dim': 8,
        'attn_norm_num_groups': 4,
        'num_class_embeds': 5,
    },
    'attention everywhere, without a norm in the middle': TINY
    | {
        'sample_size': [8, 4],
        'block_out_channels': [8, 12],
        'in_channels': 1,
        'down_block_types': ['AttnDownBlock2D', 'AttnDownBlock2D'],
        'up_block_types': ['AttnUpBlock2D', 'AttnUpBlock2D'],
        'resnet_time_scale_shift': 'scale_shift',
        'attention_head_dim': 4,
        'flip_sin_to_cos': False,
    },
    'no attention in the middle': TINY
    | {
        'down_block_types': ['DownBlock2D', 'DownBlock2D'],
        'up_block_types': ['UpBlock2D', 'UpBlock2D'],
        'add_attention': False,
        'freq_shift': 1,
    },
}
WITH_TEXT = {
    'down_block_types': ['CrossAttnDownBlock2D', 'DownBlock2D'],
    'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D'],
    'cross_attention_dim': 12,
}
TEXT = {
    'sd15': TINY | WITH_TEXT | {'attention_head_dim': 4},
    'sd21': TINY | WITH_TEXT | {'attention_head_dim': [1, 2], 'use_linear_projection': True, 'upcast_attention': True},
    'sdxl': TINY
    | {
        'block_out_channels': [8, 8, 16],
        'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
        'up_block_types': ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
        'cross_attention_dim': 12,
        'attention_head_dim': [1, 2, 4],
        'transformer_layers_per_block': [1, 1, 2],
        'use_linear_projection': True,
        'addition_embed_type': 'text_time',
        'addition_time_embed_dim': 4,
        'projection_class_embeddings_input_dim': 10 + 6 * 4,
    },
}


@functools.cache
def _case(name):
    if name in PIXELS:
        return network_case(unet.ARCHITECTURE, 'UNet2DModel', PIXELS[name])
    return network_case(unet_text.ARCHITECTURE, 'UNet2DConditionModel', TEXT[name])


def _inputs(case, batch=3):
    rng = np.random.default_rng(0)
    shape = (batch, *case.options['input']['shape'])
    return rng, rng.standard_normal(shape).astype(np.float32), np.array([0.0, 371.5, 999.0], np.float32)


@pytest.mark.parametrize('name', PIXELS)
def test_without_text_it_is_theirs(name):
    case = _case(name)
    _, x, t = _inputs(case)
    labels = np.array([4, 0, 2]) if case.options['num_classes'] else None

    def theirs(model):
        return nhwc(model(nchw(x), tensor(t), *([] if labels is None else [tensor(labels)])).sample)

    given = None if labels is None else jnp.asarray(labels, jnp.int32)
    assert case.error((x, t, given), theirs) < 1e-5
    case.check_round_trip()


@pytest.mark.parametrize(
    ('name', 'masked'), [('sd15', False), ('sd15', True), ('sd21', True), ('sdxl', False), ('sdxl', True)]
)
def test_with_text_it_is_theirs(name, masked):
    case = _case(name)
    rng, x, t = _inputs(case)
    cond = {'text': rng.standard_normal((3, 5, 12)).astype(np.float32)}
    added = None
    if case.options.get('pooled_size'):
        cond['pooled'] = rng.standard_normal((3, 10)).astype(np.float32)
        cond['size'] = rng.integers(0, 1024, (3, 6)).astype(np.float32)
        added = {'text_embeds': tensor(cond['pooled']), 'time_ids': tensor(cond['size'])}
    mask = np.arange(5) < np.array([[5], [3], [1]])

    def theirs(model):
        told = {'encoder_attention_mask': tensor(mask)} if masked else {}
        text = tensor(cond['text'])
        return nhwc(model(nchw(x), tensor(t), text, added_cond_kwargs=added, **told).sample)

    assert case.error((x, t, cond | ({'text_mask': mask} if masked else {})), theirs) < 1e-5
    case.check_round_trip()


@pytest.mark.parametrize('name', ['ddpm', 'adm', 'sd15', 'sdxl'])
def test_their_library_loads_the_export(name, tmp_path):
    case = _case(name)
    case.check_export_loads(tmp_path)
    config = case.architecture.to_config(case.options)
    assert case.architecture.to_options(config) == case.options


PUBLISHED_PIXELS = {
    'google/ddpm-cifar10-32': {
        'sample_size': 32,
        'block_out_channels': [128, 256, 256, 256],
        'down_block_types': ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'],
        'up_block_types': ['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
    },
    'google/ddpm-celebahq-256': {
        'sample_size': 256,
        'block_out_channels': [128, 128, 256, 256, 512, 512],
        'down_block_types': [*4 * ['DownBlock2D'], 'AttnDownBlock2D', 'DownBlock2D'],
        'up_block_types': ['UpBlock2D', 'AttnUpBlock2D', *4 * ['UpBlock2D']],
    },
}
DDPM = {
    'act_fn': 'silu',
    'attention_head_dim': None,
    'center_input_sample': False,
    'downsample_padding': 0,
    'flip_sin_to_cos': False,
    'freq_shift': 1,
    'in_channels': 3,
    'layers_per_block': 2,
    'mid_block_scale_factor': 1,
    'norm_eps': 1e-6,
    'norm_num_groups': 32,
    'out_channels': 3,
    'time_embedding_type': 'positional',
}
STABLE = {
    'act_fn': 'silu',
    'block_out_channels': [320, 640, 1280, 1280],
    'center_input_sample': False,
    'down_block_types': [*3 * ['CrossAttnDownBlock2D'], 'DownBlock2D'],
    'downsample_padding': 1,
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'in_channels': 4,
    'layers_per_block': 2,
    'mid_block_scale_factor': 1,
    'norm_eps': 1e-5,
    'norm_num_groups': 32,
    'out_channels': 4,
    'up_block_types': ['UpBlock2D', *3 * ['CrossAttnUpBlock2D']],
}
LINEAR = {'use_linear_projection': True, 'dual_cross_attention': False, 'only_cross_attention': False}
PUBLISHED_TEXT = {
    'SD 1.5': STABLE | {'sample_size': 64, 'attention_head_dim': 8, 'cross_attention_dim': 768},
    'SD 2.1': STABLE
    | LINEAR
    | {
        'sample_size': 96,
        'attention_head_dim': [5, 10, 20, 20],
        'cross_attention_dim': 1024,
        'num_class_embeds': None,
        'upcast_attention': True,
    },
    'SDXL': STABLE
    | LINEAR
    | {
        'sample_size': 128,
        'addition_embed_type': 'text_time',
        'addition_embed_type_num_heads': 64,
        'addition_time_embed_dim': 256,
        'attention_head_dim': [5, 10, 20],
        'block_out_channels': [320, 640, 1280],
        'class_embed_type': None,
        'class_embeddings_concat': False,
        'conv_in_kernel': 3,
        'conv_out_kernel': 3,
        'cross_attention_dim': 2048,
        'cross_attention_norm': None,
        'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
        'encoder_hid_dim': None,
        'encoder_hid_dim_type': None,
        'mid_block_only_cross_attention': None,
        'mid_block_type': 'UNetMidBlock2DCrossAttn',
        'num_attention_heads': None,
        'num_class_embeds': None,
        'projection_class_embeddings_input_dim': 2816,
        'resnet_out_scale_factor': 1.0,
        'resnet_skip_time_act': False,
        'resnet_time_scale_shift': 'default',
        'time_cond_proj_dim': None,
        'time_embedding_act_fn': None,
        'time_embedding_dim': None,
        'time_embedding_type': 'positional',
        'timestep_post_act': None,
        'transformer_layers_per_block': [1, 2, 10],
        'up_block_types': ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
        'upcast_attention': None,
    },
}


@pytest.mark.parametrize('name', [*PUBLISHED_PIXELS, *PUBLISHED_TEXT])
def test_names_and_shapes_are_the_published_ones(name):
    if name in PUBLISHED_PIXELS:
        check_published_shapes(unet.ARCHITECTURE, 'UNet2DModel', DDPM | PUBLISHED_PIXELS[name])
    else:
        check_published_shapes(unet_text.ARCHITECTURE, 'UNet2DConditionModel', PUBLISHED_TEXT[name])
