"""U-Net: published counts, a residual block in NumPy, an exact translation symmetry, dropout, gradients.

The text-conditional one is in test_net_unet_text.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax.core.types import Model
from diffjax.nets import UNet, as_model, count_parameters
from diffjax.nets.layers import sinusoidal_embedding
from diffjax.nets.unet_blocks import ResidualBlock, Style, conv, num_groups
from diffjax.nets.unet_condition import sinusoids
from diffjax.training.flops import count_flops

TINY = dict(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_heads=2)  # noqa: C408
TINY |= {'num_classes': 5, 'out_channels': 3}
SHAPE = (3, 8, 8, 2)
STYLE = Style('float32', 'xla', 0.0, 0, 1e-5, 'scale_shift', 'linear')


@pytest.fixture
def batch(image_batch):
    return image_batch(SHAPE)


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(UNet(**(TINY | changes)))))


@pytest.fixture
def tiny(perturb, batch):
    """The tiny network with random weights, norms around one, nothing at zero."""
    model = _model()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *batch)

    def start(path, leaf):
        return jnp.full(leaf.shape, float('scale' in jax.tree_util.keystr(path)))

    return model, perturb(jax.tree_util.tree_map_with_path(start, shapes))


def _count_by_hand(base, multipliers, blocks, attention, size, channels, out_channels, classes):
    """The sum over layers of (weights + biases), from the list of channels that each block sees."""
    d = 4 * base

    def conv(a, b):
        return 9 * a * b + b

    def residual(a, b):
        skip = a * b + b if a != b else 0
        return 2 * a + conv(a, b) + (d * 2 * b + 2 * b) + 2 * b + conv(b, b) + skip

    def attend(a):
        return 2 * a + 4 * (a * a + a)

    widths = [base * m for m in multipliers]
    count = (base * d + d) + (d * d + d) + (classes + 1) * d * (classes > 0)
    count += conv(channels, widths[0]) + 2 * widths[0] + conv(widths[0], out_channels)
    kept, h = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        if level:
            count += conv(h, h)
            kept.append(h)
        for _ in range(blocks):
            count += residual(h, width) + attend(width) * (size >> level in attention)
            h = width
            kept.append(h)
    count += 2 * residual(h, h) + attend(h)
    for level in reversed(range(len(widths))):
        for _ in range(blocks + 1):
            count += residual(h + kept.pop(), widths[level]) + attend(widths[level]) * (size >> level in attention)
            h = widths[level]
        count += conv(h, h) * (level > 0)
    return count


@pytest.mark.parametrize(
    ('size', 'base', 'multipliers', 'blocks', 'attention', 'classes'),
    [(8, 32, [1, 2], 2, [4], 10), (32, 128, (1, 2, 2, 2), 3, (16, 8), 0), (32, 64, (2, 3, 4), 2, (16,), 1000)],
)
def test_parameter_count_equals_a_count_by_hand(size, base, multipliers, blocks, attention, classes):
    fields = {'channel_multipliers': multipliers, 'num_res_blocks': blocks, 'attention_resolutions': attention}
    model = as_model(UNet(base_channels=base, **fields, num_classes=classes, out_channels=6))
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32) if classes else None
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert count_parameters(params) == _count_by_hand(base, multipliers, blocks, attention, size, 3, 6, classes)
    assert jax.eval_shape(model.apply, params, *inputs).shape == (1, size, size, 6)


def test_groups_divide_and_hold_four_channels():
    assert [num_groups(c) for c in (2, 8, 16, 48, 128, 384, 1024)] == [1, 2, 4, 12, 32, 32, 32]
    for channels in range(1, 200):
        groups = num_groups(channels)
        assert channels % groups == 0 and groups <= 32 and (groups == 1 or channels // groups >= 4)


ADM = {'resampling': 'resnet', 'head_dim': 64, 'attention_resolutions': (32, 16, 8), 'null_label': False}
ADM |= {'num_classes': 1000, 'out_channels': 6}
PUBLISHED = {  # fields, size, and of the papers: parameters, and multiply-adds (Peebles & Xie 2023, table 4 and 5)
    'DDPM CIFAR-10': (
        {'base_channels': 128, 'channel_multipliers': (1, 2, 2, 2), 'num_heads': 1, 'num_groups': 32}
        | {'time_conditioning': 'additive', 'num_classes': 0, 'out_channels': 3},
        *(32, 35.7, None),
    ),
    'ADM 64': (
        ADM | {'base_channels': 192, 'channel_multipliers': (1, 2, 3, 4), 'num_res_blocks': 3},
        *(64, 296, None),
    ),
    'ADM 256': (ADM | {'base_channels': 256, 'channel_multipliers': (1, 1, 2, 2, 4, 4)}, 256, 554, 1120),
    'ADM 512': (ADM | {'base_channels': 256, 'channel_multipliers': (0.5, 1, 1, 2, 2, 4, 4)}, 512, 559, 1983),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name):
    fields, size, millions, giga = PUBLISHED[name]
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32) if fields['num_classes'] else None
    jaxpr, params = jax.make_jaxpr(as_model(UNet(**fields)).init, return_shape=True)(jax.random.key(0), *inputs)
    count = count_parameters(params)
    assert round(count / 1e6, 1 if millions < 100 else None) == millions
    if giga:
        assert count_flops(jaxpr) / 2e9 == pytest.approx(giga, rel=5e-4)


def _norm(h, layer, groups):
    h = h.reshape(*h.shape[:2], groups, -1)
    h = (h - h.mean((0, 1, 3), keepdims=True)) / np.sqrt(h.var((0, 1, 3), keepdims=True) + 1e-5)
    return h.reshape(*h.shape[:2], -1) * layer['scale'] + layer['bias']


def _conv(h, layer):
    (height, width, _), padded = h.shape, np.pad(h, ((1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    return sum(padded[i : i + height, j : j + width] @ layer['kernel'][i, j] for i, j in taps) + layer['bias']


def _silu(h):
    return h / (1 + np.exp(-h))


def _resized(h, resample):
    if resample == 'down':
        return (h[::2, ::2] + h[1::2, ::2] + h[::2, 1::2] + h[1::2, 1::2]) / 4
    return np.kron(h, np.ones((2, 2, 1))) if resample == 'up' else h


@pytest.mark.parametrize(
    ('features', 'conditioning', 'resample'),
    [(12, 'scale_shift', ''), (12, 'additive', ''), (8, 'scale_shift', 'down'), (8, 'additive', 'up')],
)
def test_residual_block_equals_an_independent_one(perturb, features, conditioning, resample):
    """Equations (1) to (3) in NumPy float64 for one image, the convolution as a sum of nine shifted products."""
    rng = np.random.default_rng(0)
    x, c = rng.standard_normal((2, 6, 4, 8)), rng.standard_normal((2, 6))
    x[1] = np.float32(1 + 3e-3 * x[1])  # a variance about as large as the 1e-5 added to it
    block = ResidualBlock(features, STYLE._replace(time_conditioning=conditioning), resample)
    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    params = perturb(jax.jit(block.init)(jax.random.key(0), *inputs)['params'])
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    expected = []
    for b in range(2):
        h = _conv(_resized(_silu(_norm(x[b], p['norm_in'], 2)), resample), p['conv_in'])
        told = c[b] @ p['modulation']['kernel'] + p['modulation']['bias']
        if conditioning == 'additive':
            h = _norm(h + told, p['norm_out'], features // 4)
        else:
            scale, shift = np.split(told, 2)
            h = _norm(h, p['norm_out'], features // 4) * (1 + scale) + shift
        skip = _resized(x[b], resample)
        if features != 8:
            skip = skip @ p['skip']['kernel'] + p['skip']['bias']
        expected.append(skip + _conv(_silu(h), p['conv_out']))
    got = jax.jit(block.apply)({'params': params}, *inputs)
    np.testing.assert_allclose(got, expected, atol=5e-4)


def test_sinusoids_are_the_published_ones():
    """ADM's is DiT's; DDPM's as in its appendix: sines first, and the lowest of h frequencies is 1 / 10000."""
    t, h = jnp.array([0.0, 3.5, 999.0]), 4
    chex.assert_trees_all_close(sinusoids(t, 2 * h, 'cos_sin'), sinusoidal_embedding(t, 2 * h), atol=1e-6)
    sines = [[np.sin(s * 10_000 ** (-i / (h - 1))) for i in range(h)] for s in np.asarray(t)]
    cosines = [[np.cos(s * 10_000 ** (-i / (h - 1))) for i in range(h)] for s in np.asarray(t)]
    np.testing.assert_allclose(sinusoids(t, 2 * h, 'sin_cos_to_end'), np.hstack([sines, cosines]), atol=1e-4)
    np.testing.assert_allclose(sinusoids(t, 2 * h, 'cos_sin_to_end'), np.hstack([cosines, sines]), atol=1e-4)
    cosines, sines = jnp.split(sinusoids(t, 2 * h, 'cos_sin'), 2, axis=-1)
    chex.assert_trees_all_equal(sinusoids(t, 2 * h, 'sin_cos'), jnp.concatenate([sines, cosines], axis=-1))


def test_with_central_taps_alone_it_commutes_with_shifts_by_its_stride(tiny, batch):
    """With every 3x3 kernel cut to its centre there is no padding, so a circular shift by the total stride commutes.

    Attention and group normalisation do not know where a pixel stands. A shift by less than the stride does not
    commute: the test sees the resampling.
    """
    model, params = tiny
    x, t, labels = batch
    centre = np.zeros((3, 3, 1, 1), np.float32)
    centre[1, 1] = 1
    params = jax.tree.map(lambda leaf: leaf * centre if leaf.ndim == 4 else leaf, params)
    out = model.apply(params, x, t, labels)
    shifted = model.apply(params, jnp.roll(x, (2, 4), (1, 2)), t, labels)
    scale = float(jnp.std(out))
    chex.assert_trees_all_close(shifted, jnp.roll(out, (2, 4), (1, 2)), atol=1e-4 * scale)
    half = model.apply(params, jnp.roll(x, 1, 1), t, labels)
    assert np.max(np.abs(half - jnp.roll(out, 1, 1))) > 0.1 * scale


def test_at_the_start_the_output_is_zero(batch):
    model = _model()
    params = model.init(jax.random.key(0), *batch)
    chex.assert_trees_all_equal(model.apply(params, *batch), jnp.zeros((3, 8, 8, 3)))


@pytest.mark.parametrize(
    ('shape', 'changes'),
    [((1, 8, 8, 1), {}), ((1, 32, 32, 2), {'channel_multipliers': [1, 2, 2], 'attention_resolutions': [16, 8]})],
)
def test_it_works_on_digits_and_on_32_pixels(shape, changes, image_batch):
    model = as_model(UNet(**(TINY | changes)))
    inputs = image_batch(shape)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    out = jax.eval_shape(model.apply, params, *inputs)
    assert (out.shape, out.dtype) == ((*shape[:3], 3), jnp.float32)
    names = [name for name in params if name.endswith('attention')]
    assert len(names) == (4 if shape[1] == 8 else 7)  # (down + up) blocks of the chosen sizes, and the middle


def test_patches_are_pixels_of_more_channels(perturb, image_batch):
    """The network on patches of 2 is the one on pixels, whose channels are the four pixels of a square, row by row."""
    x, t, labels = image_batch((2, 8, 8, 2))
    on_patches, on_pixels = _model(patch_size=2), _model(out_channels=12)
    params = perturb(on_patches.init(jax.random.key(0), x, t, labels))
    squares = jnp.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
    found = on_pixels.apply(params, squares, t, labels)
    wanted = jnp.zeros((2, 8, 8, 3))
    for place in range(4):
        wanted = wanted.at[:, place // 2 :: 2, place % 2 :: 2].set(found[..., 3 * place : 3 * place + 3])
    np.testing.assert_allclose(on_patches.apply(params, x, t, labels), wanted, atol=1e-5)


def test_samples_are_independent_and_every_input_matters(tiny, batch):
    model, params = tiny
    x, t, _ = batch
    labels = jnp.array([0, 1, 5])
    out = model.apply(params, x, t, labels)
    order = jnp.array([2, 0, 1])
    chex.assert_trees_all_close(model.apply(params, x[order], t[order], labels[order]), out[order], atol=1e-4)
    for other in ((x[order], t, labels), (x, t[order], labels), (x, t, labels[order])):
        change = np.abs(model.apply(params, *other) - out).max(axis=(1, 2, 3))
        assert np.all(change > 1e-2)


def test_skips_join_the_two_sides_last_in_first_out(tiny, batch):
    _, params = tiny
    inputs, outputs = {}, {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if len(context.module.path) == 1:
            inputs[context.module.name], outputs[context.module.name] = args[0], out
        return out

    def run(params):
        with nn.intercept_methods(record):
            UNet(**TINY).apply({'params': params}, *batch)
        return inputs, outputs

    seen, out = jax.jit(run)(params)
    for block, below, across in (
        ('up_1_0', 'middle_out', 'down_1_0_attention'),
        ('up_1_1', 'up_1_0_attention', 'down_1'),
        ('up_0_0', 'up_1', 'down_0_0'),
        ('up_0_1', 'up_0_0', 'conv_in'),
    ):
        chex.assert_trees_all_close(seen[block], jnp.concatenate([out[below], out[across]], axis=-1), atol=1e-5)


@jax.jit
def _gradient(params, batch):
    return jax.grad(lambda params: jnp.mean(_model().apply(params, *batch) ** 2))(params)


def test_gradients_reach_every_parameter(tiny, batch):
    gradient = _gradient(tiny[1], batch)
    size = {jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree_util.tree_leaves_with_path(gradient)}
    assert min(size.values()) > 1e-7, min(size, key=size.get)


def test_dropout_acts_with_a_key_alone(tiny, batch):
    plain, params = tiny
    dropped = _model(dropout=0.5).apply
    still = dropped(params, *batch)
    chex.assert_trees_all_equal(still, dropped(params, *batch))
    chex.assert_trees_all_close(still, plain.apply(params, *batch), atol=1e-5)
    one, again, other = (dropped(params, *batch, jax.random.key(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, again)
    for different in (still, other):
        assert np.max(np.abs(one - different)) > 1e-2


def test_bfloat16_computes_close_to_float32_and_keeps_float32_outside(tiny, batch):
    model, params = tiny
    half = _model(compute_dtype='bfloat16')
    assert all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), *batch))
    )
    out, half_out = model.apply(params, *batch), half.apply(params, *batch)
    assert half_out.dtype == jnp.float32
    error = np.linalg.norm(half_out - out) / np.linalg.norm(out)
    assert 1e-4 < error < 0.05


def test_group_norm_statistics_are_float32_under_bfloat16():
    """A large mean with a small spread: 16-bit statistics would lose the spread altogether."""
    x = (64 + jax.random.normal(jax.random.key(0), (1, 8, 8, 8))).astype(jnp.bfloat16)
    block = ResidualBlock(8, STYLE._replace(compute_dtype='bfloat16'))
    c = jnp.zeros((1, 4))
    params = jax.jit(block.init)(jax.random.key(1), x, c)
    _, kept = jax.jit(functools.partial(block.apply, capture_intermediates=True))(params, x, c)
    normed = kept['intermediates']['norm_in']['__call__'][0]
    groups = np.asarray(x, np.float64).reshape(64, 2, 4)
    expected = (groups - groups.mean((0, 2), keepdims=True)) / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-5)
    assert normed.dtype == jnp.float32
    np.testing.assert_allclose(normed, expected.reshape(1, 8, 8, 8), atol=1e-3)


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_equals_none_and_recomputes(tiny, batch, remat):
    model, params = tiny
    saving = as_model(UNet(**TINY, remat=remat))

    def program(model):
        return jax.make_jaxpr(jax.grad(lambda params: jnp.mean(model.apply(params, *batch) ** 2)))(params)

    assert count_flops(program(saving)) > count_flops(program(model)) and 'remat' in str(program(saving))
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(saving.apply(params, *batch) ** 2)))(params)
    chex.assert_trees_all_close(gradient, _gradient(params, batch), atol=1e-5, rtol=1e-4)


FIELDS = [
    {'resampling': 'resnet', 'middle_attention': 'plain', 'num_heads': [1, 2]},
    {'resampling': 'pool', 'middle_attention': 'none', 'attention_resolutions': [], 'attention_levels': [0]},
    {'downsample_zeros': 'end', 'null_label': False, 'num_groups': 4, 'head_dim': 8},
]


@pytest.mark.parametrize('changes', FIELDS)
def test_fields_make_the_layers_that_they_name(changes, batch):
    model = as_model(UNet(**(TINY | changes)))
    params = jax.eval_shape(model.init, jax.random.key(0), *batch)
    attention = [name for name in params if name.endswith('attention')]
    if changes.get('resampling') == 'resnet':
        assert params['down_1'].keys() == params['up_1'].keys() == params['middle_in'].keys()
        assert 'norm' in params['down_1_0_attention'] and 'norm' not in params['middle_attention']
    elif changes.get('resampling') == 'pool':
        assert 'down_1' not in params and 'up_1' not in params
        assert sorted(attention) == ['down_0_0_attention', 'up_0_0_attention', 'up_0_1_attention']
    else:
        assert params['down_1'].keys() == {'kernel', 'bias'}
        assert params['condition']['label']['table']['embedding'].shape[0] == 5
    assert jax.eval_shape(model.apply, params, *batch).shape == (3, 8, 8, 3)


def test_zeros_at_the_end_move_the_convolution_by_a_pixel():
    """With stride 2, zeros 'both' sides centre output i on pixel 2 i, and zeros at the 'end' on pixel 2 i + 1."""
    x = jax.random.normal(jax.random.key(0), (1, 8, 6, 2))
    for sides, first in (('both', 0), ('end', 1)):
        layer = conv(2, 'float32', None, stride=2, sides=sides)
        kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
        out = layer.apply({'params': {'kernel': kernel, 'bias': jnp.zeros(2)}}, x)
        chex.assert_trees_all_equal(out, x[:, first::2, first::2])


def test_it_learns_the_digits(learn_digits):
    losses = learn_digits(_model(num_classes=10, out_channels=1, dropout=0.1))
    assert losses[0] == 1 and np.mean(losses[-10:]) < 0.6


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention': 'flash'}, "attention='flash' is not known; choose one of 'auto', 'xla', 'cudnn'"),
        ({'compute_dtype': 'half'}, "compute_dtype='half' is not known"),
        ({'channel_multipliers': ()}, 'channel_multipliers is empty'),
        ({'base_channels': 7}, 'base_channels=7 must be even'),
        ({'resampling': 'fir'}, "resampling='fir' is not known; choose one of 'conv', 'resnet', 'pool'"),
        ({'sinusoids': 'sin'}, "sinusoids='sin' is not known"),
        ({'num_heads': [1, 2, 4]}, r'num_heads=\(1, 2, 4\) must be a positive number, or 2, one for each level'),
        ({'transformer_depth': 0}, 'transformer_depth=0 must be a positive number, or 2'),
        ({'attention_levels': [2]}, 'there is no level 2; the 2 levels count from 0'),
        ({'num_groups': 16}, 'num_groups=16 does not divide the 8 channels'),
        ({'patch_size': 0}, 'patch_size=0 must be positive'),
        ({'pooled_size': 4}, 'pooled_size=4 needs text_size > 0'),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(**(TINY | changes))


def test_wrong_shapes_are_refused(batch):
    t, labels = jnp.zeros(1), jnp.zeros(1, jnp.int32)

    def init(shape, **changes):
        jax.eval_shape(as_model(UNet(**(TINY | changes))).init, jax.random.key(0), jnp.zeros(shape), t, labels)

    with pytest.raises(ValueError, match=r'multiples of 2 \(patch_size 1, .* has 2 levels, 1 halvings\), got 8x7'):
        init((1, 8, 7, 2))
    with pytest.raises(ValueError, match=r'multiples of 4 \(patch_size 2, .* has 2 levels, 1 halvings\), got 8x6'):
        init((1, 8, 6, 2), patch_size=2)
    with pytest.raises(ValueError, match=r'UNet takes x of shape \[B, H, W, C\], got \(8, 8\)'):
        init((8, 8))
    with pytest.raises(ValueError, match='3 heads do not divide the 16 channels of level 1'):
        init((1, 8, 8, 2), num_heads=3)
    with pytest.raises(ValueError, match='head_dim=5 do not divide'):
        init((1, 8, 8, 2), head_dim=5)
