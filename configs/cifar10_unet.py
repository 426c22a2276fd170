"""DDPM's U-Net on CIFAR-10, class-conditional, with the published recipe (Ho et al. 2020, appendix B).

CIFAR-10 is read from TFDS: `python -m diffjax.data prepare cifar10` writes it once.
Arguments: smoke (the same experiment, shrunk, on the embedded digits).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/cifar10_unet.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {'name': 'cifar10', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': True},
            'network': {
                'name': 'UNet',
                'base_channels': 128,
                'channel_multipliers': (1, 2, 2, 2),
                'num_res_blocks': 2,
                'attention_resolutions': (16,),
                'num_heads': 1,
                'time_conditioning': 'additive',
                'sinusoids': 'sin_cos_to_end',
                'downsample_zeros': 'end',
                'norm_epsilon': 1e-6,
                'dropout': 0.1,
                'compute_dtype': 'bfloat16',
            },
            'schedule': 'linear',
            'target': 'eps',
            'times': 'discrete',
            'weight': 'eps',
            'learned_variance': False,
            'label_drop': 0.1,
            'optimizer': {
                'name': 'adam',
                'learning_rate': 2e-4,
                'decay': 'constant',
                'warmup_steps': 5000,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 800_000,
                'batch_size': 128,
                'num_microbatches': 1,
                'log_every_steps': 100,
                'checkpoint_every_steps': 10_000,
                'keep_checkpoints': 3,
                'ema': {'ema': 0.9999},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1},
            'sampler': {
                'solver': 'ddpm:variance=large',
                'grid': 'uniform',
                'num_steps': 1000,
                'guidance': 1.0,
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
                'batch_size': 500,
            },
            'evaluation': {
                'num_samples': 10_000,
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
    if arg == 'smoke':
        config.dataset.name, config.dataset.flip = 'digits', False
        config.network.base_channels, config.network.channel_multipliers = 8, (1, 2)
        config.network.num_res_blocks, config.network.attention_resolutions = 1, (4,)
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.num_steps, config.sampler.batch_size = 4, 40
        config.evaluation.num_samples = 40
    return config
