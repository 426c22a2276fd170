"""A variational autoencoder on the UCI handwritten digits: a baseline for configs/digits.py. Minutes on two CPU cores.

Arguments: smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/digits_vae.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'task': {
                'name': 'variational',
                'encoder': {'name': 'PictureEncoder', 'hidden_size': 256, 'depth': 2},
                'likelihood': 'gaussian',
                'std': 0.0,
                'beta': 1.0,
                'samples': 'mean',
            },
            'dataset': {'name': 'digits', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
            'network': {'name': 'PictureGenerator', 'latent_size': 32, 'hidden_size': 256, 'depth': 2},
            'optimizer': {
                'name': 'adam',
                'learning_rate': 1e-3,
                'decay': 'cosine',
                'warmup_steps': 100,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 20000,
                'batch_size': 64,
                'num_microbatches': 1,
                'log_every_steps': 200,
                'checkpoint_every_steps': 5000,
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
        config.network.hidden_size, config.task.encoder.hidden_size = 32, 32
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.batch_size, config.evaluation.num_samples = 40, 40
    return config
