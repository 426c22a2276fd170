"""DiT against diffusers' DiTTransformer2DModel: outputs, names and shapes, and the way back."""

import numpy as np
import pytest

pytest.importorskip('diffusers', reason='parity with diffusers needs the extra [parity]')

from networks import check_published_shapes, nchw, network_case, nhwc, tensor  # noqa: E402

from diffjax.weights.dit import ARCHITECTURE  # noqa: E402

NAME = 'DiTTransformer2DModel'
TINY = {
    'num_attention_heads': 2,
    'attention_head_dim': 16,
    'num_layers': 2,
    'sample_size': 8,
    'out_channels': 8,
    'num_embeds_ada_norm': 5,
    'norm_eps': 1e-6,
}
XL_2_256 = {  # transformer/config.json of facebook/DiT-XL-2-256
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': 72,
    'dropout': 0.0,
    'in_channels': 4,
    'norm_elementwise_affine': False,
    'norm_num_groups': 32,
    'norm_type': 'ada_norm_zero',
    'num_attention_heads': 16,
    'num_embeds_ada_norm': 1000,
    'num_layers': 28,
    'out_channels': 8,
    'patch_size': 2,
    'sample_size': 32,
    'upcast_attention': False,
}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
    return x, np.array([0.0, 17.0, 999.0], np.float32), np.array([0, 3, 5], np.int32)  # 5 is the null label


def theirs(x, t, labels, dtype=None):
    return lambda model: nhwc(model(nchw(x, dtype), tensor(t, dtype), tensor(labels)).sample)


@pytest.fixture(scope='module')
def case():
    return network_case(ARCHITECTURE, NAME, TINY)


def test_outputs_are_diffusers(case):
    inputs = batch()
    error = case.error(inputs, theirs(*inputs))
    assert error < 1e-5


def test_the_default_epsilon_of_diffusers_is_near_enough():
    inputs = batch()
    case = network_case(ARCHITECTURE, NAME, {**TINY, 'norm_eps': 1e-5}, seed=1)
    assert case.error(inputs, theirs(*inputs)) < 1e-4


def test_round_trip_is_exact(case):
    case.check_round_trip()


def test_diffusers_loads_what_is_exported(case, tmp_path):
    case.check_export_loads(tmp_path)


def test_the_published_size_has_the_names_and_shapes_of_the_table():
    check_published_shapes(ARCHITECTURE, NAME, XL_2_256)
