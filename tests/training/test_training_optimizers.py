"""Learning-rate schedules against formulas worked out by hand, and what weight decay touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import DiT, UNet, as_model
from diffjax.training import optimizers
from diffjax.training.optimizers import DECAYS, is_matrix, learning_rate_schedule

PEAK, WARMUP, STEPS = 0.5, 20, 100
FORMULAS = {
    'constant': lambda s: PEAK,
    'linear': lambda s: PEAK * (STEPS - s) / (STEPS - WARMUP),
    'cosine': lambda s: PEAK * (1 + np.cos(np.pi * (s - WARMUP) / (STEPS - WARMUP))) / 2,
    'rsqrt': lambda s: PEAK * np.sqrt(WARMUP / s),
}


@pytest.mark.parametrize('decay', DECAYS)
def test_schedule(decay):
    rate = learning_rate_schedule(PEAK, decay, WARMUP, STEPS)
    for step in (0, 1, 7, 19):
        np.testing.assert_allclose(rate(step), PEAK * step / WARMUP, rtol=1e-6)
    for step in (20, 21, 50, 80, 99, 100):
        np.testing.assert_allclose(rate(step), FORMULAS[decay](step), rtol=1e-5, atol=1e-7)


def test_rsqrt_from_a_reference_step_on():
    """peak / sqrt(max(t / t_ref, 1)) after the warm-up (Karras et al. 2024, Eq. 67): constant until t_ref."""
    for warmup in (20, 0):
        rate = learning_rate_schedule(PEAK, 'rsqrt', warmup, STEPS, reference_steps=50)
        for step in (20, 35, 50, 51, 80, 100):
            expected = PEAK / np.sqrt(max((step if warmup else step + 1) / 50, 1))
            np.testing.assert_allclose(rate(step), expected, rtol=1e-6)
    for decay, reference in (('cosine', 50), ('rsqrt', 10)):
        with pytest.raises(ValueError, match=f'reference_steps = {reference} is for decay rsqrt and not below'):
            learning_rate_schedule(PEAK, decay, WARMUP, STEPS, reference)
    optimizer = optimizers.adam(num_steps=99, learning_rate=1.0, decay='rsqrt', reference_steps=2)
    params, sizes = {'kernel': jnp.ones(3)}, []
    state = optimizer.init(params)
    for _ in range(8):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        sizes.append(float(-updates['kernel'][0]))
    np.testing.assert_allclose(sizes, 1 / np.sqrt(np.maximum(np.arange(1, 9) / 2, 1)), rtol=1e-4)


def test_schedule_without_warmup_starts_at_the_peak():
    for decay in DECAYS:
        np.testing.assert_allclose(learning_rate_schedule(PEAK, decay, 0, STEPS)(0), PEAK)


@pytest.mark.parametrize(
    'decay, warmup, message', [('cos', 0, 'constant, cosine'), ('linear', 100, 'num_steps = 100'), ('linear', -1, '-1')]
)
def test_schedule_refuses(decay, warmup, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_schedule(PEAK, decay, warmup, STEPS)


@pytest.mark.parametrize('name', optimizers.__all__)
def test_first_update_has_the_warmup_rate(name):
    """The first update of every optimiser here is at most rate * max(1, |gradient|): with warm-up, nothing."""
    options = {'rms': 2.0} if name == 'muon' else {}  # of a gradient of rank one of two
    optimizer = getattr(optimizers, name)(num_steps=10, learning_rate=0.1, warmup_steps=2, **options)
    params = {'kernel': jnp.ones((2, 2))}
    state = optimizer.init(params)
    first, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    second, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert np.abs(first['kernel']).max() == 0
    assert 0.04 < np.abs(second['kernel']).max() < 0.11  # 0.05, times 1.9 with momentum


def test_adamw_is_the_published_update():
    """Loshchilov & Hutter 2019, Algorithm 2, line by line in float64, with a gradient that changes."""
    rate, b1, b2, eps, decay = 0.1, 0.9, 0.99, 1e-8, 0.01
    optimizer = optimizers.adamw(num_steps=9, learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    params = {'kernel': jnp.asarray([1.0, -2.0, 3.0])}
    state, p, m, v = optimizer.init(params), np.array([1.0, -2.0, 3.0]), 0.0, 0.0
    for n in range(1, 6):
        g = np.array([0.3, -1.0, n])
        updates, state = optimizer.update({'kernel': jnp.asarray(g, jnp.float32)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + eps) + decay * p)
        np.testing.assert_allclose(params['kernel'], p, rtol=1e-5)


NETWORKS = {
    'scanned': DiT(patch_size=2, hidden_size=16, depth=3, num_heads=2, num_classes=3, out_channels=1),
    'unrolled': DiT(
        patch_size=2, hidden_size=16, depth=3, num_heads=2, num_classes=3, out_channels=1, scan_layers=False
    ),
    'unet': UNet(base_channels=8, channel_multipliers=(1, 2), num_classes=3, out_channels=1),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_weight_decay_shrinks_kernels_and_nothing_else(name):
    """With zero gradients AdamW multiplies what it decays by 1 - rate * decay."""
    model = as_model(NETWORKS[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int))
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    optimizer = optimizers.adamw(num_steps=10, learning_rate=0.1, weight_decay=0.5)
    updates, _ = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p))(params)
    seen = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        leaf = path[-1].key
        seen.add(leaf)
        np.testing.assert_allclose(update, -0.05 if leaf == 'kernel' else 0.0, rtol=1e-5, err_msg=str(path))
    assert {'kernel', 'bias', 'embedding'} <= seen
    assert name == 'unet' or 'pos_embed' in seen
    # A kernel multiplies its input: never a vector, also where layers are stacked.
    stacked = [
        (mask, leaf.ndim - ('blocks' in {entry.key for entry in path}))
        for (path, leaf), mask in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(is_matrix(params)))
    ]
    assert all(ndim >= 2 for mask, ndim in stacked if mask)


def test_muon_moves_kernels_along_the_orthogonal_matrix_nearest_to_the_gradient():
    """Against the singular value decomposition; the fifth-order iteration leaves singular values of 0.7 to 1.2."""
    optimizer = optimizers.muon(num_steps=9, learning_rate=1e-2, adam_learning_rate=1e-3, rms=0.2)
    keys = jax.random.split(jax.random.key(0), 3)
    gradients = {
        'conv': {'kernel': jax.random.normal(keys[0], (3, 3, 2, 24)), 'bias': jnp.array([2.0, -3.0])},
        'blocks': {'kernel': jax.random.normal(keys[1], (4, 5, 9))},
    }
    params = jax.tree.map(jnp.zeros_like, gradients)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates['conv']['bias'], [-1e-3, 1e-3], rtol=1e-4)  # Adam's first step

    def check(update, gradient):
        gradient, update = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (gradient, update))
        u, _, vt = np.linalg.svd(gradient, full_matrices=False)
        turned = -u.T @ update @ vt.T / (1e-2 * 0.2 * np.sqrt(max(gradient.shape)))
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-3)
        assert 0.65 < np.diag(turned).min() <= np.diag(turned).max() < 1.25

    check(updates['conv']['kernel'], gradients['conv']['kernel'])
    for layer in range(4):
        check(updates['blocks']['kernel'][layer], gradients['blocks']['kernel'][layer])
