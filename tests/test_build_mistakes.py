"""Configs that cannot be built, and keys that need others: told in one line, before anything is compiled."""

import copy
from dataclasses import replace

import jax
import numpy as np
import pytest

from diffjax.build import (
    ConfigError,
    build,
)
from diffjax.core import likelihood
from diffjax.core.transforms import NO_TRANSFORMS
from diffjax.tasks import Denoising

MISTAKES = [
    ('sead', 1, ["unknown key 'sead'", 'did you mean seed?', 'dataset', 'optimizer']),
    ('network.hiden_size', 32, ["unknown key 'hiden_size'", 'did you mean hidden_size?', 'patch_size', 'depth']),
    ('training.batchsize', 16, ["unknown key 'batchsize'", 'did you mean batch_size?', 'log_every_steps']),
    ('mesh.model', 1, ["mesh: unknown key 'model'", 'valid: data, fsdp']),
    ('seed', None, ['the config lacks seed']),
    ('training', None, ['lacks training']),
    ('network.depth', None, ["network 'DiT' needs depth"]),
    ('dataset.name', None, ['dataset lacks name']),
    ('training', 3, ['training is a section with keys, got 3']),
    ('schedule', 'cosin', ["schedule: unknown name 'cosin'", 'did you mean Cosine?', 'Flow']),
    ('schedule', 'shifted:shift=3', ["schedule 'shifted' needs base"]),
    ('schedule', 'shifted:base=cosin,shift=3', ["schedule 'shifted' base: unknown name 'cosin'", 'mean Cosine?']),
    ('schedule', 'shifted:base=vp:beta=3,shift=3', ["schedule 'shifted' base 'vp': unknown key 'beta'", 'beta_max']),
    ('schedule', 'shifted:base=3,shift=3', ["schedule 'shifted' base is a name", 'got 3']),
    ('schedule', 'shifted:base=flow', ["schedule 'shifted': give one of logsnr_shift, resolution", 'got none']),
    ('schedule', 'linear:zero_terminal=no', ["schedule 'linear': zero_terminal is True or False, got 'no'"]),
    ('sampler.grid', '[1.0, 0.5, 0.0]', ["sampler.grid 'times': 3 times make 2 steps", 'set it to 2']),
    ('sampler.grid', [0.0, 1.0], ["sampler.grid 'times'", 'two times that fall within [0, 1]', '[0.0, 1.0]']),
    ('sampler.grid', 'times', ["sampler.grid 'times' needs values"]),
    ('sampler.grid', 'karras:end=sigma_min', ["sampler.grid 'karras'", "or 'lowest'", "got 'sigma_min'"]),
    ('target', 'noise', ["target: unknown name 'noise'", 'Eps', 'Velocity']),
    ('network.num_classes', 7, ['network.num_classes is 7', 'needs 10']),
    ('network.out_channels', 3, ['network.out_channels is 3', 'needs 1']),
    ('network.name', 'resnet', ["network: unknown name 'resnet'", 'valid: DiT, EDM2', 'UNet, UViT']),
    ('optimizer.name', 'lion', ["optimizer: unknown name 'lion'", 'valid: adam, adamw, muon, sgd']),
    ('sampler.solver', 'unipd', ["sampler.solver: unknown name 'unipd'", 'did you mean unipc?', 'heun']),
    ('sampler.solver', 'ddim:etta=1', ["sampler.solver 'ddim': unknown key 'etta'", 'did you mean eta?']),
    ('sampler.solver', 'ddim:eta', ['options are written name:option=value', "'eta'"]),
    (
        'sampler.solver',
        'ddim:eta=2',
        ["sampler.solver 'ddim'", "ddim's eta is a number from 0 on and at most 1"],
    ),
    ('sampler.solver', 'heun:coordinate=lambda', ['coordinate is one of', "'lambda'"]),
    ('sampler.solver', 'ddpm:variance=learned', ['a learned variance, which this network does not have']),
    ('sampler.solver', 'unipc:order=2.0', ["unipc's order is one of 1, 2, 3, 4; got 2.0"]),
    ('sampler.grid', 'karras:rho=seven', ["sampler.grid 'karras': rho is a number above 0, got 'seven'"]),
    ('sampler.guidance_high', -0.1, ['sampler.guidance_low and sampler.guidance_high', 'got 0.0 and -0.1']),
    ('sampler.grid', 'cosine', ["sampler.grid: unknown name 'cosine'", 'karras, leading']),
    ('sampler.num_steps', 0, ['sampler.num_steps must be at least 1, got 0']),
    ('sampler.batch_size', 0, ['sampler.batch_size must be at least 1, got 0']),
    ('sampler.params', 'emma', ["sampler.params is 'raw' or one of ema", '--mode=ema', "got 'emma'"]),
    ('sampler.negative_label', 11, ['sampler.negative_label is a class from 0 to 9', 'got 11']),
    ('sampler.guidance_rescale', 1.5, ['sampler.guidance_rescale lies in [0, 1], got 1.5']),
    ('sampler.zero_init', -1, ['sampler.zero_init must be at least 0, got -1']),
    ('sampler.zero_init', 5, ['zero_init = 5 leaves no call with a velocity', 'makes 5 network calls']),
    ('sampler.threshold', -1.0, ['sampler.threshold must be at least 0, got -1.0']),
    ('sampler.threshold', float('nan'), ['sampler.threshold is a finite number, got nan']),
    ('sampler.dynamic_threshold', 99.5, ['sampler.dynamic_threshold lies in [0, 1], got 99.5']),
    ('sampler.dynamic_threshold_max', 2.0, ['needs a sampler.dynamic_threshold such as 0.995', 'got 2 with 0']),
    ('sampler.known', 'first_frames', ["sampler.known = 'first_frames'", 'are for clips of pixels']),
    ('sampler.num_frames', 48, ['sampler.num_frames = 48', 'known, known_from, num_frames and window_stride are for']),
    ('sampler.num_frames', -1, ['sampler.num_frames is a whole number from 0 on, got -1']),
    ('sampler.num_frames', 48.0, ['sampler.num_frames is a whole number, got 48.0']),
    ('sampler.window_stride', 8, ['sampler.window_stride = 8 says nothing without a sampler.num_frames']),
    ('sampler.known_from', 'x.npz', ["sampler.known_from = 'x.npz' says nothing without a sampler.known"]),
    ('evaluation.classifier', 'resnet', ["evaluation.classifier is 'none' or 'svc', got 'resnet'"]),
    ('evaluation.num_samples', -1, ['evaluation.num_samples must be at least 0, got -1']),
    ('evaluation.noise_levels', 0, ['evaluation.noise_levels must be at least 1, got 0']),
    ('evaluation.num_likelihoods', -1, ['evaluation.num_likelihoods must be at least 0, got -1']),
    ('evaluation.likelihood_trace', 'exakt', ["evaluation.likelihood_trace: unknown name 'exakt'", 'Exact']),
    ('evaluation.likelihood_trace', 'gaussian:num_probes=0', ['num_probes must be at least 1, got 0']),
    ('evaluation.likelihood_tolerance', 0.0, ['evaluation.likelihood_tolerance lies in (0, 1), got 0.0']),
    ('evaluation.likelihood_t_min', 1.0, ['evaluation.likelihood_t_min lies in [0, 1), got 1.0']),
    ('evaluation.features', 'inceptoin', ["evaluation.features: unknown name 'inceptoin'", 'did you mean inception?']),
    ('evaluation.features', 'inception', ['Inception needs its weights', 'evaluation.inception_weights', 'got none']),
    ('evaluation.features', 'inception:resize=cubic', ["resize='cubic' is not known; choose one of 'tensorflow'"]),
    ('evaluation.features', 'pixels:batch_size=0', ['batch_size is at least 1, got 0']),
    ('evaluation.reference', 'none.npz', ['evaluation.reference: none.npz is neither an NPZ archive nor a folder']),
    ('optimizer.decay', 'cos', ["optimizer 'adamw'", 'constant, cosine, linear, rsqrt']),
    ('optimizer.warmup_steps', 4, ['warmup_steps = 4 must be below num_steps = 4']),
    ('training.batch_size', 20, ['batch_size = 20 does not divide over 8 devices', '16 or 24 would']),
    ('training.num_microbatches', 4, ['batch_size = 16 does not divide over 8 devices x 4 microbatches', '32 would']),
    ('training.num_steps', 0, ['training.num_steps must be at least 1, got 0']),
    ('training.ema.ema', 1.0, ['training.ema.ema is a decay between 0 and 1, got 1.0']),
    ('mesh.fsdp', 3, ['mesh.data = -1 times mesh.fsdp = 3 does not cover the 8 devices here']),
    ('network.num_heads', 5, ['hidden_size=32 must be a multiple of 5']),
    ('network.patch_size', 3, ['height and width must be multiples of patch_size=3, got 8x8']),
    ('network.compute_dtype', 'fp8', ["compute_dtype='fp8'", 'bfloat16']),
    ('network', {'name': 'MLP'}, ['MLP takes x of shape [B, D], got (1, 8, 8, 1)']),
    ('network', 'DiT', ["network 'DiT' needs patch_size, hidden_size, depth, num_heads"]),
    ('network', 7, ['network is a name', 'got 7']),
    ('network', {'name': 7}, ['network is a name', '7']),
    ('label_drop', 1.0, ['label_drop is a probability below 1, got 1.0']),
    ('learned_variance', True, ['a learned variance needs discrete times, got Uniform']),
    ('target', 'eps', ['t =']),  # an eps network cannot be asked at alpha = 0
    ('dataset.name', 'digitz', ["There is no dataset called 'digitz'", 'Did you mean digits']),
    ('dataset.split', 'training', ["'digits' has no split 'training'", 'test', 'train']),
    ('dataset.test_split', 'validation', ["'digits' has no split 'validation'", 'test', 'train']),
    ('dataset.name', 'cifar10', ["'cifar10' is not prepared", 'python -m diffjax.data prepare cifar10']),
    ('dataset.name', 'imagenet256_latents', ['is not prepared', '--manual_dir=DIR']),
]


@pytest.mark.parametrize('key, value, fragments', MISTAKES, ids=[f'{key}={value}' for key, value, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(config, changed, compiles, key, value, fragments):
    """With what is right; and no program of any size has been compiled by then."""
    with compiles() as programs, pytest.raises(ValueError) as caught:
        build(changed(config, key, value))
    message = str(caught.value)
    assert '\n' not in message
    for fragment in fragments:
        assert fragment in message
    assert not [name for name in programs if 'step' in name or 'make' in name or 'draw' in name]


def test_guidance_needs_labels(config):
    experiment = build(config)
    no_labels = Denoising(model=experiment.task.model, objective=experiment.task.objective)
    unconditional = replace(experiment, task=no_labels)
    assert unconditional.guidance() is None
    with pytest.raises(ConfigError, match='sampler.guidance = 2 needs labels'):
        unconditional.guidance(replace(experiment.sampler, guidance=2.0))
    assert experiment.guidance() is None
    plain = experiment.guidance(replace(experiment.sampler, guidance=2.0, guidance_low=0.25))
    assert plain == (2.0, 0.25, 1.0, None, None)
    refined = replace(experiment.sampler, guidance=2.0, guidance_rescale=0.5, cfg_zero_star=True)
    assert experiment.guidance(refined) == (2.0, 0.0, 1.0, 0.5, True)
    assert experiment.guidance(replace(refined, guidance=1.0)) is None  # at scale 1 both change nothing


def test_transforms_are_built_where_they_are_chosen(config):
    experiment = build(config)
    assert experiment.transforms() == NO_TRANSFORMS == (None, None, None, None)
    for changes, expected in (
        ({'threshold': 1.0}, (1.0, None, None, None)),
        ({'dynamic_threshold': 0.5}, (None, 0.5, np.inf, None)),
        ({'dynamic_threshold': 0.5, 'dynamic_threshold_max': 4.0, 'zero_init': 2}, (None, 0.5, 4.0, 2)),
    ):
        assert experiment.transforms(replace(experiment.sampler, **changes)) == expected
    for wrong, fragment in (
        ({'threshold': 1.0, 'dynamic_threshold': 0.9}, 'two ways to bound x0: set one to 0'),
        ({'dynamic_threshold': 0.9, 'dynamic_threshold_max': 0.5}, 'is at least 1 .* got 0.5 with 0.9'),
    ):
        with pytest.raises(ConfigError, match=fragment):
            replace(experiment.sampler, **wrong)


def test_building_twice_gives_equal_shapes_and_changes_no_config(config):
    before = copy.deepcopy(config)
    first, second = build(config), build(config)
    assert config == before
    shapes = [jax.tree.map(lambda s: s.shape, e.trainer().init(e.batch_spec)[1].params) for e in (first, second)]
    assert shapes[0] == shapes[1]
    assert first.sample_shape == (8, 8, 1) and len(first.source) == 1437 and len(first.test) == 360


def test_a_reference_fits_the_images_and_the_features(config, changed, tmp_path):
    path = str(tmp_path / 'adm.npz')
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ConfigError, match='adm.npz .moments. holds moments of 2048 features, and pixels have 64'):
        build(changed(config, 'evaluation.reference', path))
    np.savez(path, np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match=r'images of \[8, 8, 3\], and the samples are \[8, 8, 1\]'):
        build(changed(config, 'evaluation.reference', path))
    np.savez(path, np.zeros((5, 8, 8, 1), np.uint8))
    space, reference = build(changed(config, 'evaluation.reference', path)).comparison()
    assert (space.name, reference.name) == ('pixels', 'adm.npz (5 images)')
    assert build(config).comparison() is None


def test_likelihood_needs_held_out_images_and_a_network_that_can_be_asked(config, changed):
    config['evaluation'] |= {'num_likelihoods': 4, 'likelihood_trace': 'gaussian:num_probes=3'}
    assert build(config).likelihood_trace() == likelihood.Gaussian(num_probes=3)
    assert build(changed(config, 'evaluation.num_likelihoods', 0)).likelihood_trace() is None
    with pytest.raises(ConfigError, match='num_likelihoods = 4 needs held-out images, and there are none'):
        build(changed(config, 'dataset.test_split', ''))
    config |= {'schedule': 'vp', 'target': 'score', 'sampler': {**config['sampler'], 'grid': 'karras:end=lowest'}}
    config['times'] = 'uniform:low=1e-3'
    with pytest.raises(ConfigError, match='num_likelihoods, from likelihood_t_min to t = 1: .* Score cannot .* t = 0'):
        build(config)
    assert build(changed(config, 'evaluation.likelihood_t_min', 1e-3)).likelihood_trace() is not None


def test_where_there_may_be_none_zero_is_taken_and_less_is_not(get_config, changed):
    config = get_config('video_digits', 'smoke').to_dict()
    alone = changed(changed(config, 'network.temporal_kernel', 0), 'network.temporal_attention', 0)
    build(alone)
    with pytest.raises(ConfigError, match='base_channels is a whole number from 1 on, got 0'):
        build(changed(config, 'network.base_channels', 0))
    with pytest.raises(ConfigError, match='temporal_attention=-1 must be a number of blocks'):
        build(changed(config, 'network.temporal_attention', -1))
