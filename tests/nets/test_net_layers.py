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


# Attention ------------------------------------------------------------------------------------------------------------


def _heads(dtype=jnp.float32):
    """q [2, 7, 3, 4], k and v [2, 5, 3, 4]: queries look at other tokens than themselves."""
    rng = np.random.default_rng(0)
    shapes = (2, 7, 3, 4), (2, 5, 3, 4), (2, 5, 3, 4)
    return tuple(jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes)


KEYS = np.arange(5) < np.array([[5], [2]])  # [B, S]
FULL = np.random.default_rng(1).random((2, 1, 7, 5)) < 0.7
FULL[..., 0] = True
MASKS = {'none': None, 'keys': KEYS, 'full': FULL, 'full of heads': np.broadcast_to(FULL[:1], (1, 3, 7, 5))}


def _numpy_attention(q, k, v, mask=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        weights = np.exp(k[b, :, h] @ q[b, i, h] / np.sqrt(q.shape[-1]))
        if mask is not None:
            row = mask[b] if mask.ndim == 2 else mask[b % len(mask), h % mask.shape[1], i]
            weights = weights * row
        out[b, i, h] = weights @ v[b, :, h] / weights.sum()
    return out


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('implementation', ['auto', 'xla'])
def test_attention_is_a_softmax_of_scaled_products(implementation, mask):
    q, k, v = _heads()
    expected = _numpy_attention(q, k, v, MASKS[mask])
    got = layers.attention(q, k, v, MASKS[mask], implementation=implementation)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    half = layers.attention(*_heads(jnp.bfloat16), MASKS[mask], implementation='xla')
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=0.02, atol=0.03)


@pytest.mark.parametrize('mask', ['none', 'keys', 'full'])
def test_derivatives_of_attention_are_those_of_another_implementation(mask):
    """In both modes: the backward pass trains, and the likelihood's exact trace goes forward."""
    where = MASKS[mask]

    def other(q, k, v):
        full = where[:, None, None] if mask == 'keys' else where
        return jax.nn.dot_product_attention(q, k, v, mask=full, implementation='xla')

    def ours(q, k, v):
        return layers.attention(q, k, v, where, implementation='xla')

    direction = jax.tree.map(jnp.cos, _heads())
    forward, expected = (jax.jvp(f, _heads(), direction)[1] for f in (ours, other))
    np.testing.assert_allclose(forward, expected, atol=1e-5)
    (out, back), (_, back_expected) = (jax.vjp(f, *_heads()) for f in (ours, other))
    chex.assert_trees_all_close(back(jnp.sin(out)), back_expected(jnp.sin(out)), atol=1e-5)


def test_large_logits_and_rows_without_a_key_stay_finite():
    q, k, v = _heads()
    out, back = jax.vjp(lambda q, k, v: layers.attention(100 * q, 100 * k, v), q, k, v)
    nearest = np.argmax(np.einsum('blhd,bshd->blhs', q, k), axis=-1)
    expected = np.take_along_axis(np.asarray(v).swapaxes(1, 2), nearest.swapaxes(1, 2)[..., None], axis=2)
    np.testing.assert_allclose(out, expected.swapaxes(1, 2), atol=1e-4)
    assert all(np.isfinite(g).all() for g in back(out))
    nothing, back = jax.vjp(lambda q, k, v: layers.attention(q, k, v, np.zeros((2, 5), bool)), q, k, v)
    assert np.isfinite(nothing).all() and all(np.isfinite(g).all() for g in back(nothing))


@pytest.fixture(scope='module')
def both_kernels():
    """(splash, xla), each a compiled (q, k, v, mask, direction) -> (output, gradients)."""

    def compile_one(implementation):
        def run(q, k, v, mask, g):
            out, back = jax.vjp(lambda *a: layers.attention(*a, mask, implementation=implementation), q, k, v)
            return out, back(g)

        return jax.jit(run)

    return compile_one('splash'), compile_one('xla')


def test_splash_is_xla(both_kernels):
    """Interpreted, here; with lengths that are no multiple of what the kernel takes."""
    splash, xla = both_kernels
    q, k, v = _heads()
    for mask in (jnp.ones((2, 5), bool), jnp.asarray(KEYS)):
        chex.assert_trees_all_close(splash(q, k, v, mask, q), xla(q, k, v, mask, q), atol=2e-5)


def test_splash_splits_over_batch_and_heads(both_kernels):
    """Each device runs the kernel on its own samples and heads, and what comes out stays where it was made."""
    splash, _ = both_kernels
    q, k, v = (jnp.concatenate([a, a[:, :, :1]], axis=2) for a in _heads())
    expected = splash(q, k, v, jnp.asarray(KEYS), q)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'tensor'))
    spec = jax.P('data', None, 'tensor')
    q, k, v = (jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (q, k, v))
    mask = jax.device_put(jnp.asarray(KEYS), jax.NamedSharding(mesh, jax.P('data')))
    program = splash.lower(q, k, v, mask, q).compile()
    assert 'all-gather' not in program.as_text()
    out, gradients = program(q, k, v, mask, q)
    assert all(a.sharding.spec == spec for a in (out, *gradients))
    chex.assert_trees_all_close(jax.device_get((out, gradients)), jax.device_get(expected), atol=2e-5)


def test_attention_that_cannot_be_is_refused():
    q = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="='flash' is not known; choose one of 'auto', 'xla', 'cudnn', 'splash'"):
        layers.attention(q, q, q, implementation='flash')
    with pytest.raises(
        ValueError, match=r"'splash' takes a mask \[B, S\]; got shape \(1, 1, 2, 2\), as 'xla' takes it"
    ):
        layers.attention(q, q, q, np.ones((1, 1, 2, 2), bool), implementation='splash')


def test_attention_is_chosen_by_platform(monkeypatch):
    chosen = []

    def note(name):
        return lambda *args, **kwargs: chosen.append(name)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', note('cudnn'))
    monkeypatch.setattr(layers, '_attention_by_xla', note('xla'))
    monkeypatch.setattr('diffjax.nets.splash.splash_attention', note('splash'))
    full = np.ones((1, 1, 2, 2), bool)
    for platform, dtype, head_dim, mask, right in (
        ('gpu', jnp.bfloat16, 64, None, 'cudnn'),
        ('gpu', jnp.float16, 72, np.ones((1, 2), bool), 'cudnn'),
        ('gpu', jnp.bfloat16, 64, full, 'cudnn'),
        ('gpu', jnp.bfloat16, 64, np.ones((1, 3), bool), 'xla'),  # a mask of odd length has no backward pass there
        ('gpu', jnp.float32, 64, None, 'xla'),
        ('gpu', jnp.bfloat16, 12, None, 'xla'),
        ('gpu', jnp.bfloat16, 136, None, 'xla'),
        ('tpu', jnp.bfloat16, 64, None, 'splash'),
        ('tpu', jnp.float32, 64, np.ones((1, 2), bool), 'splash'),
        ('tpu', jnp.bfloat16, 64, full, 'xla'),
        ('cpu', jnp.bfloat16, 64, None, 'xla'),
    ):
        monkeypatch.setattr(jax, 'default_backend', lambda platform=platform: platform)
        q = jnp.zeros((1, 2, 1, head_dim), dtype)
        k = q if mask is None else jnp.zeros((1, mask.shape[-1], 1, head_dim), dtype)
        layers.attention(q, k, k, mask)
        assert chosen.pop() == right, (platform, dtype, head_dim)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='cuDNN needs a GPU')
@pytest.mark.parametrize('mask', ['none', 'keys'])
def test_cudnn_is_xla(mask):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 64, 2, 64), jnp.bfloat16) for i in range(3))
    where = None if mask == 'none' else np.arange(64) < np.array([[64], [10]])
    flash, xla = (layers.attention(q, k, v, where, implementation=name) for name in ('cudnn', 'xla'))
    np.testing.assert_allclose(flash.astype(jnp.float32), xla.astype(jnp.float32), atol=0.03)


def test_cross_attention_reads_the_other_tokens_alone():
    """Against NumPy on its own weights; what is masked does not matter."""
    x, to = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 7, 8), (2, 5, 6)]))
    layer = layers.CrossAttention(2, 'float32')
    params = layer.init(jax.random.key(2), x, to, KEYS)
    weights = params['params']
    q = (x @ weights['q']['kernel']).reshape(2, 7, 2, 4)
    k, v = (a.reshape(2, 5, 2, 4) for a in np.split(to @ weights['kv']['kernel'], 2, axis=-1))
    expected = _numpy_attention(q, k, v, KEYS).reshape(2, 7, 8) @ weights['out']['kernel']
    out = layer.apply(params, x, to, KEYS)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(layer.apply(params, x, jnp.where(KEYS[..., None], to, 9.0), KEYS), out)


# Modulation, dense layers, labels -------------------------------------------------------------------------------------


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
