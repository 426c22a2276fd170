"""Autoencoders against diffusers' AutoencoderKL and VQModel: both halves, names and shapes, and the way back."""

import numpy as np
import pytest

pytest.importorskip('diffusers', reason='parity with diffusers needs the extra [parity]')

import jax  # noqa: E402
from networks import check_published_shapes, nchw, network_case, nhwc, relative_error  # noqa: E402

from diffjax.weights.autoencoder import KL, VQ  # noqa: E402
from diffjax.weights.engine import build_network, parameter_shapes  # noqa: E402

DOWN, UP = 'DownEncoderBlock2D', 'UpDecoderBlock2D'


def published(**changes):
    """vae/config.json of Stable Diffusion 1.5, with what other releases change."""
    config = {
        'act_fn': 'silu',
        'block_out_channels': [128, 256, 512, 512],
        'down_block_types': [DOWN] * 4,
        'up_block_types': [UP] * 4,
        'in_channels': 3,
        'out_channels': 3,
        'latent_channels': 4,
        'layers_per_block': 2,
        'norm_num_groups': 32,
        'sample_size': 512,
    }
    return config | changes


SD3 = {
    'latent_channels': 16,
    'scaling_factor': 1.5305,
    'shift_factor': 0.0609,
    'use_quant_conv': False,
    'use_post_quant_conv': False,
    'latents_mean': None,
    'latents_std': None,
    'force_upcast': True,
    'sample_size': 1024,
}
FLUX = SD3 | {'scaling_factor': 0.3611, 'shift_factor': 0.1159, 'mid_block_add_attention': True}
PUBLISHED = {
    'SD 1.5': (KL, published(scaling_factor=0.18215), 83.7),
    'SDXL': (KL, published(scaling_factor=0.13025, sample_size=1024, force_upcast=True), 83.7),
    'SD3': (KL, published(**SD3), 83.8),
    'Flux': (KL, published(**FLUX), 83.8),
    'VQ f4': (
        VQ,
        published(
            block_out_channels=[128, 256, 512],
            down_block_types=[DOWN] * 3,
            up_block_types=[UP] * 3,
            latent_channels=3,
            num_vq_embeddings=8192,
            vq_embed_dim=3,
            sample_size=256,
        ),
        55.3,
    ),
}
TINY = {
    'block_out_channels': [16, 32, 32],
    'down_block_types': [DOWN] * 3,
    'up_block_types': [UP] * 3,
    'norm_num_groups': 8,
    'layers_per_block': 1,
    'sample_size': 16,
}
ATTENDS = {
    'down_block_types': [DOWN, DOWN, 'AttnDownEncoderBlock2D'],
    'up_block_types': ['AttnUpDecoderBlock2D', UP, UP],
}
CASES = {
    'KL': (KL, TINY | {'latent_channels': 4}),
    'KL as in SD3': (KL, TINY | SD3 | {'sample_size': 16, 'latent_channels': 6, 'mid_block_add_attention': False}),
    'VQ': (VQ, TINY | ATTENDS | {'latent_channels': 4, 'num_vq_embeddings': 40, 'vq_embed_dim': 3}),
}


@pytest.fixture(scope='module', params=CASES)
def case(request):
    architecture, config = CASES[request.param]
    return network_case(architecture, architecture.class_name, config)


def images():
    return np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)


def test_both_halves_are_diffusers(case):
    import torch

    x, network = images(), build_network(case.architecture, case.options)
    code = jax.jit(lambda p: network.apply({'params': p}, x, method='encode'))(case.params)
    with torch.no_grad():
        theirs = case.model.encode(nchw(x))
        if case.options['bottleneck'] == 'kl':
            z = code.mean
            assert relative_error(code.mean, nhwc(theirs.latent_dist.mean)) < 1e-5
            assert relative_error(code.log_variance, nhwc(theirs.latent_dist.logvar)) < 1e-5
            np.testing.assert_allclose(code.kl(), theirs.latent_dist.kl(), rtol=1e-5)
        else:
            z = code.quantised
            quantised, _, (_, _, tokens) = case.model.quantize(theirs.latents)
            assert relative_error(code.z, nhwc(theirs.latents)) < 1e-5
            np.testing.assert_array_equal(code.tokens.reshape(-1), tokens.reshape(-1))
            assert len(np.unique(tokens)) > 5
            assert relative_error(z, nhwc(quantised)) < 1e-5
        decoded = jax.jit(lambda p, z: network.apply({'params': p}, z, method='decode'))(case.params, z)
        expected = case.model.decode(nchw(z)).sample
    assert decoded.shape == x.shape
    assert relative_error(decoded, nhwc(expected)) < 1e-5


def test_every_tensor_comes_back_and_diffusers_loads_them(case, tmp_path):
    case.check_round_trip()
    case.check_export_loads(tmp_path)


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_table_is_the_published_one(name):
    architecture, config, millions = PUBLISHED[name]
    check_published_shapes(architecture, architecture.class_name, config)
    shapes = parameter_shapes(architecture, architecture.to_options(config)).values()
    assert round(sum(np.prod(leaf.shape) for leaf in shapes) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ('architecture', 'change', 'message'),
    [
        (KL, {'act_fn': 'relu'}, "act_fn is 'relu'; covered: 'silu'"),
        (KL, {'down_block_types': [DOWN] * 3}, 'down_block_types'),
        (KL, {'use_post_quant_conv': False}, 'use_post_quant_conv'),
        (KL, {'latents_mean': [0.0]}, 'latents_mean'),
        (VQ, {'norm_type': 'spatial'}, 'norm_type'),
        (VQ, {'down_block_types': [DOWN] * 3 + ['AttnDownEncoderBlock2D']}, 'up_block_types'),
    ],
)
def test_what_is_not_covered_is_refused(architecture, change, message):
    with pytest.raises(ValueError, match=message):
        architecture.to_options(published(**change))
