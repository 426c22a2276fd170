"""Flux against diffusers' FluxTransformer2DModel, given latents as its pipeline packs them."""

import numpy as np
import pytest

pytest.importorskip('diffusers', reason='parity with diffusers needs the extra [parity]')

from networks import check_published_shapes, nchw, network_case, nhwc, tensor  # noqa: E402

from diffjax.weights.architecture import WeightsError  # noqa: E402
from diffjax.weights.flux import ARCHITECTURE  # noqa: E402

pytestmark = pytest.mark.usefixtures('fast_compilation')

NAME = 'FluxTransformer2DModel'
TINY = {  # shaped as FLUX.1 dev
    'in_channels': 12,
    'num_layers': 2,
    'num_single_layers': 2,
    'attention_head_dim': 16,
    'num_attention_heads': 2,
    'joint_attention_dim': 20,
    'pooled_projection_dim': 12,
    'guidance_embeds': True,
    'axes_dims_rope': [4, 4, 8],
}
FILL = TINY | {'guidance_embeds': False, 'out_channels': 8}  # as schnell, with fewer channels out than in
DEV = {  # transformer/config.json of black-forest-labs/FLUX.1-dev
    'attention_head_dim': 128,
    'guidance_embeds': True,
    'in_channels': 64,
    'joint_attention_dim': 4096,
    'num_attention_heads': 24,
    'num_layers': 19,
    'num_single_layers': 38,
    'patch_size': 1,
    'pooled_projection_dim': 768,
}
HEIGHT, WIDTH = 6, 10


def batch(guided, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    cond = {'text': normal(3, 5, 20), 'pooled': normal(3, 12)}
    cond |= {'guidance': np.array([1.0, 3.5, 7.0], np.float32)} if guided else {}
    return normal(3, HEIGHT, WIDTH, 3), np.array([0.0, 17.0, 999.0], np.float32), cond


def theirs(x, t, cond, mask=None):
    from diffusers import FluxPipeline

    def call(model):
        import torch

        inputs = {name: tensor(cond[name]) for name in cond}
        out = model(
            hidden_states=FluxPipeline._pack_latents(nchw(x), *x.shape[:1], x.shape[3], HEIGHT, WIDTH),
            encoder_hidden_states=inputs['text'],
            pooled_projections=inputs['pooled'],
            timestep=tensor(t) / 1000,
            img_ids=FluxPipeline._prepare_latent_image_ids(3, HEIGHT // 2, WIDTH // 2, 'cpu', torch.float32),
            txt_ids=torch.zeros(inputs['text'].shape[1], 3),
            guidance=inputs.get('guidance'),
            joint_attention_kwargs=None if mask is None else {'attention_mask': tensor(mask)[:, None, None]},
        ).sample
        return nhwc(FluxPipeline._unpack_latents(out, HEIGHT, WIDTH, 1))

    return call


@pytest.fixture(scope='module')
def case():
    return network_case(ARCHITECTURE, NAME, TINY)


def test_outputs_are_diffusers(case):
    x, t, cond = batch(guided=True)
    assert case.error((x, t, cond), theirs(x, t, cond)) < 1e-4  # theirs rounds the angles of embeddings more roughly
    t, cond = t / 1000, cond | {'guidance': cond['guidance'] / 1000}
    assert case.error((x, t, cond), theirs(x, t, cond)) < 5e-6


def test_outputs_with_a_mask_are_diffusers(case):
    x, t, cond = batch(guided=True)
    there = np.arange(5) < np.array([[2], [5], [3]])
    mask = np.concatenate([there, np.ones((3, HEIGHT * WIDTH // 4), bool)], axis=1)
    assert case.error((x, t, cond | {'text_mask': there}), theirs(x, t, cond, mask)) < 1e-4
    assert case.error((x, t, cond), theirs(x, t, cond, mask)) > 1e-2


def test_outputs_without_guidance_are_diffusers():
    inputs = batch(guided=False)
    plain = network_case(ARCHITECTURE, NAME, FILL)
    assert plain.error(inputs, theirs(*inputs)) < 1e-5
    plain.check_round_trip()
    assert ARCHITECTURE.to_options(ARCHITECTURE.to_config(plain.options)) == plain.options


def test_round_trip_is_exact_and_diffusers_loads_the_export(case, tmp_path):
    case.check_round_trip()
    case.check_export_loads(tmp_path)
    assert ARCHITECTURE.to_options(ARCHITECTURE.to_config(case.options)) == case.options


def test_the_published_size_has_the_names_and_shapes_of_the_table():
    check_published_shapes(ARCHITECTURE, NAME, DEV)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'patch_size': 2}, 'patch_size is 2; covered: 1'),
        ({'in_channels': 10}, 'in_channels is 10; covered: a multiple of 4'),
        ({'out_channels': 6}, 'out_channels is 6; covered: a multiple of 4'),
        ({'axes_dims_rope': [4, 4, 4]}, 'axes_dims_rope .*; covered: three even numbers whose sum is .*=16'),
        ({'axes_dims_rope': [3, 5, 8]}, 'axes_dims_rope .*; covered: three even numbers'),
        ({'guidance_embeds': 1}, 'guidance_embeds is 1; covered: False or True'),
        ({'theta': 5}, 'settings that are not covered: .*theta'),
    ],
)
def test_settings_that_are_not_covered_are_refused(changes, message):
    with pytest.raises(WeightsError, match=message):
        ARCHITECTURE.to_options(TINY | changes)
