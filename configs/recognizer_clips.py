"""A network that recognises clips of the embedded moving digits: its features measure others. Minutes on two CPU cores.

It made diffjax/weights/moving_digits_recognizer.safetensors:

  python -m diffjax.main --config=configs/recognizer_clips.py --workdir=runs/recognizer
  cp runs/recognizer/recognizer.safetensors diffjax/weights/moving_digits_recognizer.safetensors

Arguments: shapes (of the moving shapes), smoke (seconds, to see that everything runs).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    words = arg.split(',') if arg else []
    if wrong := [word for word in words if word not in ('shapes', 'smoke')]:
        raise ValueError(f'configs/recognizer_clips.py takes the arguments shapes and smoke, got {wrong[0]!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'task': {'name': 'recognition', 'questions': 'flights', 'choice_weight': 4.0},
            'dataset': {
                'name': 'moving_digits',
                'split': 'train',
                'test_split': 'test',
                'data_dir': '',
                'flip': False,
            },
            'network': {
                'name': 'ClipRecognizer',
                'channels': (16, 32, 64),
                'temporal_channels': (64, 64),
                'num_groups': 8,
                'first_stride': 2,
            },
            'optimizer': {
                'name': 'muon',
                'learning_rate': 1e-2,
                'adam_learning_rate': 3e-3,
                'decay': 'cosine',
                'warmup_steps': 50,
                'clip_norm': 1.0,
            },
            'training': {
                'num_steps': 1000,
                'batch_size': 32,
                'num_microbatches': 1,
                'log_every_steps': 50,
                'checkpoint_every_steps': 1000,
                'keep_checkpoints': 2,
                'ema': {'ema': 0.99},
                'init_from': '',
            },
            'mesh': {'data': -1, 'fsdp': 1},
            'evaluation': {'num_samples': 1000, 'batch_size': 100, 'params': ''},
        }
    )
    if 'shapes' in words:
        config.task.questions, config.dataset.name = 'plays', 'moving_shapes'
    if 'smoke' in words:
        config.dataset.split, config.dataset.test_split = 'train[:64]', 'test[:24]'
        config.network.channels, config.network.temporal_channels = (8, 16), (16,)
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.evaluation.num_samples, config.evaluation.batch_size = 24, 16
    return config
