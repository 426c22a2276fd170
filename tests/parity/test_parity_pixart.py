"""PixArt against diffusers' PixArtTransformer2DModel: outputs, names and shapes, and the way back."""

import numpy as np
import pytest

pytest.importorskip('diffusers', reason='parity with diffusers needs the extra [parity]')

from networks import check_published_shapes, nchw, network_case, nhwc, tensor  # noqa: E402

from diffjax.weights.architecture import WeightsError  # noqa: E402
from diffjax.weights.pixart import ARCHITECTURE  # noqa: E402

NAME = 'PixArtTransformer2DModel'
TINY = {
    'num_attention_heads': 2,
    'attention_head_dim': 12,
    'cross_attention_dim': 24,
    'caption_channels': 10,
    'num_layers': 2,
    'sample_size': 8,
}
SIZED = {**TINY, 'sample_size': 16, 'interpolation_scale': 2, 'use_additional_conditions': True, 'out_channels': 4}
XL_2_512 = {  # transformer/config.json of PixArt-alpha/PixArt-XL-2-512x512
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': 72,
    'attention_type': 'default',
    'caption_channels': 4096,
    'cross_attention_dim': 1152,
    'double_self_attention': False,
    'dropout': 0.0,
    'in_channels': 4,
    'norm_elementwise_affine': False,
    'norm_eps': 1e-06,
    'norm_num_groups': 32,
    'norm_type': 'ada_norm_single',
    'num_attention_heads': 16,
    'num_embeds_ada_norm': 1000,
    'num_layers': 28,
    'num_vector_embeds': None,
    'only_cross_attention': False,
    'out_channels': 8,
    'patch_size': 2,
    'sample_size': 64,
    'upcast_attention': False,
    'use_linear_projection': False,
}


def batch(height, width, *, sized=False, masked=False):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, height, width, 4)).astype(np.float32)
    cond = {'text': rng.standard_normal((3, 7, 10)).astype(np.float32)}
    if masked:
        cond['text_mask'] = np.arange(7) < np.array([[7], [3], [1]])
    if sized:
        cond['resolution'] = np.array([[1024, 1024], [512, 768], [1408, 704]], np.float32)
        cond['aspect_ratio'] = np.array([[1.0], [0.667], [2.0]], np.float32)
    return x, np.array([0.0, 17.0, 999.0], np.float32), cond


def theirs(x, t, cond):
    sizes = {name: tensor(cond[name]) for name in ('resolution', 'aspect_ratio') if name in cond}
    mask = tensor(cond['text_mask'].astype(np.float32)) if 'text_mask' in cond else None
    return lambda model: nhwc(
        model(
            nchw(x),
            encoder_hidden_states=tensor(cond['text']),
            timestep=tensor(t),
            added_cond_kwargs=sizes or {'resolution': None, 'aspect_ratio': None},
            encoder_attention_mask=mask,
        ).sample
    )


@pytest.fixture(scope='module')
def case():
    return network_case(ARCHITECTURE, NAME, TINY)


@pytest.fixture(scope='module')
def sized():
    return network_case(ARCHITECTURE, NAME, SIZED, seed=1)


@pytest.mark.parametrize('masked', [False, True])
def test_outputs_are_diffusers(case, masked):
    inputs = batch(8, 8, masked=masked)
    assert case.error(inputs, theirs(*inputs)) < 1e-5


def test_outputs_of_another_shape_are_diffusers(case):
    """Positions are stretched along each side by itself."""
    inputs = batch(12, 4)
    assert case.error(inputs, theirs(*inputs)) < 1e-5


@pytest.mark.parametrize('masked', [False, True])
def test_outputs_with_sizes_are_diffusers(sized, masked):
    inputs = batch(8, 12, sized=True, masked=masked)
    assert sized.error(inputs, theirs(*inputs)) < 1e-5


def test_round_trips_are_exact(case, sized):
    case.check_round_trip()
    sized.check_round_trip()


def test_diffusers_loads_what_is_exported(case, sized, tmp_path):
    for name, one in (('plain', case), ('sized', sized)):
        (tmp_path / name).mkdir()
        one.check_export_loads(tmp_path / name)


def test_the_published_sizes_have_the_names_and_shapes_of_the_table():
    check_published_shapes(ARCHITECTURE, NAME, XL_2_512)
    check_published_shapes(ARCHITECTURE, NAME, {**XL_2_512, 'sample_size': 128})  # the 1024 model, told sizes


def test_what_follows_from_the_size_alone_is_what_diffusers_takes():
    """1024 pixels: positions in half steps, and sizes; 512 and PixArt-Sigma's 1024: none."""
    at_512, at_1024 = (ARCHITECTURE.to_options({**XL_2_512, 'sample_size': size}) for size in (64, 128))
    assert (at_512['interpolation_scale'], at_512['size_conditions']) == (1, 'none')
    assert (at_1024['interpolation_scale'], at_1024['size_conditions']) == (2, 'embedded')
    sigma = {**XL_2_512, 'sample_size': 128, 'use_additional_conditions': False}
    assert ARCHITECTURE.to_options(sigma)['size_conditions'] == 'none'
    for wrong in ({'norm_type': 'ada_norm_zero'}, {'cross_attention_dim': 768}, {'interpolation_scale': 0}):
        with pytest.raises(WeightsError, match=next(iter(wrong))):
            ARCHITECTURE.to_options({**XL_2_512, **wrong})
