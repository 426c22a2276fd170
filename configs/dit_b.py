"""DiT on ImageNet 256 latents with the published recipe (Peebles & Xie 2023, section 4), or a later one.

Arguments, with commas between them:
  model=B/2     S, B, L or XL, and patch 2, 4 or 8
  recipe=dit    linear betas, eps with learned sigma and the hybrid bound;
                sit: SiT (Ma et al. 2024), flow and velocity;
                lightning: LightningDiT (Yao et al. 2025, table 2, on these latents), SiT with RMSNorm, SwiGLU, rotary
                positions, logit-normal times and larger batches, without its loss on the velocity's direction
  smoke         the same experiment, shrunk, on the embedded digits

The latents are a dataset of their own: `python -m diffjax.data prepare imagenet256_latents --manual_dir=DIR`.
"""

from ml_collections import ConfigDict

SIZES = {'S': (12, 384, 6), 'B': (12, 768, 12), 'L': (24, 1024, 16), 'XL': (28, 1152, 16)}  # depth, width, heads
RECIPES = {
    'dit': {
        'schedule': 'linear',
        'target': 'eps',
        'times': 'discrete',
        'weight': 'eps',
        'learned_variance': True,
        'solver': 'ddpm:variance=learned',
        'num_steps': 250,
    },
    'sit': {
        'schedule': 'flow',
        'target': 'velocity',
        'times': 'uniform',
        'weight': 'target',
        'learned_variance': False,
        'solver': 'heun:coordinate=t',
        'num_steps': 125,
    },
}
RECIPES['lightning'] = RECIPES['sit'] | {
    'times': 'logit_normal',
    'solver': 'euler:coordinate=t',
    'num_steps': 250,
    'network': {'norm': 'rms', 'mlp': 'swiglu', 'positions': 'both'},
    'optimizer': {'learning_rate': 2e-4, 'b2': 0.95},
    'training': {'num_steps': 80_000, 'batch_size': 1024},
}


def parse(arg: str) -> tuple[tuple[int, int, int], int, dict, bool]:
    """((depth, width, heads), patch size, recipe, smoke)."""
    given = dict(part.partition('=')[::2] for part in arg.split(',') if part)
    model, recipe, smoke = given.pop('model', 'B/2'), given.pop('recipe', 'dit'), given.pop('smoke', None)
    size, _, patch = model.partition('/')
    if given or smoke not in (None, '') or size not in SIZES or patch not in ('2', '4', '8') or recipe not in RECIPES:
        raise ValueError(
            f'configs/dit_b.py takes model=S|B|L|XL / 2|4|8, recipe={"|".join(RECIPES)} and smoke, '
            f'such as model=XL/2,recipe=lightning; got {arg!r}'
        )
    return SIZES[size], int(patch), RECIPES[recipe], smoke is not None


def get_config(arg: str = '') -> ConfigDict:
    (depth, width, heads), patch, recipe, smoke = parse(arg)
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {
                'name': 'imagenet256_latents',
                'split': 'train',
                'test_split': '',
                'data_dir': '',
                'flip': False,
                'latent_scale': 0.18215,
            },
            'network': {
                'name': 'DiT',
                'patch_size': patch,
                'hidden_size': width,
                'depth': depth,
                'num_heads': heads,
                'frequency_shift': 0,  # 1: published weights as diffusers runs them
                'scan_layers': 'auto',
                'remat': 'none',
                'compute_dtype': 'bfloat16',
                'attention': 'auto',
                **recipe.get('network', {}),
            },
            **{key: recipe[key] for key in ('schedule', 'target', 'times', 'weight', 'learned_variance')},
            'label_drop': 0.1,
            'optimizer': {
                'name': 'adamw',
                'learning_rate': 1e-4,
                'decay': 'constant',
                'weight_decay': 0.0,
                **recipe.get('optimizer', {}),
            },
            'training': {
                'num_steps': 400_000,
                'batch_size': 256,
                'num_microbatches': 1,
                'log_every_steps': 100,
                'checkpoint_every_steps': 10_000,
                'keep_checkpoints': 3,
                'ema': {'ema': 0.9999},
                'init_from': '',
                **recipe.get('training', {}),
            },
            'first_stage': {'workdir': ''},  # of the autoencoder that decodes samples, trained or imported
            'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'rules': ()},
            'sampler': {
                'solver': recipe['solver'],
                'grid': 'uniform',
                'num_steps': recipe['num_steps'],
                'guidance': 1.5,
                'guidance_low': 0.0,
                'guidance_high': 1.0,
                'guidance_rescale': 0.0,
                'cfg_zero_star': False,
                'zero_init': 0,
                'threshold': 0.0,
                'dynamic_threshold': 0.0,
                'dynamic_threshold_max': 0.0,
                'negative_label': -1,
                'params': '',
                'batch_size': 64,
            },
            'evaluation': {
                'num_samples': 64,
                'classifier': 'none',
                'noise_levels': 10,
                'num_likelihoods': 0,
                'likelihood_trace': 'rademacher',
                'likelihood_tolerance': 1e-5,
                'likelihood_t_min': 0.0,
                'features': 'pixels',
                'inception_weights': '',
                'reference': '',
            },
        }
    )
    if smoke:
        config.dataset.name, config.dataset.test_split = 'digits', 'test'
        config.network.hidden_size, config.network.depth, config.network.num_heads = 32, 2, 2
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.sampler.num_steps, config.sampler.batch_size = 4, 40
        config.evaluation.num_samples = 40
    return config
