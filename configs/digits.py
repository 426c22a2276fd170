"""A flow DiT on the UCI handwritten digits: minutes on two CPU cores.

Arguments: smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/digits.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {'name': 'digits', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
            'network': {
                'name': 'DiT',
                'patch_size': 2,
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
                'batch_size': 480,
            },
            'evaluation': {
                'num_samples': 1437,
                'classifier': 'svc',
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
        config.network.hidden_size, config.network.depth = 32, 2
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.num_steps, config.sampler.batch_size = 3, 40
        config.evaluation.num_samples = 40
    return config
