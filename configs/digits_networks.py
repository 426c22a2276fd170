"""Other networks on the UCI handwritten digits, with the recipe of configs/digits.py: minutes on two CPU cores.

Networks that look at text learn what the tokens of each digit's text would be.

Arguments, with commas between them:
  network=pixart  one of `NETWORKS`
  smoke           seconds, to see that everything runs
"""

from ml_collections import ConfigDict

TOKENS = {'patch_size': 2, 'hidden_size': 96, 'num_heads': 4}
NETWORKS = {  # name: (network, its changes for smoke)
    'lightning': (
        {'name': 'DiT', **TOKENS, 'depth': 4, 'norm': 'rms', 'mlp': 'swiglu', 'positions': 'both', 'qk_norm': 'rms'},
        {'hidden_size': 32, 'depth': 2},
    ),
    'flux': (
        {
            'name': 'Flux',
            'hidden_size': 96,
            'depth': 2,
            'single_depth': 4,
            'num_heads': 4,
            'rope_sizes': (8, 8, 8),
            'text_size': 32,
            'pooled_size': 32,
        },
        {'hidden_size': 32, 'depth': 1, 'single_depth': 1, 'rope_sizes': (2, 2, 4)},
    ),
    'mmdit': (
        {
            'name': 'MMDiT',
            **TOKENS,
            'depth': 4,
            'qk_norm': 'rms',
            'text_size': 32,
            'pooled_size': 32,
            'pos_embed_max_size': 4,
            'pos_embed_base_size': 4,
        },
        {'hidden_size': 32, 'depth': 2},
    ),
    'pixart': (
        {'name': 'PixArt', **TOKENS, 'depth': 4, 'text_size': 32, 'base_size': 4},
        {'hidden_size': 32, 'depth': 2},
    ),
    'unet': (
        {
            'name': 'UNet',
            'base_channels': 32,
            'channel_multipliers': (1, 2),
            'num_res_blocks': 1,
            'attention_resolutions': (),
            'attention_levels': (1,),
            'time_conditioning': 'additive',
            'head_dim': 16,
            'text_size': 32,
        },
        {'base_channels': 8, 'head_dim': 8},
    ),
    'uvit': (
        {'name': 'UViT', **TOKENS, 'depth': 5},
        {'hidden_size': 32, 'depth': 3},
    ),
}


def get_config(arg: str = '') -> ConfigDict:
    given = dict(part.partition('=')[::2] for part in arg.split(',') if part)
    network, smoke = given.pop('network', 'pixart'), given.pop('smoke', None)
    if given or smoke not in (None, '') or network not in NETWORKS:
        raise ValueError(
            f'configs/digits_networks.py takes network={"|".join(NETWORKS)} and smoke, such as network=uvit,smoke; '
            f'got {arg!r}'
        )
    network, smaller = NETWORKS[network]
    config = ConfigDict(
        {
            'seed': 0,
            'dataset': {'name': 'digits', 'split': 'train', 'test_split': 'test', 'data_dir': '', 'flip': False},
            'network': dict(network),
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
            'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'rules': ()},
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
    if smoke is not None:
        config.network.update(smaller)
        config.training.num_steps, config.training.batch_size = 4, 16
        config.training.log_every_steps, config.training.checkpoint_every_steps = 2, 2
        config.optimizer.warmup_steps = 1
        config.sampler.num_steps, config.sampler.batch_size = 3, 40
        config.evaluation.num_samples = 40
    return config
