"""A generative adversarial network on the UCI handwritten digits: a baseline for configs/digits.py. Minutes on two CPU
cores.

Arguments: smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/digits_gan.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'task': {
                'name': 'adversarial',
                'discriminator': {'name': 'PictureEncoder', 'hidden_size': 256, 'depth': 2},
                'discriminator_optimizer': '',  # '': the generator's
                'game': 'relativistic',
                'r1_weight': 1.0,
                'r2_weight': 1.0,
            },
            'dataset': {'name': 'digits', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
            'network': {'name': 'PictureGenerator', 'latent_size': 32, 'hidden_size': 256, 'depth': 2},
            'optimizer': {
                'name': 'adam',
                'learning_rate': 1e-3,
                'decay': 'cosine',
                'warmup_steps': 100,
                'b1': 0.0,
                'b2': 0.99,
            },
            'training': {
                'num_steps': 12000,
                'batch_size': 64,
                'num_microbatches': 1,
                'log_every_steps': 200,
                'checkpoint_every_steps': 4000,
                'keep_checkpoints': 3,
                'ema': {'ema': 0.999},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1},
            'sampler': {'params': '', 'batch_size': 480},
            'evaluation': {
                'num_samples': 1437,
                'classifier': 'svc',
                'features': 'pixels',
                'inception_weights': '',
                'reference': '',
            },
        }
    )
    if arg == 'smoke':
        config.network.hidden_size, config.task.discriminator.hidden_size = 32, 32
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.batch_size, config.evaluation.num_samples = 40, 40
    return config
