"""A video DiT on the embedded moving shapes: clips of 16 frames of 32 x 32 in colour, by class.

It learns from single frames too, an eighth of each batch, and at two frame rates: 8 frames, of which every one or every
second one of the dataset's 16. `--config.sampler.frame_rate=4` draws the faster motion.

Arguments: smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/video_shapes.py takes the argument smoke, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {
                'name': 'moving_shapes',
                'split': 'train',
                'test_split': 'test',
                'data_dir': '',
                'flip': False,
                'num_frames': 8,
                'frame_strides': (1, 2),
                'image_fraction': 0.125,
            },
            'network': {
                'name': 'VideoDiT',
                'patch_size': 4,
                'temporal_patch_size': 1,
                'hidden_size': 128,
                'depth': 6,
                'num_heads': 4,
                'space_time': 'factorised',
                'frame_rate_frequencies': 64,
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
                'name': 'adam',
                'learning_rate': 1e-3,
                'decay': 'cosine',
                'warmup_steps': 100,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 2700,
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
        config.network.hidden_size, config.network.depth, config.network.patch_size = 16, 1, 8
        config.network.num_heads = 2
        config.training.num_steps, config.training.batch_size = 4, 8
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.num_steps, config.sampler.batch_size = 3, 16
        config.evaluation.num_samples, config.evaluation.noise_levels = 16, 2
    return config
