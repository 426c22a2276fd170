"""Sampling Stable Diffusion 3 and Flux: our loop against the pipelines of diffusers, from the same noise.

It settles what the networks' tests leave open: the sign of the velocity, the time that the network is told, the shift
of the grid, and guidance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('diffusers', reason='parity with diffusers needs the extra [parity]')

from networks import nchw, network_case, nhwc, relative_error, tensor  # noqa: E402

from diffjax.core import grids, solvers  # noqa: E402
from diffjax.core.denoisers import network_denoiser  # noqa: E402
from diffjax.core.guidance import Guidance, classifier_free  # noqa: E402
from diffjax.core.parameterizations import Velocity  # noqa: E402
from diffjax.core.sampling import sample, sample_keys  # noqa: E402
from diffjax.core.schedules import Flow, Shifted  # noqa: E402
from diffjax.weights import flux, mmdit  # noqa: E402

pytestmark = pytest.mark.usefixtures('fast_compilation')

FLOW = Flow()
NUM_STEPS, BATCH = 4, 2
SD3 = {
    'sample_size': 8,
    'in_channels': 4,
    'out_channels': 4,
    'num_layers': 2,
    'attention_head_dim': 8,
    'num_attention_heads': 2,
    'joint_attention_dim': 12,
    'caption_projection_dim': 16,
    'pooled_projection_dim': 10,
    'pos_embed_max_size': 6,
}
FLUX = {
    'in_channels': 16,
    'num_layers': 1,
    'num_single_layers': 1,
    'attention_head_dim': 8,
    'num_attention_heads': 2,
    'joint_attention_dim': 12,
    'pooled_projection_dim': 10,
    'guidance_embeds': True,
    'axes_dims_rope': [2, 2, 4],
}


def noise_and_conditions(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    x = normal(BATCH, 8, 8, 4)
    return x, *({'text': normal(BATCH, 5, 12), 'pooled': normal(BATCH, 10)} for _ in range(2))


def ours(case, grid, x, cond, baseline=None, scale=1.0, schedule=FLOW):
    """Euler steps on a grid, as a config has them with schedule `flow`, target `velocity` and solver `ddim`."""
    denoiser = network_denoiser(lambda x, t, cond: case.apply(case.params, x, t, cond), schedule, Velocity())
    if baseline is not None:
        denoiser = classifier_free(denoiser, Guidance(scale), baseline)
    plan = solvers.ddim(schedule, grid)
    return jax.jit(lambda x, cond: sample(denoiser, plan, x, cond, sample_keys(jax.random.key(0), BATCH))[0])(x, cond)


def run(pipeline, **inputs):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(num_inference_steps=NUM_STEPS, height=64, width=64, output_type='latent', **inputs).images


@pytest.fixture(scope='module')
def sd3():
    """(the case, inputs, what StableDiffusion3Pipeline makes of them at guidance 5 and shift 3)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    case = network_case(mmdit.ARCHITECTURE, 'SD3Transformer2DModel', SD3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    absent = dict.fromkeys(f'{kind}{i}' for kind in ('text_encoder', 'tokenizer') for i in ('', '_2', '_3'))
    pipeline = StableDiffusion3Pipeline(case.model, scheduler, vae=None, **absent)
    x, cond, baseline = noise_and_conditions()
    expected = run(
        pipeline,
        latents=nchw(x),
        prompt_embeds=tensor(cond['text']),
        pooled_prompt_embeds=tensor(cond['pooled']),
        negative_prompt_embeds=tensor(baseline['text']),
        negative_pooled_prompt_embeds=tensor(baseline['pooled']),
        guidance_scale=5.0,
    )
    return case, (x, cond, baseline, 5.0), nhwc(expected)


def test_stable_diffusion_3_is_sampled_as_its_pipeline_does(sd3):
    case, inputs, expected = sd3
    low = 3 * 0.001 / (1 + 2 * 0.001)  # their last level is that of the lowest timestep, shifted twice
    grid = grids.shifted(FLOW, NUM_STEPS, shift=3.0, low=low)
    assert relative_error(ours(case, grid, *inputs), expected) < 1e-4


def test_a_shifted_schedule_tells_the_network_another_time(sd3):
    """The same noise levels, and t before the shift: not what Stable Diffusion 3 was trained with."""
    case, inputs, expected = sd3
    schedule = Shifted(base=FLOW, shift=3.0)
    grid = np.append(np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), NUM_STEPS), 0.0)
    assert relative_error(ours(case, grid, *inputs, schedule=schedule), expected) > 1e-2


def test_flux_is_sampled_as_its_pipeline_does():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    case = network_case(flux.ARCHITECTURE, 'FluxTransformer2DModel', FLUX)
    absent = dict.fromkeys(f'{kind}{i}' for kind in ('text_encoder', 'tokenizer') for i in ('', '_2'))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    x, cond, _ = noise_and_conditions()
    packed = run(
        FluxPipeline(scheduler, None, transformer=case.model, **absent),
        latents=FluxPipeline._pack_latents(nchw(x), BATCH, 4, 8, 8),
        prompt_embeds=tensor(cond['text']),
        pooled_prompt_embeds=tensor(cond['pooled']),
        guidance_scale=3.5,
    )
    cond['guidance'] = jnp.full(BATCH, 3.5)
    grid = grids.dynamic_shift(FLOW, NUM_STEPS, num_tokens=16)
    expected = nhwc(FluxPipeline._unpack_latents(packed, 64, 64, 8))
    assert relative_error(ours(case, grid, x, cond), expected) < 1e-4
