"""U-ViT: the published counts, an independent forward pass in NumPy, and the settings that must change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_dit import attend, linear
from scipy.special import erf

from diffjax.core.types import Model
from diffjax.nets import UViT, as_model, count_parameters
from diffjax.nets.stacking import stack_layers, unstack_layers
from diffjax.training.flops import count_flops

TINY = dict(patch_size=2, hidden_size=16, depth=5, num_heads=2, num_classes=5, out_channels=3)  # noqa: C408
SHAPE = (3, 4, 6, 2)


@pytest.fixture
def batch(image_batch):
    return image_batch(SHAPE)


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(UViT(**(TINY | changes)))))


@pytest.fixture
def tiny(perturb, batch):
    """The tiny network, unrolled, with perturbed weights, learned positions too."""
    model = _model(scan_layers=False)
    params = perturb(model.init(jax.random.key(0), *batch))
    return model, params | {'pos_embed': params['pos_embed'] + 0.2 * jax.random.normal(jax.random.key(2), (8, 16))}


@functools.cache
def _gradient_function(model):
    def loss(params, batch):
        out = model.apply(params, *batch)
        return jnp.mean(out**2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _stacked(params):
    return stack_layers(stack_layers(params, 'blocks_in'), 'blocks_out')


def _unstacked(params):
    return unstack_layers(unstack_layers(params, 'blocks_in'), 'blocks_out')


@pytest.mark.parametrize(
    ('width', 'depth', 'heads', 'p', 'shape', 'classes', 'millions'),
    [
        (512, 13, 8, 2, (32, 32, 3), 0, 44),
        (768, 17, 12, 4, (64, 64, 3), 1000, 131),
        (1024, 21, 16, 2, (32, 32, 4), 1000, 287),
        (1152, 29, 16, 2, (32, 32, 4), 1000, 501),
    ],
)
def test_counts_of_the_published_sizes(width, depth, heads, p, shape, classes, millions):
    """Bao et al. 2023, table 1 (parameters), and by hand what attention, dense layers and the convolution multiply."""
    fields = dict(patch_size=p, hidden_size=width, depth=depth, num_heads=heads)  # noqa: C408
    model = as_model(UViT(**fields, num_classes=classes, out_channels=shape[-1], scan_layers=True))
    x, t = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    inputs = x, t, jax.ShapeDtypeStruct((1,), jnp.int32) if classes else None
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert round(count_parameters(params) / 1e6) == millions
    (height, _, channels), patches = shape, (shape[0] // p) ** 2
    n = patches + (2 if classes else 1)
    blocks = depth * (12 * n * width**2 + 2 * n**2 * width) + depth // 2 * n * 2 * width**2
    around = 2 * patches * p * p * channels * width + height**2 * 9 * channels**2
    assert count_flops(jax.make_jaxpr(model.apply)(params, *inputs)) == 2 * (blocks + around)


def _numpy_uvit(params, x, t, label, p, heads, depth):
    """One sample `[H, W, C]` through equations (1) and (2), float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(h, layer):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * layer['scale'] + layer[
            'bias'
        ]

    def block(h, layer):
        h = h + attend(norm(h, layer['norm_1']), layer['attention'], heads, 'none', None)
        inside = linear(norm(h, layer['norm_2']), layer['mlp_in'])
        return h + linear(0.5 * inside * (1 + erf(inside / np.sqrt(2))), layer['mlp_out'])

    height, width, _ = x.shape
    corners = [(i, j) for i in range(0, height, p) for j in range(0, width, p)]
    patches = linear(np.stack([x[i : i + p, j : j + p].reshape(-1) for i, j in corners]), params['patch_embed'])
    half = patches.shape[1] // 2
    angles = t * 10_000 ** (-np.arange(half) / half)
    told = [params['label']['table']['embedding'][label], np.concatenate([np.cos(angles), np.sin(angles)])]
    h = np.concatenate([told, patches]) + params['pos_embed']

    skips = []
    for i in range(depth // 2):
        h = block(h, params[f'blocks_in_{i}'])
        skips.append(h)
    h = block(h, params['block_middle'])
    for i in range(depth // 2):
        layer = params[f'blocks_out_{i}']
        h = block(linear(np.concatenate([h, skips.pop()], axis=-1), layer['skip']), layer)

    tokens = linear(norm(h, params['final_norm']), params['final'])[2:]
    image = np.zeros((height + 2, width + 2, tokens.shape[-1] // p**2))
    for token, (i, j) in zip(tokens, corners, strict=True):
        image[1 + i : 1 + i + p, 1 + j : 1 + j + p] = token.reshape(p, p, -1)
    out = np.zeros((height, width, params['smooth']['bias'].size))
    for i in range(height):
        for j in range(width):
            out[i, j] = np.einsum('ijc,ijcd->d', image[i : i + 3, j : j + 3], params['smooth']['kernel'])
    return out + params['smooth']['bias']


def test_forward_pass_equals_an_independent_one(tiny, batch):
    model, params = tiny
    x, t, labels = batch
    labels = labels.at[0].set(5)  # the null label
    got = model.apply(params, x, t, labels)
    expected = [_numpy_uvit(params, np.asarray(x[b]), float(t[b]), int(labels[b]), 2, 2, 5) for b in range(3)]
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.std(expected))


@pytest.mark.parametrize('how', [{'scan_layers': True}, {'scan_layers': 'auto', 'remat': 'full'}])
def test_scanned_is_unrolled_and_remat_is_none(tiny, batch, how):
    model, params = tiny
    other, stacked = _model(**how), _stacked(params)
    chex.assert_trees_all_equal_shapes(stacked, jax.eval_shape(other.init, jax.random.key(0), *batch))
    (_, out), gradient = _gradient_function(model)(params, batch)
    (_, other_out), other_gradient = _gradient_function(other)(stacked, batch)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(other_out, out, atol=1e-5 * np.abs(out).max())
    chex.assert_trees_all_close(_unstacked(other_gradient), gradient, atol=1e-5 * scale)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_computes_close_to_float32(tiny, batch):
    model, params = tiny
    half = _model(scan_layers=False, compute_dtype='bfloat16')
    assert all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), *batch))
    )
    out, half_out = model.apply(params, *batch), half.apply(params, *batch)
    assert half_out.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(half_out - out) / np.linalg.norm(out) < 0.02


def test_a_skip_carries_what_the_middle_does_not(tiny, batch):
    """With all weights of the deep blocks zero but those of the last skip, the image still comes through."""
    model, params = tiny
    dead = {name for name in params if name in ('blocks_in_1', 'block_middle', 'blocks_out_0')}
    cut = params | {name: jax.tree.map(jnp.zeros_like, params[name]) for name in dead}
    x, t, labels = batch
    change = model.apply(cut, x + 1, t, labels) - model.apply(cut, x, t, labels)
    assert np.abs(change).max() > 0.1  # blocks_out_0 gives zeros: what arrives came through the skip of blocks_in_0


def test_it_learns(learn_digits):
    losses = learn_digits(
        as_model(UViT(**(TINY | {'hidden_size': 32, 'depth': 3, 'num_classes': 10, 'out_channels': 1}))),
        learning_rate=1e-2,
    )
    assert losses[-10:].mean() < 0.75


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'depth': 4}, 'depth=4 must be odd and at least 3'),
        ({'depth': 1}, 'depth=1 must be odd and at least 3'),
        ({'num_heads': 3}, r'hidden_size=16 must be a multiple of 3 \(num_heads\)'),
        ({'remat': 'some'}, "remat='some' is not known"),
        ({'scan_layers': 'no'}, "scan_layers='no' is not known"),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        UViT(**(TINY | changes))


def test_wrong_inputs_are_refused():
    model, t = as_model(UViT(**TINY)), jnp.zeros(1)
    with pytest.raises(ValueError, match='multiples of patch_size=2, got 4x5'):
        model.init(jax.random.key(0), jnp.zeros((1, 4, 5, 3)), t, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match='num_classes=5 takes cond.*got None'):
        model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), t, None)
