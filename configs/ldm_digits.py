"""Latent diffusion on the embedded digits, whole: an autoencoder, its latents, a DiT in them. Minutes on two CPU cores.

Arguments: smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def autoencoder() -> dict:
    """The config of the first stage: 8 x 8 x 1 pixels to 4 x 4 x 2 latents."""
    return {
        'seed': 0,
        'task': {
            'name': 'autoencoding',
            'reconstruction': 'l2',
            'kl_weight': 1e-4,
            'perceptual': 'none',
            'discriminator': 'none',
            'discriminator_optimizer': '',
        },
        'dataset': {'name': 'digits', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
        'network': {
            'name': 'Autoencoder',
            'bottleneck': 'kl',
            'latent_channels': 2,
            'base_channels': 32,
            'channel_multipliers': (1, 2),
            'num_res_blocks': 1,
            'num_groups': 8,
        },
        'optimizer': {
            'name': 'muon',
            'learning_rate': 1e-2,
            'adam_learning_rate': 2e-3,
            'decay': 'cosine',
            'warmup_steps': 50,
            'clip_norm': 1.0,
        },
        'training': {
            'num_steps': 1000,
            'batch_size': 64,
            'num_microbatches': 1,
            'log_every_steps': 50,
            'checkpoint_every_steps': 500,
            'keep_checkpoints': 2,
            'ema': {'ema': 0.99},
            'init_from': '',
        },
        'mesh': {'data': -1, 'fsdp': 1},
        'evaluation': {'num_samples': 360, 'batch_size': 60, 'params': ''},
        'encoding': {'batch_size': 64, 'examples_per_shard': 512},
    }


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/ldm_digits.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {'name': 'digits', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
            'first_stage': {'config': autoencoder(), 'workdir': '', 'encode': 'once', 'tile': 0, 'batch_size': 480},
            'network': {
                'name': 'DiT',
                'patch_size': 1,
                'hidden_size': 96,
                'depth': 4,
                'num_heads': 4,
                'scan_layers': False,
                'remat': 'none',
                'compute_dtype': 'float32',
            },
            'schedule': 'flow',
            'target': 'velocity',
            'times': 'uniform',
            'weight': 'target',
            'learned_variance': False,
            'label_drop': 0.1,
            'optimizer': {
                'name': 'adamw',
                'learning_rate': 2e-3,
                'decay': 'cosine',
                'warmup_steps': 100,
                'weight_decay': 0.0,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 4000,
                'batch_size': 64,
                'num_microbatches': 1,
                'log_every_steps': 50,
                'checkpoint_every_steps': 1000,
                'keep_checkpoints': 3,
                'ema': {'ema': 0.999},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1},
            'sampler': {
                'solver': 'heun:coordinate=t',
                'grid': 'uniform',
                'num_steps': 25,
                'guidance': 1.0,
                'params': '',
                'batch_size': 480,
            },
            'evaluation': {'num_samples': 1437, 'classifier': 'svc', 'noise_levels': 10, 'features': 'pixels'},
        }
    )
    if arg == 'smoke':
        config.network.hidden_size, config.network.depth = 32, 2
        config.sampler.num_steps, config.sampler.batch_size = 3, 40
        config.evaluation.num_samples = 40
        first = config.first_stage.config
        first.network.base_channels, first.evaluation.num_samples = 8, 24
        for each in (config, first):
            each.training.num_steps, each.training.batch_size = 4, 16
            each.training.log_every_steps, each.training.checkpoint_every_steps = 2, 2
            each.optimizer.warmup_steps = 1
    return config
