"""EDM2 on ImageNet 512 latents with the published recipe (Karras et al. 2024, arXiv:2312.02696, table 6).

Arguments, with commas between them:
  model=S       XS, S, M, L, XL or XXL
  digits        a small network on the embedded digits: minutes on two CPU cores
  smoke         the same, in seconds

The latents are a dataset of their own: `python -m diffjax.data prepare imagenet512_latents --manual_dir=DIR`. The paper
brings each of their channels to mean 0 and standard deviation 0.5; here they are scaled alike, to 0.5 overall.
Two averages are tracked; after training --mode=ema --sigma_rel=0.13,0.085 makes any other from their snapshots.
"""

from ml_collections import ConfigDict

SIZES = {  # channels, peak learning rate, dropout, thousands of 1024 steps
    'XS': (128, 0.0120, 0.0, 1024),
    'S': (192, 0.0100, 0.0, 1024),
    'M': (256, 0.0090, 0.1, 1024),
    'L': (320, 0.0080, 0.1, 896),
    'XL': (384, 0.0070, 0.1, 640),
    'XXL': (448, 0.0065, 0.1, 448),
}


def parse(arg: str) -> tuple[tuple[int, float, float, int], bool, bool]:
    """((channels, learning rate, dropout, length), digits, smoke)."""
    given = dict(part.partition('=')[::2] for part in arg.split(',') if part)
    model, digits, smoke = given.pop('model', 'S'), given.pop('digits', None), given.pop('smoke', None)
    if given or {digits, smoke} - {None, ''} or model not in SIZES:
        right = f'model={"|".join(SIZES)}, digits and smoke, such as model=XS'
        raise ValueError(f'configs/edm2.py takes {right}; got {arg!r}')
    return SIZES[model], digits is not None or smoke is not None, smoke is not None


def get_config(arg: str = '') -> ConfigDict:
    (channels, learning_rate, dropout, length), digits, smoke = parse(arg)
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {
                'name': 'imagenet512_latents',
                'split': 'train',
                'test_split': '',
                'data_dir': '',
                'flip': False,
                'latent_scale': 0.5 * 0.18215,
            },
            'network': {
                'name': 'EDM2',
                'base_channels': channels,
                'channel_multipliers': (1, 2, 3, 4),
                'num_blocks': 3,
                'attention_resolutions': (16, 8),
                'head_channels': 64,
                'dropout': dropout,
                'uncertainty_channels': 128,
                'compute_dtype': 'bfloat16',
                'attention': 'auto',
                'remat': 'none',
            },
            'schedule': 'edm',
            'target': 'edm',
            'times': 'log_normal_sigma:mean=-0.4,std=1.0',
            'weight': 'edm',
            'learned_variance': False,
            'label_drop': 0.0,
            'optimizer': {
                'name': 'adam',
                'learning_rate': learning_rate,
                'decay': 'rsqrt',
                'warmup_steps': 4883,  # ten million images
                'reference_steps': 70_000,
                'b2': 0.99,
            },
            'training': {
                'num_steps': length * 1024,
                'batch_size': 2048,
                'num_microbatches': 1,
                'log_every_steps': 100,
                'checkpoint_every_steps': 4096,
                'keep_checkpoints': 3,
                'ema': {'narrow': 'power:sigma_rel=0.05', 'wide': 'power:sigma_rel=0.10'},
                'ema_snapshot_every_steps': 4096,
                'init_from': '',
            },
            'first_stage': {'workdir': ''},  # of the autoencoder that decodes samples, trained or imported
            'mesh': {'data': -1, 'fsdp': 1},
            'sampler': {
                'solver': 'heun:coordinate=sigma/alpha',
                'grid': 'karras',
                'num_steps': 32,
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
                'batch_size': 64,
            },
            'evaluation': {
                'num_samples': 64,
                'classifier': 'none',
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
    if digits:
        config.dataset.name, config.dataset.test_split = 'digits', 'test'
        config.network.base_channels, config.network.channel_multipliers = 16, (1, 2)
        config.network.num_blocks, config.network.attention_resolutions = 1, (4,)
        config.network.head_channels, config.network.dropout, config.network.compute_dtype = 16, 0.0, 'float32'
        config.optimizer.learning_rate = 0.02
        config.optimizer.warmup_steps, config.optimizer.reference_steps = 50, 500
        config.training.num_steps, config.training.batch_size = 3000, 64
        config.training.log_every_steps, config.training.checkpoint_every_steps = 50, 500
        config.training.ema_snapshot_every_steps = 100
        config.sampler.num_steps, config.sampler.batch_size = 18, 480
        config.evaluation.num_samples, config.evaluation.classifier = 1437, 'svc'
    if smoke:
        config.network.channel_multipliers = (1,)
        config.optimizer.warmup_steps, config.optimizer.reference_steps = 1, 2
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.training.ema_snapshot_every_steps = 2
        config.sampler.num_steps, config.sampler.batch_size = 4, 40
        config.evaluation.num_samples, config.evaluation.classifier = 40, 'none'
    return config
