"""PixArt: counts, what it is told, and the settings that must change nothing. Its outputs: tests/parity."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.types import Model
from diffjax.nets import PixArt, as_model, count_parameters
from diffjax.nets.stacking import stack_layers, unstack_layers
from diffjax.training.flops import count_flops

TINY = dict(  # noqa: C408
    hidden_size=24, depth=2, num_heads=2, text_size=10, base_size=4, out_channels=3, size_conditions='embedded'
)
MASK = np.arange(5) < np.array([[5], [3], [1]])


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    cond = {'text': jnp.asarray(rng.standard_normal((3, 5, 10)), jnp.float32), 'text_mask': jnp.asarray(MASK)}
    cond |= {'resolution': jnp.array([[64.0, 64], [32, 96], [96, 32]]), 'aspect_ratio': jnp.array([[1.0], [0.3], [3]])}
    x = jnp.asarray(rng.standard_normal((3, 4, 6, 2)), jnp.float32)
    return x, jnp.array([0.0, 400, 999]), cond


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(PixArt(**(TINY | changes)))))


@pytest.fixture
def tiny(perturb, batch):
    model = _model(scan_layers=False)
    return model, perturb(model.init(jax.random.key(0), *batch))


@functools.cache
def _gradient_function(model):
    def loss(params, batch):
        out = model.apply(params, *batch)
        return jnp.mean(out**2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    ('base', 'sizes', 'parameters', 'gmacs'),
    [(32, 'none', 610_856_096, 618.0), (64, 'embedded', 611_349_152, 3254.8)],
)
def test_counts_of_the_published_sizes(base, sizes, parameters, gmacs):
    """0.6 B (Chen et al. 2023, table 2), and by hand what attention and dense layers multiply."""
    d, depth, text = 1152, 28, 120
    model = as_model(PixArt(hidden_size=d, depth=depth, num_heads=16, size_conditions=sizes, out_channels=8))
    cond = {'text': jnp.zeros((1, text, 4096)), 'resolution': jnp.zeros((1, 2)), 'aspect_ratio': jnp.zeros((1, 1))}
    cond = cond if sizes == 'embedded' else {'text': cond['text']}
    inputs = jax.eval_shape(lambda: (jnp.zeros((1, 2 * base, 2 * base, 4)), jnp.zeros(1), cond))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert count_parameters(params) == parameters
    flops = count_flops(jax.make_jaxpr(model.apply)(params, *inputs)) / 2
    n = base**2
    block = n * 4 * d * d + 2 * n * n * d + n * 2 * d * d + text * 2 * d * d + 2 * n * text * d + n * 8 * d * d
    around = n * 16 * d + n * d * 32 + text * (4096 * d + d * d) + 256 * d + d * d + 6 * d * d
    around += 3 * (256 * d // 3 + (d // 3) ** 2) if sizes == 'embedded' else 0
    assert flops == depth * block + around
    np.testing.assert_allclose(flops / 1e9, gmacs, rtol=1e-3)


def test_it_starts_at_zero_and_without_a_look_at_the_text(batch):
    model = _model()
    params = model.init(jax.random.key(0), *batch)
    chex.assert_trees_all_equal(model.apply(params, *batch), jnp.zeros((3, 4, 6, 3)))
    assert not np.any(params['blocks']['cross_attention']['out']['kernel'])


@pytest.mark.parametrize('how', [{'scan_layers': True}, {'scan_layers': 'auto', 'remat': 'full'}])
def test_scanned_is_unrolled_and_remat_is_none(tiny, batch, how):
    model, params = tiny
    other, stacked = _model(**how), stack_layers(params)
    chex.assert_trees_all_equal_shapes(stacked, jax.eval_shape(other.init, jax.random.key(0), *batch))
    (_, out), gradient = _gradient_function(model)(params, batch)
    (_, other_out), other_gradient = _gradient_function(other)(stacked, batch)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(other_out, out, atol=1e-5 * np.abs(out).max())
    chex.assert_trees_all_close(unstack_layers(other_gradient), gradient, atol=1e-5 * scale)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_computes_close_to_float32(tiny, batch):
    model, params = tiny
    half = _model(scan_layers=False, compute_dtype='bfloat16')
    fresh = jax.eval_shape(half.init, jax.random.key(0), *batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    out, half_out = model.apply(params, *batch), half.apply(params, *batch)
    assert half_out.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(half_out - out) / np.linalg.norm(out) < 0.02


def test_everything_it_is_told_matters_but_what_is_masked(tiny, batch):
    model, params = tiny
    x, t, cond = batch
    out = model.apply(params, *batch)
    for name in ('text', 'resolution', 'aspect_ratio'):
        change = model.apply(params, x, t, cond | {name: cond[name][::-1] + 1}) - out
        assert np.all(np.abs(change).max(axis=(1, 2, 3)) > 1e-3), name
    unread = jnp.where(MASK[..., None], cond['text'], 7.0)
    np.testing.assert_allclose(model.apply(params, x, t, cond | {'text': unread}), out, atol=1e-5)
    whole = {name: value for name, value in cond.items() if name != 'text_mask'}
    change = np.abs(model.apply(params, x, t, whole) - out).max(axis=(1, 2, 3))
    assert change[0] < 1e-5 and np.all(change[1:] > 1e-3)


def test_labels_say_what_their_tokens_say(perturb, batch):
    """And sizes are those of x, eight pixels for each of it."""
    x, t, _ = batch
    model = _model(num_classes=5)
    labels = jnp.array([0, 3, 5])
    params = perturb(model.init(jax.random.key(0), x, t, labels))
    text = params['label']['text']['embedding'][labels].reshape(3, 4, 10)
    told = {
        'text': text,
        'resolution': jnp.tile(jnp.array([32.0, 48]), (3, 1)),
        'aspect_ratio': jnp.full((3, 1), 2 / 3),
    }
    np.testing.assert_allclose(model.apply(params, x, t, labels), model.apply(params, x, t, told), atol=1e-5)


def test_positions_of_a_larger_image_lie_between(tiny, batch):
    """Equation (1): a side of twice the tokens has positions in half steps, so every other one is a usual image's."""
    del tiny, batch

    def table(rows, columns):
        class Positions(PixArt):
            def __call__(self):
                return self._positions(rows, columns)

        return np.asarray(Positions(**TINY).apply({})).reshape(rows, columns, -1)

    np.testing.assert_allclose(table(8, 4)[::2], table(4, 4), atol=1e-6)
    np.testing.assert_allclose(table(2, 8)[:, ::2], table(4, 4)[::2], atol=1e-6)
    column, row = table(4, 4)[3, 1, :12], table(4, 4)[3, 1, 12:]
    frequencies = 10_000 ** (-np.arange(6) / 6)
    np.testing.assert_allclose(column, [*np.sin(frequencies), *np.cos(frequencies)], atol=1e-6)
    np.testing.assert_allclose(row, [*np.sin(3 * frequencies), *np.cos(3 * frequencies)], atol=1e-6)


def test_it_learns(learn_digits):
    """Labels in the place of text."""
    losses = learn_digits(as_model(PixArt(**(TINY | {'num_classes': 10, 'out_channels': 1}))))
    assert losses[0] > 0.95 and losses[-10:].mean() < 0.75


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'hidden_size': 20}, 'hidden_size=20 must be a multiple of 3, for example 18'),
        ({'hidden_size': 27, 'num_heads': 3}, r'hidden_size=27 must be a multiple of 4 \(two-dim'),
        ({'size_conditions': 'some'}, "size_conditions='some' is not known; choose one of 'none', 'embedded'"),
        ({'remat': 'some'}, "remat='some' is not known"),
        ({'scan_layers': 'no'}, "scan_layers='no' is not known"),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        PixArt(**(TINY | changes))


def test_wrong_conditions_are_refused(batch):
    x, t, cond = batch
    model, labelled = as_model(PixArt(**TINY)), as_model(PixArt(**(TINY | {'num_classes': 5})))
    for one, told, message in (
        (model, cond | {'text': jnp.zeros((3, 5, 9))}, r"cond\['text'\] of shape \[B, S, 10\], got \(3, 5, 9\)"),
        (model, cond | {'resolution': jnp.zeros((3, 3))}, r"cond\['resolution'\] of shape \[B, 2\]"),
        (model, {'text': cond['text']}, 'lacks the condition resolution, aspect_ratio'),
        (model, cond | {'pooled': jnp.zeros((3, 4))}, 'does not know the condition pooled'),
        (model, jnp.zeros(3, jnp.int32), 'takes cond as a dict'),
        (labelled, jnp.zeros(2, jnp.int32), r'labels as integers of shape \(3,\), got int32 of shape \(2,\)'),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(one.init, jax.random.key(0), x, t, told)
    with pytest.raises(ValueError, match='multiples of patch_size=2, got 4x5'):
        jax.eval_shape(model.init, jax.random.key(0), x[:, :, :5], t, cond)
    with pytest.raises(ValueError, match='one time for each sample'):
        jax.eval_shape(model.init, jax.random.key(0), x, t[0], cond)
