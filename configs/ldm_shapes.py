"""Latent diffusion on the embedded 64 x 64 shapes, whole: an autoencoder, its latents, a DiT in them.

Half an hour on two CPU cores.

Arguments: smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def autoencoder() -> dict:
    """The config of the first stage: 64 x 64 x 3 pixels to 8 x 8 x 16 latents."""
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
        'dataset': {'name': 'shapes', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
        'network': {
            'name': 'Autoencoder',
            'bottleneck': 'kl',
            'latent_channels': 16,
            'patch_size': 8,
            'base_channels': 128,
            'channel_multipliers': (1,),
            'num_res_blocks': 1,
            'num_groups': 8,
        },
        'optimizer': {
            'name': 'muon',
            'learning_rate': 1e-2,
            'adam_learning_rate': 2e-3,
            'decay': 'cosine',
            'warmup_steps': 100,
            'clip_norm': 1.0,
        },
        'training': {
            'num_steps': 2500,
            'batch_size': 16,
            'num_microbatches': 1,
            'log_every_steps': 50,
            'checkpoint_every_steps': 500,
            'keep_checkpoints': 2,
            'ema': {'ema': 0.995},
            'init_from': '',
        },
        'mesh': {'data': -1, 'fsdp': 1},
        'evaluation': {'num_samples': 2000, 'batch_size': 50, 'params': ''},
        'encoding': {'batch_size': 100, 'examples_per_shard': 2000},
    }


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/ldm_shapes.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {'name': 'shapes', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
            'first_stage': {'config': autoencoder(), 'workdir': '', 'encode': 'once', 'tile': 0, 'batch_size': 100},
            'network': {
                'name': 'DiT',
                'patch_size': 1,
                'hidden_size': 192,
                'depth': 6,
                'num_heads': 6,
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
                'name': 'muon',
                'learning_rate': 8e-3,
                'adam_learning_rate': 1e-3,
                'decay': 'cosine',
                'warmup_steps': 100,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 4000,
                'batch_size': 32,
                'num_microbatches': 1,
                'log_every_steps': 50,
                'checkpoint_every_steps': 500,
                'keep_checkpoints': 2,
                'ema': {},  # the rate falls to 0: an average over so few steps would lag
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1},
            'sampler': {
                'solver': 'dpmpp_2m',
                'grid': 'uniform',
                'num_steps': 20,
                'guidance': 1.0,
                'params': '',
                'batch_size': 100,
            },
            'evaluation': {'num_samples': 1200, 'classifier': 'none', 'noise_levels': 10, 'features': 'shapes'},
        }
    )
    if arg == 'smoke':
        config.network.hidden_size, config.network.depth, config.network.num_heads = 32, 2, 4
        config.sampler.num_steps, config.sampler.batch_size = 3, 40
        config.evaluation.num_samples = 40
        first = config.first_stage.config
        first.network.base_channels, first.evaluation.num_samples = 8, 24
        first.network.patch_size, first.network.channel_multipliers = 1, (1, 2)
        config.dataset.name = first.dataset.name = 'digits'
        config.evaluation.features = 'pixels'
        for each in (config, first):
            each.training.num_steps, each.training.batch_size = 4, 16
            each.training.log_every_steps, each.training.checkpoint_every_steps = 2, 2
            each.optimizer.warmup_steps = 1
    return config
