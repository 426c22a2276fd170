"""A space-time U-Net on the embedded moving digits: clips of 16 frames of 32 x 32, made whole.

Under half an hour on two CPU cores.

Arguments: smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/video_digits.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {
                'name': 'moving_digits',
                'split': 'train',
                'test_split': 'test',
                'data_dir': '',
                'flip': False,
                'num_frames': 0,
                'frame_strides': (1,),
                'image_fraction': 0.0,
            },
            'network': {
                'name': 'SpaceTimeUNet',
                'base_channels': 16,
                'channel_multipliers': (1, 2, 4),
                'num_res_blocks': 1,
                'attention_resolutions': (8,),
                'num_heads': 4,
                'temporal_downsampling': (1, 2),
                'temporal_kernel': 3,
                'temporal_attention': 1,
                'frame_rate_frequencies': 0,
                'dropout': 0.0,
                'compute_dtype': 'float32',
            },
            'schedule': 'flow',
            'target': 'velocity',
            'times': 'uniform',
            'weight': 'target',
            'learned_variance': False,
            'label_drop': 0.1,
            'optimizer': {
                'name': 'adam',
                'learning_rate': 2e-3,
                'decay': 'cosine',
                'warmup_steps': 100,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 4000,
                'batch_size': 16,
                'num_microbatches': 1,
                'log_every_steps': 50,
                'checkpoint_every_steps': 500,
                'keep_checkpoints': 2,
                'ema': {'ema': 0.998},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1, 'sequence': 1},
            'sampler': {
                'solver': 'dpmpp_2m',
                'grid': 'uniform',
                'num_steps': 20,
                'guidance': 1.0,
                'params': '',
                'batch_size': 50,
                'frame_rate': 0.0,
            },
            'evaluation': {'num_samples': 200, 'classifier': 'none', 'noise_levels': 10, 'features': 'pixels'},
        }
    )
    if arg == 'smoke':
        config.dataset.split, config.dataset.test_split = 'train[:64]', 'test[:16]'
        config.network.base_channels, config.network.channel_multipliers = 8, (1, 2)
        config.network.temporal_downsampling = (1,)
        config.training.num_steps, config.training.batch_size = 4, 8
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.num_steps, config.sampler.batch_size = 3, 16
        config.evaluation.num_samples, config.evaluation.noise_levels = 16, 2
    return config
