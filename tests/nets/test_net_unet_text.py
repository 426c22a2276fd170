"""The U-Net with text: published counts, a transformer in NumPy, masks, labels in the place of text, SDXL's sizes.

The tiny network has a transformer in the middle alone; tests/parity has them at the levels.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.types import Model
from diffjax.nets import UNet, as_model, count_parameters
from diffjax.nets.unet_blocks import SpatialTransformer, Style
from diffjax.nets.unet_condition import sinusoids

STABLE = {'base_channels': 320, 'channel_multipliers': (1, 2, 4, 4), 'attention_levels': (0, 1, 2)}
STABLE |= {'attention_resolutions': (), 'time_conditioning': 'additive', 'num_classes': 0, 'out_channels': 4}
PUBLISHED = {  # fields, and the parameters of the published models
    'SD 1.5': (STABLE | {'num_heads': 8, 'text_size': 768, 'projection': 'conv'}, 859_520_964),
    'SD 2.1': (STABLE | {'head_dim': 64, 'text_size': 1024}, 865_910_724),
    'SDXL': (
        STABLE
        | {'channel_multipliers': (1, 2, 4), 'attention_levels': (1, 2), 'transformer_depth': (1, 2, 10)}
        | {'head_dim': 64, 'text_size': 2048, 'pooled_size': 1280},
        2_567_463_684,
    ),
}
TINY = {'base_channels': 8, 'channel_multipliers': [1, 2], 'num_res_blocks': 1, 'attention_resolutions': []}
TINY |= {'num_heads': 2, 'text_size': 6, 'num_tokens': 3, 'pooled_size': 4, 'size_frequencies': 4}
TINY |= {'num_classes': 5, 'out_channels': 3}


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(UNet(**(TINY | changes)))[:2]), None, None)


@pytest.fixture
def batch(image_batch):
    """(x, t, cond), five tokens each."""
    x, t, _ = image_batch((3, 8, 4, 2))
    rng = np.random.default_rng(2)
    cond = {'text': rng.standard_normal((3, 5, 6)), 'pooled': rng.standard_normal((3, 4))}
    cond = cond | {'size': rng.integers(0, 100, (3, 6))}
    return x, t, {name: jnp.asarray(value, jnp.float32) for name, value in cond.items()}


@pytest.fixture
def tiny(perturb, batch):
    """The tiny network with random weights, norms around one, nothing at zero."""
    x, t, _ = batch
    shapes = jax.eval_shape(_model().init, jax.random.key(0), x, t, jnp.zeros(3, jnp.int32))

    def start(path, leaf):
        return jnp.full(leaf.shape, float('scale' in jax.tree_util.keystr(path)))

    return _model(), perturb(jax.tree_util.tree_map_with_path(start, shapes))


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_the_published_ones(name):
    fields, count = PUBLISHED[name]
    cond = {'text': jnp.zeros((1, 77, fields['text_size']))}
    if 'pooled_size' in fields:
        cond |= {'pooled': jnp.zeros((1, 1280)), 'size': jnp.zeros((1, 6))}
    inputs = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1), cond
    assert count_parameters(jax.eval_shape(as_model(UNet(**fields)).init, jax.random.key(0), *inputs)) == count


# A spatial transformer in NumPy ---------------------------------------------------------------------------------------


def _layer_norm(h, layer):
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    return h * layer['scale'] + layer['bias']


def _attend(q, k, v, heads):
    out, size = np.zeros_like(q), q.shape[-1] // heads
    for i in range(heads):
        cut = slice(i * size, (i + 1) * size)
        weights = np.exp(q[:, cut] @ k[:, cut].T / np.sqrt(size))
        out[:, cut] = weights / weights.sum(-1, keepdims=True) @ v[:, cut]
    return out


def _erf(z):
    steps = np.linspace(0, 1, 401)
    return 2 / np.sqrt(np.pi) * np.trapezoid(np.exp(-((z[..., None] * steps) ** 2)), steps, axis=-1) * z


def test_a_spatial_transformer_equals_an_independent_one(perturb):
    """Equations (4) and (5) in NumPy float64, one image after the other, its text cut instead of masked."""
    rng = np.random.default_rng(0)
    x, text, mask = rng.standard_normal((2, 3, 2, 8)), rng.standard_normal((2, 4, 6)), np.arange(4) < [[4], [2]]
    x[1] = np.float32(1e-3 * x[1])  # a variance about as large as the 1e-6 added to it
    style = Style('float32', 'xla', 0.0, 2, 1e-5, 'additive', 'linear')
    block = SpatialTransformer(2, 1, style)
    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(text, jnp.float32), jnp.asarray(mask)
    params = perturb(jax.jit(block.init)(jax.random.key(0), *inputs)['params'], scale=0.5)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    b, expected = p['blocks_0'], []
    for image, words in zip(x, (text[0], text[1, :2]), strict=True):
        h = image.reshape(6, 2, 4)
        h = (h - h.mean((0, 2), keepdims=True)) / np.sqrt(h.var((0, 2), keepdims=True) + 1e-6)
        h = h.reshape(6, 8) * p['norm']['scale'] + p['norm']['bias']
        h = h @ p['project_in']['kernel'] + p['project_in']['bias']
        q, k, v = np.split(_layer_norm(h, b['norm_1']) @ b['self_attention']['qkv']['kernel'], 3, axis=-1)
        h = h + _attend(q, k, v, 2) @ b['self_attention']['out']['kernel'] + b['self_attention']['out']['bias']
        q = _layer_norm(h, b['norm_2']) @ b['cross_attention']['q']['kernel']
        k, v = np.split(words @ b['cross_attention']['kv']['kernel'], 2, axis=-1)
        h = h + _attend(q, k, v, 2) @ b['cross_attention']['out']['kernel'] + b['cross_attention']['out']['bias']
        a, gate = np.split(_layer_norm(h, b['norm_3']) @ b['mlp_in']['kernel'] + b['mlp_in']['bias'], 2, axis=-1)
        gelu = gate * (1 + _erf(gate / np.sqrt(2))) / 2
        h = h + (a * gelu) @ b['mlp_out']['kernel'] + b['mlp_out']['bias']
        h = h @ p['project_out']['kernel'] + p['project_out']['bias']
        expected.append(image + h.reshape(3, 2, 8))
    got = jax.jit(block.apply)({'params': params}, *inputs)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.max(np.abs(expected)))


def test_a_projection_by_convolution_is_the_same_map(tiny, batch):
    model, params = tiny

    def shaped(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf[None, None] if 'project_' in name and 'kernel' in name else leaf

    conv = _model(projection='conv')
    theirs = jax.tree_util.tree_map_with_path(shaped, params)
    chex.assert_trees_all_close(conv.apply(theirs, *batch), model.apply(params, *batch), atol=1e-5)
    fresh = jax.eval_shape(conv.init, jax.random.key(0), batch[0], batch[1], jnp.zeros(3, jnp.int32))
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, theirs)


# What it is told ------------------------------------------------------------------------------------------------------


def test_masked_tokens_are_as_if_they_were_not_there(tiny, batch):
    model, params = tiny
    x, t, cond = batch
    cut = model.apply(params, x, t, cond | {'text': cond['text'][:, :2]})
    mask = jnp.tile(jnp.arange(5) < 2, (3, 1))
    chex.assert_trees_all_close(model.apply(params, x, t, cond | {'text_mask': mask}), cut, atol=1e-5)
    everything = model.apply(params, x, t, cond | {'text_mask': jnp.ones((3, 5), bool)})
    chex.assert_trees_all_close(everything, model.apply(params, *batch), atol=1e-5)
    assert np.max(np.abs(everything - cut)) > 1e-2


def test_every_condition_matters_to_its_own_sample(tiny, batch):
    model, params = tiny
    x, t, cond = batch
    out = model.apply(params, x, t, cond)
    for name in cond:
        other = cond[name].at[1].set(cond[name][0])
        change = np.abs(model.apply(params, x, t, cond | {name: other}) - out).max((1, 2, 3))
        assert change[1] > 1e-3 and change[0] < 1e-5 and change[2] < 1e-5


def test_labels_are_rows_of_learned_text(tiny, batch):
    model, params = tiny
    x, t, _ = batch
    labels = jnp.array([0, 5, 3])
    table = params['condition']['label']
    size = jnp.tile(jnp.array([8.0, 4, 0, 0, 8, 4]), (3, 1))
    text = table['text']['embedding'][labels].reshape(3, 3, 6)
    same = {'text': text, 'pooled': table['pooled']['embedding'][labels], 'size': size}
    chex.assert_trees_all_close(model.apply(params, x, t, labels), model.apply(params, x, t, same), atol=1e-6)


def test_sizes_are_six_times_of_their_own(tiny, batch):
    """The added embedding is an MLP of [pooled, sinusoids of each of the six numbers], added to that of the time."""
    x, t, cond = batch
    params = tiny[1]['condition']
    sixes = np.concatenate([sinusoids(cond['size'][:, i], 4, 'cos_sin') for i in range(6)], axis=-1)

    def mlp(h, layers):
        h = h @ layers['in']['kernel'] + layers['in']['bias']
        return h / (1 + np.exp(-h)) @ layers['out']['kernel'] + layers['out']['bias']

    p = jax.tree.map(np.asarray, params)
    c = mlp(np.asarray(sinusoids(t, 8, 'cos_sin')), p['time'])
    c = c + mlp(np.concatenate([cond['pooled'], sixes], axis=-1), p['added'])
    unet = UNet(**TINY)
    told = jax.jit(lambda params: unet.apply({'params': params}, *batch, capture_intermediates=True))(tiny[1])
    got = told[1]['intermediates']['condition']['__call__'][0].c
    np.testing.assert_allclose(got, c / (1 + np.exp(-c)), atol=1e-5)


def test_bfloat16_computes_close_to_float32(tiny, batch):
    model, params = tiny
    out, half = model.apply(params, *batch), _model(compute_dtype='bfloat16').apply(params, *batch)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(half - out) / np.linalg.norm(out) < 0.05


def test_gradients_reach_every_parameter_and_remat_changes_none(tiny, batch):
    x, t, _ = batch

    def gradient(model):
        return jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, x, t, jnp.arange(3)) ** 2)))(tiny[1])

    plain, saving = gradient(_model()), gradient(_model(remat='full'))
    size = {jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree_util.tree_leaves_with_path(plain)}
    assert min(size.values()) > 1e-8, min(size, key=size.get)
    chex.assert_trees_all_close(saving, plain, atol=1e-5, rtol=1e-4)


def test_it_learns_the_digits_from_labels_as_text(learn_digits):
    losses = learn_digits(as_model(UNet(**TINY | {'num_classes': 10, 'out_channels': 1})))
    assert losses[0] == 1 and np.mean(losses[-10:]) < 0.6


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda cond: {'text': cond['text']}, 'UNet lacks the condition pooled, size'),
        (lambda cond: cond | {'label': jnp.zeros(3)}, 'UNet does not know the condition label'),
        (
            lambda cond: cond | {'text': cond['text'][..., :5]},
            r"cond\['text'\] with 6 features at its end, got \(3, 5, 5\)",
        ),
        (lambda cond: cond | {'size': cond['size'][:, :5]}, r"cond\['size'\] with 6 features at its end, got \(3, 5\)"),
        (lambda cond: cond | {'pooled': cond['text']}, r"cond\['pooled'\] of shape \[B, P\], got \(3, 5, 6\)"),
        (
            lambda cond: None,
            r'num_classes=5 takes cond, int32 labels of shape \(3,\) \(5 is the null label\); got NoneType',
        ),
        (lambda cond: jnp.zeros((3, 2), jnp.int32), r'int32 labels of shape \(3,\) .*got shape \(3, 2\)'),
    ],
)
def test_wrong_conditions_are_refused(batch, change, message):
    x, t, cond = batch
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(as_model(UNet(**TINY)).init, jax.random.key(0), x, t, change(cond))


def test_without_classes_it_takes_no_labels(batch):
    with pytest.raises(ValueError, match='UNet takes cond as a dict of .*got int'):
        as_model(UNet(**TINY | {'num_classes': 0})).init(jax.random.key(0), *batch[:2], 3)
