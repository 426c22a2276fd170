"""MM-DiT against diffusers' SD3Transformer2DModel: outputs, names and shapes, the way back, and a sampling loop."""

import numpy as np
import pytest

pytest.importorskip('diffusers', reason='parity with diffusers needs the extra [parity]')

from networks import check_published_shapes, nchw, network_case, nhwc, tensor  # noqa: E402

from diffjax.weights.architecture import WeightsError  # noqa: E402
from diffjax.weights.mmdit import ARCHITECTURE  # noqa: E402

pytestmark = pytest.mark.usefixtures('fast_compilation')

NAME = 'SD3Transformer2DModel'
TINY = {  # shaped as Stable Diffusion 3.5 medium: QK-norm, and two attentions in the first block
    'sample_size': 8,
    'in_channels': 3,
    'num_layers': 3,
    'attention_head_dim': 8,
    'num_attention_heads': 4,
    'joint_attention_dim': 20,
    'caption_projection_dim': 32,
    'pooled_projection_dim': 12,
    'out_channels': 5,
    'pos_embed_max_size': 7,
    'dual_attention_layers': [0],
    'qk_norm': 'rms_norm',
}
PLAIN = TINY | {'dual_attention_layers': [], 'qk_norm': None, 'num_layers': 2}  # as Stable Diffusion 3
MEDIUM = {  # transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers
    'attention_head_dim': 64,
    'caption_projection_dim': 1536,
    'in_channels': 16,
    'joint_attention_dim': 4096,
    'num_attention_heads': 24,
    'num_layers': 24,
    'out_channels': 16,
    'patch_size': 2,
    'pooled_projection_dim': 2048,
    'pos_embed_max_size': 192,
    'sample_size': 128,
}
MEDIUM_3_5 = MEDIUM | {  # of stabilityai/stable-diffusion-3.5-medium
    'dual_attention_layers': list(range(13)),
    'pos_embed_max_size': 384,
    'qk_norm': 'rms_norm',
}


def batch(height=8, width=8, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    t = np.array([0.0, 17.0, 999.0], np.float32)
    return normal(3, height, width, 3), t, {'text': normal(3, 5, 20), 'pooled': normal(3, 12)}


def theirs(x, t, cond):
    return lambda model: nhwc(model(nchw(x), tensor(cond['text']), tensor(cond['pooled']), tensor(t)).sample)


@pytest.fixture(scope='module')
def case():
    return network_case(ARCHITECTURE, NAME, TINY)


def test_outputs_are_diffusers(case):
    inputs = batch(6, 14)  # 3 x 7 tokens of a table of 7 x 7
    assert case.error(inputs, theirs(*inputs)) < 1e-5


@pytest.mark.parametrize('qk_norm', [None, 'layer_norm'])
def test_outputs_without_the_later_options_are_diffusers(qk_norm):
    inputs = batch()
    plain = network_case(ARCHITECTURE, NAME, PLAIN | {'qk_norm': qk_norm})
    assert plain.error(inputs, theirs(*inputs)) < 1e-5
    plain.check_round_trip()


def test_round_trip_is_exact_and_diffusers_loads_the_export(case, tmp_path):
    case.check_round_trip()
    case.check_export_loads(tmp_path)
    assert ARCHITECTURE.to_options(ARCHITECTURE.to_config(case.options)) == case.options


@pytest.mark.parametrize('config', [MEDIUM, MEDIUM_3_5], ids=['3', '3.5'])
def test_the_published_size_has_the_names_and_shapes_of_the_table(config):
    check_published_shapes(ARCHITECTURE, NAME, config)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'sample_size': 9}, 'sample_size is 9; covered: a multiple of patch_size=2'),
        ({'caption_projection_dim': 48}, 'caption_projection_dim is 48; covered: 32'),
        ({'dual_attention_layers': [1]}, r'dual_attention_layers is \[1\]; covered: the first blocks'),
        ({'dual_attention_layers': [0, 1, 2]}, r'dual_attention_layers .*, without the last one, 2'),
        ({'qk_norm': 'l2'}, "qk_norm is 'l2'; covered: None or 'rms_norm' or 'layer_norm'"),
        ({'activation': 'relu'}, 'settings that are not covered: .*activation'),
    ],
)
def test_settings_that_are_not_covered_are_refused(changes, message):
    with pytest.raises(WeightsError, match=message):
        ARCHITECTURE.to_options(TINY | changes)
