"""A space-time U-Net on the embedded moving digits: clips of 16 frames of 32 x 32, made whole.

On two CPU cores: about 30 minutes of training, and then the figures of 100 clips.

Arguments: network=dit (a video DiT), latent (a video DiT in the latents of a causal autoencoder, which is trained
first: clips of 13 frames), smoke (seconds, to see that it runs).
"""

from ml_collections import ConfigDict

DIT = {
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


def autoencoder(dataset: dict) -> dict:
    """The config of the first stage: 13 x 32 x 32 x 1 pixels to 7 x 4 x 4 x 16 latents."""
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
        'dataset': dataset,
        'network': {
            'name': 'Autoencoder',
            'bottleneck': 'kl',
            'latent_channels': 16,
            'patch_size': 4,
            'base_channels': 48,
            'channel_multipliers': (1, 2),
            'num_res_blocks': 1,
            'num_groups': 8,
            'frames': 3,
            'temporal_downsampling': (0,),
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
            'num_steps': 700,
            'batch_size': 16,
            'num_microbatches': 1,
            'log_every_steps': 50,
            'checkpoint_every_steps': 500,
            'keep_checkpoints': 2,
            'ema': {'ema': 0.995},
            'init_from': '',
        },
        'mesh': {'data': -1, 'fsdp': 1},
        'evaluation': {'num_samples': 1000, 'batch_size': 50, 'params': ''},
        'encoding': {'batch_size': 50, 'examples_per_shard': 2000},
    }


def get_config(arg: str = '') -> ConfigDict:
    words = arg.split(',') if arg else []
    if wrong := [word for word in words if word not in ('network=dit', 'latent', 'smoke')]:
        raise ValueError(f'configs/video_digits.py takes the arguments network=dit, latent and smoke, got {wrong[0]!r}')
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
                'patch_size': 2,
                'base_channels': 32,
                'channel_multipliers': (1, 2, 4),
                'num_res_blocks': 1,
                'attention_resolutions': (4,),
                'num_heads': 4,
                'temporal_downsampling': (1,),
                'temporal_kernel': 3,
                'temporal_attention': 2,
                'attention_over': 'space_time',
                'frame_rate_frequencies': 0,
                'dropout': 0.0,
                'compute_dtype': 'float32',
            },
            'schedule': 'flow',
            'target': 'velocity',
            # What a clip shows is decided while there is much noise: its 16 frames drown later than one of them would.
            'times': {'name': 'LogitNormal', 'mean': 1.0, 'std': 1.2},
            'weight': 'target',
            'learned_variance': False,
            'label_drop': 0.1,
            'optimizer': {
                'name': 'muon',
                'learning_rate': 1e-2,
                'adam_learning_rate': 2e-3,
                'decay': 'cosine',
                'warmup_steps': 50,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 2000,
                'batch_size': 8,
                'num_microbatches': 1,
                'log_every_steps': 50,
                'checkpoint_every_steps': 500,
                'keep_checkpoints': 2,
                'ema': {'ema': 0.995},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1, 'sequence': 1},
            'sampler': {
                # Frames that have decided apart are brought together by noise anew at each step.
                'solver': 'ddpm',
                'grid': 'shifted:shift=8',
                'num_steps': 60,
                'guidance': 5.0,
                'threshold': 1.0,
                'params': '',
                'batch_size': 50,
                'frame_rate': 0.0,
            },
            'evaluation': {
                'num_samples': 100,
                'classifier': 'none',
                'noise_levels': 10,
                'features': 'pixels',
                'clip_features': 'recognizer',
            },
        }
    )
    if 'network=dit' in words:
        config.network = ConfigDict(DIT)
        config.training.num_steps, config.training.batch_size = 1700, 16
        config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 8e-3, 1e-3
    if 'latent' in words:
        config.dataset.num_frames, config.sampler.threshold = 13, 0.0
        first = autoencoder(config.dataset.to_dict())
        config.first_stage = ConfigDict({'config': first, 'workdir': '', 'encode': 'once', 'batch_size': 50})
        config.network = ConfigDict(DIT | {'patch_size': 1, 'temporal_patch_size': 1})
        config.training.num_steps, config.training.batch_size = 2700, 16
        config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 8e-3, 1e-3
    if 'smoke' in words:
        config.dataset.split, config.dataset.test_split = 'train[:64]', 'test[:16]'
        if 'latent' in words:
            _shrink_first_stage(config)
        if config.network.name == 'VideoDiT':
            config.network.hidden_size, config.network.depth, config.network.num_heads = 16, 1, 2
        else:
            config.network.base_channels, config.network.channel_multipliers, config.network.num_heads = 8, (1, 2), 2
            config.network.temporal_downsampling = (1,)
        config.training.num_steps, config.training.batch_size = 4, 8
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.num_steps, config.sampler.batch_size = 3, 16
        config.evaluation.num_samples, config.evaluation.noise_levels = 16, 2
    return config


def _shrink_first_stage(config: ConfigDict) -> None:
    """That of `smoke`, which encodes each batch: datasets of latents are made of whole splits."""
    first, config.first_stage.encode = config.first_stage.config, 'each_step'
    first.dataset.split, first.dataset.test_split = config.dataset.split, config.dataset.test_split
    first.network.base_channels, first.evaluation.num_samples, first.evaluation.batch_size = 8, 16, 8
    first.training.num_steps, first.training.batch_size = 4, 8
    first.training.log_every_steps, first.training.checkpoint_every_steps = 2, 2
    first.optimizer.warmup_steps = 1
