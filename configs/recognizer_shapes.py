"""A network that recognises the embedded shapes, whose features measure pictures of them: minutes on two CPU cores.

It made diffjax/weights/shapes_recognizer.safetensors:

  python -m diffjax.main --config=configs/recognizer_shapes.py --workdir=runs/recognizer
  cp runs/recognizer/recognizer.safetensors diffjax/weights/shapes_recognizer.safetensors

Four combinations of shape and colour occur in the test split alone. Half of it is trained on for their sake, and the
other half held out; so few examples do not suffice to name them, and the report gives their F1 apart.

Argument:
  smoke   seconds, to see that everything runs, on the classes of the embedded digits
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'smoke'):
        raise ValueError(f'configs/recognizer_shapes.py takes the argument smoke or none, got {arg!r}')
    config = ConfigDict(
        {
            'seed': 0,
            'task': {'name': 'recognition', 'questions': 'scenes', 'choice_weight': 4.0},
            'dataset': {
                'name': 'shapes',
                'split': 'train+test[:50%]',
                'test_split': 'test[50%:]',
                'data_dir': '',
                'flip': False,
            },
            'network': {
                'name': 'Recognizer',
                'channels': (32, 64, 96, 128),
                'num_groups': 8,
                'first_stride': 2,
                'coordinates': True,
            },
            'optimizer': {
                'name': 'adamw',
                'learning_rate': 3e-3,
                'decay': 'cosine',
                'warmup_steps': 100,
                'weight_decay': 0.02,
                'clip_norm': None,
            },
            'training': {
                'num_steps': 1600,
                'batch_size': 64,
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
    if arg == 'smoke':
        config.task.questions = 'classes'
        config.dataset.name, config.dataset.split, config.dataset.test_split = 'digits', 'train', 'test'
        config.network.channels = (8, 16)
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.evaluation.num_samples, config.evaluation.batch_size = 24, 16
    return config
