"""What DiT may have beyond the published one: each option against NumPy, and what must hold of it by itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_dit import numpy_dit

from diffjax.core.types import Model
from diffjax.nets import DiT, as_model, count_parameters
from diffjax.nets.stacking import stack_layers, unstack_layers

TINY = dict(  # noqa: C408
    patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5, out_channels=3, scan_layers=False
)
SHAPE = (3, 4, 6, 2)
LIGHTNING = {'norm': 'rms', 'mlp': 'swiglu', 'positions': 'both'}
OPTIONS = {
    'rope': {'positions': 'rope'},
    'lightning': LIGHTNING | {'qk_norm': 'rms'},
    'single': {'conditioning': 'adaln_single', 'qk_norm': 'layer', 'num_registers': 3, 'positions': 'both'},
}


@pytest.fixture
def batch(image_batch):
    return image_batch(SHAPE)


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(DiT(**(TINY | changes)))))


@functools.cache
def _init(name):
    return _model(**OPTIONS[name]).init(jax.random.key(0), jnp.zeros(SHAPE), jnp.zeros(3), jnp.zeros(3, jnp.int32))


@pytest.fixture(params=OPTIONS)
def network(request, perturb):
    """(name, model, perturbed parameters)."""
    return request.param, _model(**OPTIONS[request.param]), perturb(_init(request.param))


@functools.cache
def _gradient_function(model):
    def loss(params, batch):
        out = model.apply(params, *batch)
        return jnp.mean(out**2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


# An independent forward pass ------------------------------------------------------------------------------------------


def test_forward_pass_equals_an_independent_one(network, batch):
    name, model, params = network
    x, t, labels = batch
    got = model.apply(params, x, t, labels)
    expected = [
        numpy_dit(params, np.asarray(x[b]), float(t[b]), int(labels[b]), 2, 2, **OPTIONS[name]) for b in range(3)
    ]
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.std(expected))


# Settings that must change nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize('how', [{'scan_layers': True}, {'scan_layers': 'auto', 'remat': 'dots'}])
def test_scanned_is_unrolled_and_remat_is_none(network, batch, how):
    name, model, params = network
    other = _model(**OPTIONS[name], **how)
    stacked = stack_layers(params)
    chex.assert_trees_all_equal_shapes(stacked, jax.eval_shape(other.init, jax.random.key(0), *batch))
    (_, out), gradient = _gradient_function(model)(params, batch)
    (_, other_out), other_gradient = _gradient_function(other)(stacked, batch)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(other_out, out, atol=1e-5 * np.abs(out).max())
    chex.assert_trees_all_close(unstack_layers(other_gradient), gradient, atol=1e-5 * scale)
    fixed = {"['pos_embed']"}
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(g) == (jax.tree_util.keystr(path) not in fixed), path


def test_bfloat16_computes_close_to_float32(network, batch):
    name, model, params = network
    half = _model(**OPTIONS[name], compute_dtype='bfloat16')
    fresh = jax.eval_shape(half.init, jax.random.key(0), *batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    out, half_out = model.apply(params, *batch), half.apply(params, *batch)
    assert half_out.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(half_out - out) / np.linalg.norm(out) < 0.02


# What each option promises --------------------------------------------------------------------------------------------


def test_lightning_dit_has_the_published_number_of_parameters():
    """Yao et al. 2025, table 4: 675 M; SwiGLU's two thirds keep the number that GELU has."""
    size = dict(depth=28, hidden_size=1152, num_heads=16, num_classes=1000, patch_size=1, out_channels=32)  # noqa: C408
    inputs = jnp.zeros((1, 16, 16, 32)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    model = as_model(DiT(**size, **LIGHTNING))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    norms = (2 * 28 + 1) * 1152
    assert count_parameters(params) == 675_256_736
    plain = jax.eval_shape(as_model(DiT(**size)).init, jax.random.key(0), *inputs)
    assert params['blocks']['mlp_in']['kernel'].shape == (28, 1152, 2 * 3072)
    assert count_parameters(params) - norms == count_parameters(plain) + 28 * (2 * 3072 - 4608)  # wider biases


def test_shared_modulations_save_a_third_of_the_parameters():
    """PixArt-alpha, section 2.3: DiT-XL/2 has 28 x (6 D D + 6 D) in its modulations; shared, one of them and tables."""
    size = dict(depth=28, hidden_size=1152, num_heads=16, num_classes=1000, patch_size=2, out_channels=8)  # noqa: C408
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    each, shared = (
        count_parameters(jax.eval_shape(as_model(DiT(**size, conditioning=c)).init, jax.random.key(0), *inputs))
        for c in ('adaln', 'adaln_single')
    )
    d, layer = 1152, 6 * 1152 * 1152 + 6 * 1152
    assert each - shared == 27 * layer - 28 * 6 * d + (2 * d * d + 2 * d) - 2 * d
    assert 0.25 < (each - shared) / each < 0.35


def test_rope_alone_cannot_tell_places_in_an_image_of_equal_patches(perturb):
    """Keys are weighed by their distance; where all values are equal, so are all outputs. A table tells places."""
    x = jnp.tile(jax.random.normal(jax.random.key(0), (3, 1, 1, 2)), (1, 4, 6, 1))
    t, labels = jnp.full(3, 300.0), jnp.zeros(3, jnp.int32)
    for name, spread in (('rope', 0.0), ('lightning', 0.3)):
        params = perturb(_init(name))
        assert ('pos_embed' in params) == (spread > 0)
        out = _model(**OPTIONS[name]).apply(params, x, t, labels)
        patches = out.reshape(3, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        differences = np.ptp(patches, axis=(1, 2)).max()
        assert differences > spread if spread else differences < 1e-5


def test_registers_are_told_of_and_do_not_come_out(batch, perturb):
    """Their order means nothing; their values do."""
    model = _model(num_registers=4)
    params = perturb(model.init(jax.random.key(0), *batch))
    out = model.apply(params, *batch)
    assert out.shape == (3, 4, 6, 3)
    shuffled = params | {'registers': params['registers'][jnp.array([2, 0, 3, 1])]}
    np.testing.assert_allclose(model.apply(shuffled, *batch), out, atol=1e-5)
    moved = params | {'registers': 2 * params['registers']}
    assert np.abs(model.apply(moved, *batch) - out).max() > 1e-3


def test_normalised_queries_do_not_know_their_length(batch, perturb):
    """A scale on the weights of queries changes nothing, and without the norm everything."""
    for qk_norm in ('rms', 'layer', 'none'):
        model = _model(qk_norm=qk_norm)
        params = perturb(model.init(jax.random.key(0), *batch))

        def longer(path, a):
            return a.at[..., :16].multiply(7.0) if "['qkv']" in jax.tree_util.keystr(path) else a

        change = model.apply(jax.tree_util.tree_map_with_path(longer, params), *batch) - model.apply(params, *batch)
        assert np.abs(change).max() < 1e-3 if qk_norm != 'none' else np.abs(change).max() > 1e-2


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'positions': 'learned'}, "positions='learned' is not known; choose one of 'sincos', 'rope', 'both'"),
        ({'qk_norm': 'l2'}, "qk_norm='l2' is not known; choose one of 'none', 'rms', 'layer'"),
        ({'norm': 'batch'}, "norm='batch' is not known; choose one of 'layer', 'rms'"),
        ({'mlp': 'relu'}, "mlp='relu' is not known; choose one of 'gelu', 'swiglu'"),
        ({'conditioning': 'film'}, "conditioning='film' is not known; choose one of 'adaln', 'adaln_single'"),
        ({'positions': 'rope', 'num_heads': 8}, 'heads of a multiple of 4 features; .* num_heads=8 make 2'),
    ],
)
def test_wrong_options_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        DiT(**(TINY | changes))


@pytest.mark.parametrize('name', ['lightning', 'single'])
def test_it_learns(name, learn_digits):
    options = TINY | OPTIONS[name] | {'hidden_size': 32, 'num_classes': 10, 'out_channels': 1}
    losses = learn_digits(as_model(DiT(**options)))
    assert losses[0] > 0.95 and losses[-10:].mean() < 0.7
