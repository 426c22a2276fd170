"""The KL autoencoder of latent diffusion on ImageNet 256 (Rombach et al. 2022, table 8), in Stable Diffusion's layout.

Trains one, or stands for a published one: python -m diffjax.weights import VAE --out=weights/vae, then

  python -m diffjax.main --mode=encode --config=configs/autoencoder_kl.py --workdir=runs/vae \
      --config.training.init_from=weights/vae --config.network.latent_scale=0.18215

Arguments, with commas between them:
  factor=8      4, 8 or 16: by which sides shrink
  channels=4    4, 8 or 16: of the latents
  smoke         seconds, to see that everything runs, on the embedded digits
"""

from ml_collections import ConfigDict

LEVELS = {4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4)}
CHANNELS = (4, 8, 16)


def parse(arg: str) -> tuple[int, int, bool]:
    """(factor, channels, smoke)."""
    given = dict(part.partition('=')[::2] for part in arg.split(',') if part)
    factor, channels, smoke = given.pop('factor', '8'), given.pop('channels', '4'), given.pop('smoke', None)
    known = factor in map(str, LEVELS) and channels in map(str, CHANNELS)
    if given or smoke not in (None, '') or not known:
        raise ValueError(
            'configs/autoencoder_kl.py takes factor=4|8|16, channels=4|8|16 and smoke, such as factor=16,channels=16; '
            f'got {arg!r}'
        )
    return int(factor), int(channels), smoke is not None


def get_config(arg: str = '') -> ConfigDict:
    factor, channels, smoke = parse(arg)
    config = ConfigDict(
        {
            'seed': 0,
            'task': {
                'name': 'autoencoding',
                'reconstruction': 'l1',
                'kl_weight': 1e-6,
                'perceptual': 'none',  # the paper's: lpips:weights=PATH
                'perceptual_weight': 1.0,
                'discriminator': 'patch_discriminator:base_channels=64,depth=3',
                'discriminator_optimizer': '',
                'discriminator_weight': 0.5,
                'discriminator_start': 50_000,
            },
            'dataset': {
                'name': 'imagenet2012',
                'split': 'train',
                'test_split': 'validation',
                'data_dir': '',
                'resolution': 256,
                'flip': True,
            },
            'network': {
                'name': 'Autoencoder',
                'bottleneck': 'kl',
                'latent_channels': channels,
                'base_channels': 128,
                'channel_multipliers': LEVELS[factor],
                'num_res_blocks': 2,
                'attention_levels': (4,) if factor == 16 else (),
                'pointwise': True,
                'num_groups': 32,
                'latent_scale': 1.0,
                'latent_shift': 0.0,
                'compute_dtype': 'bfloat16',
            },
            'optimizer': {
                'name': 'adam',
                'learning_rate': 5.4e-5,
                'decay': 'constant',
                'warmup_steps': 0,
                'b1': 0.5,
                'b2': 0.9,
            },
            'training': {
                'num_steps': 250_000,
                'batch_size': 96,
                'num_microbatches': 1,
                'log_every_steps': 100,
                'checkpoint_every_steps': 5000,
                'keep_checkpoints': 3,
                'ema': {'ema': 0.9999},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1},
            'evaluation': {'num_samples': 2000, 'batch_size': 64, 'params': ''},
            'encoding': {'batch_size': 64, 'examples_per_shard': 10_000, 'mirrored': False, 'on_corrupt': 'error'},
        }
    )
    if smoke:
        config.dataset.name, config.dataset.test_split, config.dataset.resolution = 'digits', 'test', 2 * factor
        config.network.base_channels, config.network.num_groups, config.network.num_res_blocks = 8, 4, 1
        config.network.compute_dtype = 'float32'
        config.task.discriminator, config.task.discriminator_start = 'patch_discriminator:base_channels=8,depth=1', 1
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.evaluation.num_samples, config.evaluation.batch_size = 24, 16
        config.encoding.batch_size, config.encoding.examples_per_shard = 64, 500
    return config
