"""U-Net: a count by hand, a residual block in NumPy, an exact translation symmetry, dropout, gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax.core.types import Model
from diffjax.nets import UNet, as_model, count_parameters
from diffjax.nets.unet import ResidualBlock, num_groups

TINY = dict(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_heads=2)  # noqa: C408
TINY |= {'num_classes': 5, 'out_channels': 3}
SHAPE = (3, 8, 8, 2)


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
    count += conv(channels, base) + 2 * base * multipliers[0] + conv(base * multipliers[0], out_channels)
    kept, h = [base], base
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


def test_residual_block_equals_an_independent_one(perturb):
    """Equations (1) to (3) in NumPy float64 for one image, the convolution as a sum of nine shifted products."""
    rng = np.random.default_rng(0)
    x, c = rng.standard_normal((2, 5, 4, 8)), rng.standard_normal((2, 6))
    x[1] = np.float32(1 + 3e-3 * x[1])  # a variance about as large as the 1e-5 added to it
    block = ResidualBlock(12, 0.0, 'float32')
    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    init = jax.jit(functools.partial(block.init, deterministic=True))
    params = perturb(init(jax.random.key(0), *inputs)['params'])
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(h, layer, groups):
        h = h.reshape(*h.shape[:2], groups, -1)
        h = (h - h.mean((0, 1, 3), keepdims=True)) / np.sqrt(h.var((0, 1, 3), keepdims=True) + 1e-5)
        return h.reshape(*h.shape[:2], -1) * layer['scale'] + layer['bias']

    def conv(h, layer):
        padded = np.pad(h, ((1, 1), (1, 1), (0, 0)))
        taps = [(i, j) for i in range(3) for j in range(3)]
        return sum(padded[i : i + 5, j : j + 4] @ layer['kernel'][i, j] for i, j in taps) + layer['bias']

    def silu(h):
        return h / (1 + np.exp(-h))

    expected = []
    for b in range(2):
        h = conv(silu(norm(x[b], p['norm_in'], 2)), p['conv_in'])
        shift, scale = np.split(c[b] @ p['modulation']['kernel'] + p['modulation']['bias'], 2)
        h = conv(silu(norm(h, p['norm_out'], 3) * (1 + scale) + shift), p['conv_out'])
        expected.append(x[b] @ p['skip']['kernel'] + p['skip']['bias'] + h)
    got = jax.jit(functools.partial(block.apply, deterministic=True))({'params': params}, *inputs)
    np.testing.assert_allclose(got, expected, atol=5e-4)


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


def test_gradients_reach_every_parameter(tiny, batch):
    model, params = tiny
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, *batch) ** 2)))(params)
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
    block = ResidualBlock(8, 0.0, 'bfloat16')
    c = jnp.zeros((1, 4))
    params = jax.jit(functools.partial(block.init, deterministic=True))(jax.random.key(1), x, c)
    apply = functools.partial(block.apply, deterministic=True, capture_intermediates=True)
    _, kept = jax.jit(apply)(params, x, c)
    normed = kept['intermediates']['norm_in']['__call__'][0]
    groups = np.asarray(x, np.float64).reshape(64, 2, 4)
    expected = (groups - groups.mean((0, 2), keepdims=True)) / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-5)
    assert normed.dtype == jnp.float32
    np.testing.assert_allclose(normed, expected.reshape(1, 8, 8, 8), atol=1e-3)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention': 'flash'}, "attention='flash' is not known; choose one of 'auto', 'xla', 'cudnn'"),
        ({'compute_dtype': 'half'}, "compute_dtype='half' is not known"),
        ({'channel_multipliers': ()}, 'channel_multipliers is empty'),
        ({'base_channels': 7}, 'base_channels=7 must be even'),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(**(TINY | changes))


def test_wrong_shapes_are_refused(batch):
    t, labels = jnp.zeros(1), jnp.zeros(1, jnp.int32)

    def init(shape, **changes):
        jax.eval_shape(as_model(UNet(**(TINY | changes))).init, jax.random.key(0), jnp.zeros(shape), t, labels)

    with pytest.raises(ValueError, match=r'multiples of 2 \(channel_multipliers has 2 levels, 1 halvings\), got 8x7'):
        init((1, 8, 7, 2))
    with pytest.raises(ValueError, match=r'UNet takes x of shape \[B, H, W, C\], got \(8, 8\)'):
        init((8, 8))
    with pytest.raises(ValueError, match='16 channels cannot be shared among num_heads=3'):
        init((1, 8, 8, 2), num_heads=3)
