"""A space-time U-Net on the embedded moving digits: clips of 16 frames of 32 x 32, made whole.

Half an hour on two CPU cores; its steps are as many as fit.

Arguments: network=dit (a video DiT, twice as many steps in the same time), smoke (seconds, to see that it runs).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    words = arg.split(',') if arg else []
    if wrong := [word for word in words if word not in ('network=dit', 'smoke')]:
        raise ValueError(f'configs/video_digits.py takes the arguments network=dit and smoke, got {wrong[0]!r}')
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
                'num_steps': 1300,
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
    if 'network=dit' in words:
        config.network = ConfigDict(
            {
                'name': 'VideoDiT',
                'patch_size': 4,
                'temporal_patch_size': 2,
                'hidden_size': 128,
                'depth': 6,
                'num_heads': 4,
                'space_time': 'factorised',
                'frame_rate_frequencies': 0,
                'scan_layers': False,
                'remat': 'none',
                'compute_dtype': 'float32',
            }
        )
        config.training.num_steps, config.optimizer.learning_rate = 2700, 1e-3
    if 'smoke' in words:
        config.dataset.split, config.dataset.test_split = 'train[:64]', 'test[:16]'
        if 'network=dit' in words:
            config.network.hidden_size, config.network.depth, config.network.num_heads = 16, 1, 2
        else:
            config.network.base_channels, config.network.channel_multipliers = 8, (1, 2)
            config.network.temporal_downsampling = (1,)
        config.training.num_steps, config.training.batch_size = 4, 8
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.num_steps, config.sampler.batch_size = 3, 16
        config.evaluation.num_samples, config.evaluation.noise_levels = 16, 2
    return config
