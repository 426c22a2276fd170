"""Shared layers against direct formulas in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import layers


def test_sinusoids_are_the_published_formula_in_the_published_order():
    t, size = np.array([0.0, 0.5, 3.25, 999.0]), 10
    expected = np.zeros((4, size))
    for b in range(4):
        for i in range(5):
            frequency = 10_000 ** (-i / 5)
            expected[b, i], expected[b, 5 + i] = np.cos(t[b] * frequency), np.sin(t[b] * frequency)
    got = layers.sinusoidal_embedding(jnp.asarray(t, jnp.float32), size)
    np.testing.assert_allclose(got, expected, atol=1e-4)  # float32 angles of up to 1000 radians


def test_sinusoids_stay_float32_for_times_in_16_bits_and_tell_all_times_apart():
    assert layers.sinusoidal_embedding(jnp.ones(2, jnp.bfloat16), 8).dtype == jnp.float32
    table = np.asarray(layers.sinusoidal_embedding(jnp.arange(1000.0), 64))
    cosine = table @ table.T / 32  # each row has squared norm 32
    np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-5)
    assert np.max(cosine - 2 * np.eye(1000)) < 0.995
    with pytest.raises(ValueError, match='even, got 7'):
        layers.sinusoidal_embedding(jnp.ones(2), 7)


def test_positions_against_loops():
    size, height, width = 8, 3, 5
    got = layers.sincos_positions(size, height, width)
    assert got.shape == (15, 8) and got.dtype == np.float32
    for row in range(height):
        for column in range(width):
            for i in range(2):
                w = 10_000 ** (-i / 2)
                feature = got[row * width + column]
                expected = [np.sin(column * w), np.cos(column * w), np.sin(row * w), np.cos(row * w)]
                np.testing.assert_allclose(feature[[i, 2 + i, 4 + i, 6 + i]], expected, atol=1e-6)


def test_positions_have_the_symmetries_of_the_grid():
    grid = layers.sincos_positions(16, 6, 6).reshape(6, 6, 16)
    column_half, row_half = grid[..., :8], grid[..., 8:]
    np.testing.assert_array_equal(column_half, row_half.swapaxes(0, 1))  # transposing exchanges the halves
    np.testing.assert_array_equal(column_half, np.broadcast_to(column_half[:1], column_half.shape))
    np.testing.assert_allclose(np.sum(grid**2, -1), 8, atol=1e-5)  # sin^2 + cos^2
    flat = grid.reshape(36, 16)
    products = (flat @ flat.T).reshape(6, 6, 6, 6)  # depends on the difference of positions alone
    np.testing.assert_allclose(products[:-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:], atol=1e-4)
    with pytest.raises(ValueError, match='6 is no multiple of 4'):
        layers.sincos_positions(6, 2, 2)


@pytest.mark.parametrize('implementation', ['auto', 'xla'])
def test_attention_is_a_softmax_of_scaled_products(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (2 * rng.standard_normal((2, 7, 3, 4)) for _ in range(3))
    expected = np.zeros_like(q)
    for b in range(2):
        for h in range(3):
            logits = q[b, :, h] @ k[b, :, h].T / np.sqrt(4)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            expected[b, :, h] = weights / weights.sum(1, keepdims=True) @ v[b, :, h]
    got = layers.attention(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), implementation=implementation)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    half = layers.attention(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)), implementation='xla')
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


def test_unknown_attention_is_refused_by_name():
    q = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="attention='flash' is not known; choose one of 'auto', 'xla', 'cudnn'"):
        layers.attention(q, q, q, implementation='flash')


def test_attention_chooses_cudnn_only_where_it_exists(monkeypatch):
    chosen = []
    monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, k, v, implementation: chosen.append(implementation))
    for platform, dtype, head_dim in (
        ('gpu', jnp.bfloat16, 64),
        ('gpu', jnp.float16, 72),
        ('gpu', jnp.float32, 64),
        ('gpu', jnp.bfloat16, 12),
        ('tpu', jnp.bfloat16, 64),
        ('cpu', jnp.bfloat16, 64),
    ):
        monkeypatch.setattr(jax, 'default_backend', lambda platform=platform: platform)
        q = jnp.zeros((1, 2, 1, head_dim), dtype)
        layers.attention(q, q, q)
    assert chosen == ['cudnn', 'cudnn', 'xla', 'xla', 'xla', 'xla']


@pytest.mark.parametrize('shape', [(2, 3), (2, 5, 3), (2, 4, 5, 3)])
def test_modulate_is_per_sample_and_channel(shape):
    rng = np.random.default_rng(0)
    x, shift, scale = rng.standard_normal(shape), rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    expected = np.stack([x[b] * (1 + scale[b]) + shift[b] for b in range(2)])
    got = layers.modulate(*(jnp.asarray(a, jnp.float32) for a in (x, shift, scale)))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_flat_dense_is_a_matrix_product_over_the_last_axis():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    params = layers.FlatDense(6).init(jax.random.key(1), x)
    weights = params['params']
    assert {name: value.shape for name, value in weights.items()} == {'kernel': (5, 6), 'bias': (6,)}
    assert np.max(np.abs(weights['kernel'])) <= np.sqrt(6 / 11)  # Xavier: uniform within sqrt(6 / (in + out))
    expected = np.einsum('bhwd,df->bhwf', x, weights['kernel']) + weights['bias']
    np.testing.assert_allclose(layers.FlatDense(6).apply(params, x), expected, atol=1e-5)


def test_label_table_has_a_null_row_and_nothing_beyond_it():
    embed = layers.LabelEmbedding(num_classes=3, hidden_size=4)
    params = embed.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    table = params['params']['table']['embedding']
    chex.assert_shape(table, (4, 4))
    chex.assert_trees_all_equal(embed.apply(params, jnp.array([3, 0, 2])), table[jnp.array([3, 0, 2])])
    assert np.all(np.isnan(embed.apply(params, jnp.array([4]))))


def test_condition_errors_name_what_was_given():
    t, labels = jnp.zeros(2), jnp.zeros(2, jnp.int32)

    def init(num_classes, t, cond):
        return layers.ConditionEmbedding(8, num_classes).init(jax.random.key(0), t, cond)

    with pytest.raises(ValueError, match='cond was given to a network with num_classes=0'):
        init(0, t, labels)
    with pytest.raises(ValueError, match=r'num_classes=3 takes cond, int32 labels of shape \(2,\).*got None'):
        init(3, t, None)
    with pytest.raises(ValueError, match=r'got shape \(3,\)'):
        init(3, t, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r'one time for each sample, shape \[B\]; got shape \(\)'):
        init(0, jnp.float32(0), None)
