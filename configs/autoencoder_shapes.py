"""An autoencoder of the embedded 64 x 64 shapes: 8 x 8 x 16 latents, 12 times fewer values. Minutes on two CPU cores.

Arguments, with commas between them:
  bottleneck=kl   kl, vq (512 codes) or fsq (1,000)
  smoke           seconds, to see that everything runs, on the embedded digits
"""

from ml_collections import ConfigDict

BOTTLENECKS = {
    'kl': {'bottleneck': 'kl', 'latent_channels': 16},
    'vq': {'bottleneck': 'vq', 'latent_channels': 16, 'codebook_size': 512},
    'fsq': {'bottleneck': 'fsq', 'latent_channels': 4, 'levels': (8, 5, 5, 5)},
}


def parse(arg: str) -> tuple[dict, bool]:
    """(the bottleneck's fields, smoke)."""
    given = dict(part.partition('=')[::2] for part in arg.split(',') if part)
    name, smoke = given.pop('bottleneck', 'kl'), given.pop('smoke', None)
    if given or smoke not in (None, '') or name not in BOTTLENECKS:
        raise ValueError(
            f'configs/autoencoder_shapes.py takes bottleneck={"|".join(BOTTLENECKS)} and smoke, such as '
            f'bottleneck=vq; got {arg!r}'
        )
    return BOTTLENECKS[name], smoke is not None


def get_config(arg: str = '') -> ConfigDict:
    bottleneck, smoke = parse(arg)
    config = ConfigDict(
        {
            'seed': 0,
            'task': {
                'name': 'autoencoding',
                'reconstruction': 'l2',
                'kl_weight': 1e-4,
                'codebook_decay': 0.99,
                'commitment_weight': 0.25,
                'perceptual': 'none',
                'perceptual_weight': 1.0,
                'discriminator': 'none',
                'discriminator_optimizer': '',
                'discriminator_weight': 0.5,
                'discriminator_start': 1000,
            },
            'dataset': {'name': 'shapes', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
            'network': {
                'name': 'Autoencoder',
                'patch_size': 8,
                'base_channels': 128,
                'channel_multipliers': (1,),
                'num_res_blocks': 1,
                'num_groups': 8,
                **bottleneck,
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
                'num_steps': 3000,
                'batch_size': 16,
                'num_microbatches': 1,
                'log_every_steps': 50,
                'checkpoint_every_steps': 1000,
                'keep_checkpoints': 3,
                'ema': {'ema': 0.995},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1},
            'evaluation': {'num_samples': 2000, 'batch_size': 50, 'params': ''},
            'encoding': {'batch_size': 100, 'examples_per_shard': 2000},
        }
    )
    if smoke:
        config.dataset.name = 'digits'
        config.network.patch_size, config.network.channel_multipliers, config.network.base_channels = 1, (1, 2), 8
        config.task.discriminator, config.task.discriminator_start = 'patch_discriminator:base_channels=8,depth=1', 1
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.evaluation.num_samples, config.evaluation.batch_size = 24, 16
    return config
