"""DiT: the published counts, an independent forward pass in NumPy, and the settings that must change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy_dit import numpy_dit

from diffjax.core.types import Model
from diffjax.nets import DiT, as_model, count_parameters
from diffjax.nets.dit import patchify, unpatchify
from diffjax.nets.dit_blocks import BlockStyle, Context, DiTBlock
from diffjax.nets.stacking import stack_layers, unstack_layers

TINY = dict(patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5, out_channels=3)  # noqa: C408
SHAPE = (3, 4, 6, 2)


@pytest.fixture
def batch(image_batch):
    return image_batch(SHAPE)


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(DiT(**(TINY | changes)))))


@functools.cache
def _init(**changes):
    model = _model(**changes)
    return model, model.init(jax.random.key(0), jnp.zeros(SHAPE), jnp.zeros(3), jnp.zeros(3, jnp.int32))


@pytest.fixture
def tiny(perturb):
    """The tiny network, unrolled, with perturbed weights."""
    model, params = _init(scan_layers=False)
    return model, perturb(params)


@functools.cache
def _gradient_function(model):
    def loss(params, batch):
        out = model.apply(params, *batch)
        return jnp.mean(out**2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _value_and_gradient(model, params, *batch):
    (_, out), gradient = _gradient_function(model)(params, batch)
    return out, gradient


# The published numbers ------------------------------------------------------------------------------------------------


def _count_by_hand(d, depth, p, channels=4, out_channels=8, classes=1000, size=32):
    patch_embed = p * p * channels * d + d
    positions = (size // p) ** 2 * d
    time = (256 * d + d) + (d * d + d)
    labels = (classes + 1) * d
    attention = (d * 3 * d + 3 * d) + (d * d + d)
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    modulation = d * 6 * d + 6 * d
    final = (d * 2 * d + 2 * d) + (d * p * p * out_channels + p * p * out_channels)
    return patch_embed + positions + time + labels + depth * (attention + mlp + modulation) + final


@pytest.mark.parametrize(
    ('width', 'depth', 'heads', 'patch', 'scan_layers', 'exact', 'millions'),
    [
        (384, 12, 6, 2, True, 32_963_360, 33.0),
        (384, 12, 6, 2, False, 32_963_360, 33.0),
        (768, 12, 12, 2, True, 130_512_416, 130.5),
        (1024, 24, 16, 2, True, 458_102_816, 458.1),
        (1152, 28, 16, 2, True, 675_129_632, 675.1),
        (384, 12, 6, 8, 'auto', None, None),
    ],
)
def test_parameter_counts_are_the_published_ones(width, depth, heads, patch, scan_layers, exact, millions):
    fields = dict(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads)  # noqa: C408
    model = as_model(DiT(**fields, num_classes=1000, out_channels=8, scan_layers=scan_layers))
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    count = count_parameters(params)
    assert count == _count_by_hand(width, depth, patch)
    if exact is not None:
        assert count == exact
        assert round(count / 1e6, 1) == millions
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert jax.eval_shape(model.apply, params, *inputs).shape == (1, 32, 32, 8)


# An independent forward pass ------------------------------------------------------------------------------------------


def test_forward_pass_equals_an_independent_one(tiny, batch):
    model, params = tiny
    x, t, labels = batch
    labels = labels.at[0].set(5)  # the null label
    got = model.apply(params, x, t, labels)
    expected = np.stack([numpy_dit(params, np.asarray(x[b]), float(t[b]), int(labels[b]), 2, 2) for b in range(3)])
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.std(expected))


def test_patches_are_read_row_by_row():
    p, (batch, height, width, channels) = 2, (2, 4, 6, 3)
    x = np.arange(batch * height * width * channels, dtype=np.float32).reshape(batch, height, width, channels)
    tokens = patchify(jnp.asarray(x), p)
    for (b, i, j, c), value in np.ndenumerate(x):
        assert tokens[b, (i // p) * (width // p) + j // p, ((i % p) * p + j % p) * channels + c] == value
    chex.assert_trees_all_equal(unpatchify(tokens, p, height, width), jnp.asarray(x))


def test_hand_made_weights_give_a_known_map_of_each_patch(batch):
    """Tokens (v, -v) have mean zero, so layer norm divides a patch v by its root mean square, and `final` reads it.

    The patches are so faint that the 1e-6 under the root shows.
    """
    x, t, labels = batch
    x = 1e-3 * x
    model, eye = _model(out_channels=2), jnp.eye(8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)  # so that blocks are the identity
    params['patch_embed'] = {'kernel': jnp.concatenate([eye, -eye], axis=1), 'bias': jnp.zeros(16)}
    params['final'] = {'kernel': jnp.concatenate([eye, jnp.zeros((8, 8))]), 'bias': jnp.zeros(8)}
    expected = np.array(x)
    for b in range(3):
        for i in range(0, 4, 2):
            for j in range(0, 6, 2):
                patch = expected[b, i : i + 2, j : j + 2]
                expected[b, i : i + 2, j : j + 2] = patch / np.sqrt(np.mean(patch**2) + 1e-6)
    np.testing.assert_allclose(model.apply(params, x, t, labels), expected, atol=1e-5)


# Initialisation -------------------------------------------------------------------------------------------------------


def test_at_the_start_the_output_is_zero_and_blocks_are_the_identity(batch):
    for scan_layers in (True, False):
        model, params = _init(scan_layers=scan_layers)
        chex.assert_trees_all_equal(model.apply(params, *batch), jnp.zeros((3, 4, 6, 3)))
    block = DiTBlock(BlockStyle(2, 4.0, 'float32', 'xla'))
    tokens, c = jax.random.normal(jax.random.key(0), (2, 5, 16)), jax.random.normal(jax.random.key(1), (2, 16))
    weights = jax.jit(block.init)(jax.random.key(2), tokens, Context(c))
    chex.assert_trees_all_equal(block.apply(weights, tokens, Context(c))[0], tokens)


def test_initial_distributions_are_the_published_ones():
    model, params = _init(hidden_size=128, num_heads=2)
    blocks = params['blocks']
    for layer, bound in (
        (params['patch_embed'], np.sqrt(6 / (8 + 128))),
        (blocks['attention']['qkv'], np.sqrt(6 / (128 + 384))),
        (blocks['mlp_in'], np.sqrt(6 / (128 + 512))),
    ):
        kernel = np.asarray(layer['kernel'])
        assert 0.97 * bound < np.max(np.abs(kernel)) <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.05)
        assert not np.any(layer['bias'])
    condition = params['condition']
    for table in (condition['time']['in']['kernel'], condition['time']['out']['kernel']):
        np.testing.assert_allclose(np.std(table), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(condition['label']['table']['embedding']), 0.02, rtol=0.1)
    assert not np.any(blocks['modulation']['kernel']) and not np.any(params['final']['kernel'])
    first, second = (blocks['mlp_in']['kernel'][i] for i in range(2))
    assert np.max(np.abs(first - second)) > 0.1  # layers of a scan are drawn apart


# Settings that must change nothing ------------------------------------------------------------------------------------


def test_scan_equals_loop(tiny, batch):
    loop, params = tiny
    scan, stacked = _model(), stack_layers(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(stacked, jax.eval_shape(scan.init, jax.random.key(0), *batch))
    chex.assert_trees_all_equal(unstack_layers(stacked), params)
    out, gradient = _value_and_gradient(loop, params, *batch)
    scan_out, scan_gradient = _value_and_gradient(scan, stacked, *batch)
    assert np.std(out) > 0.3
    chex.assert_trees_all_close(scan_out, out, atol=1e-4, rtol=1e-4)
    chex.assert_trees_all_close(unstack_layers(scan_gradient), gradient, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="no 'blocks_0'"):
        stack_layers(stacked)
    with pytest.raises(ValueError, match="no stacked 'blocks'"):
        unstack_layers(params)


@pytest.mark.parametrize(('platform', 'unroll'), [('cpu', 2), ('gpu', 1), ('tpu', 1)])
def test_auto_is_one_tree_everywhere_and_written_out_on_cpus(batch, monkeypatch, platform, unroll):
    expected = jax.eval_shape(_model(scan_layers=True).init, jax.random.key(0), *batch)
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    model = as_model(DiT(**TINY, attention='xla'))
    params = jax.eval_shape(model.init, jax.random.key(0), *batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)
    program = jax.make_jaxpr(model.apply)(params, *batch)
    assert [e.params['unroll'] for e in program.eqns if e.primitive.name == 'scan'] == [unroll]


@pytest.mark.parametrize(('remat', 'scan_layers'), [('full', True), ('dots', True), ('dots', False)])
def test_remat_equals_none_and_recomputes(tiny, batch, remat, scan_layers):
    params = stack_layers(tiny[1]) if scan_layers else tiny[1]
    plain, saving = (_model(scan_layers=scan_layers, remat=choice) for choice in ('none', remat))
    out, gradient = _value_and_gradient(plain, params, *batch)
    again, gradient_again = _value_and_gradient(saving, params, *batch)
    chex.assert_trees_all_close(again, out, atol=1e-4, rtol=1e-4)
    chex.assert_trees_all_close(gradient_again, gradient, atol=1e-4, rtol=1e-3)

    def program(model):
        return str(jax.make_jaxpr(jax.grad(lambda params: jnp.sum(model.apply(params, *batch))))(params))

    assert 'remat' in program(saving) and 'remat' not in program(plain)
    extra = program(saving).count('dot_general') - program(plain).count('dot_general')
    products = 2 if scan_layers else 2 * 2  # q k^T and attention times v, which have no weights, in each block
    assert extra == products if remat == 'dots' else extra > products


def test_bfloat16_computes_close_to_float32_and_keeps_float32_outside(tiny, batch):
    model, params = tiny
    half = _model(scan_layers=False, compute_dtype='bfloat16')
    fresh = jax.eval_shape(half.init, jax.random.key(0), *batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    out, gradient = _value_and_gradient(model, params, *batch)
    half_out, half_gradient = _value_and_gradient(half, params, *batch)
    assert half_out.dtype == jnp.float32
    error = np.linalg.norm(half_out - out) / np.linalg.norm(out)
    assert 1e-4 < error < 0.03  # it does compute in 16 bits, and not too badly
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half_gradient))
    flat, half_flat = (ravel_pytree(g)[0] for g in (gradient, half_gradient))
    assert np.dot(flat, half_flat) / np.linalg.norm(flat) / np.linalg.norm(half_flat) > 0.99


def test_sharded_equals_unsharded(tiny, image_batch):
    model, params = tiny
    mesh = jax.sharding.Mesh(jax.devices(), ('data',))
    batch = image_batch((2 * jax.device_count(), 4, 6, 2))
    plain, gradient = _value_and_gradient(model, params, *batch)

    def spec(leaf):  # whatever divides is cut along its last axis, as fsdp would
        cut = leaf.ndim > 0 and leaf.shape[-1] % jax.device_count() == 0
        return jax.P(*[None] * (leaf.ndim - 1), 'data') if cut else jax.P()

    params = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, spec(leaf))), params)
    batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P('data')))
    sharded, sharded_gradient = _value_and_gradient(model, params, *batch)
    chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(plain), atol=1e-4, rtol=1e-4)
    chex.assert_trees_all_close(jax.device_get(sharded_gradient), jax.device_get(gradient), atol=1e-4, rtol=1e-3)


# What the output depends on -------------------------------------------------------------------------------------------


def test_samples_are_independent_and_every_input_matters(tiny, batch):
    model, params = tiny
    x, t, labels = batch
    labels = jnp.array([0, 1, 5])
    out = model.apply(params, x, t, labels)
    order = jnp.array([2, 0, 1])
    chex.assert_trees_all_close(model.apply(params, x[order], t[order], labels[order]), out[order], atol=1e-5)
    for other in ((x[order], t, labels), (x, t[order], labels), (x, t, labels[order])):
        change = np.abs(model.apply(params, *other) - out).max(axis=(1, 2, 3))
        assert np.all(change > 1e-2)


def test_gradients_reach_every_parameter_but_the_fixed_positions(tiny, batch):
    model, params = tiny
    _, gradient = _value_and_gradient(model, params, *batch)
    assert not np.any(gradient['pos_embed'])
    size = {jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree_util.tree_leaves_with_path(gradient)}
    del size["['pos_embed']"]
    assert min(size.values()) > 1e-7, min(size, key=size.get)
    moved = dict(params, pos_embed=2 * params['pos_embed'])  # fixed, and yet used
    assert np.max(np.abs(model.apply(moved, *batch) - model.apply(params, *batch))) > 1e-2


def test_without_classes_it_takes_no_labels(batch):
    x, t, labels = batch
    model = _model(num_classes=0)
    params = model.init(jax.random.key(0), x, t, None)
    assert 'label' not in params['condition']
    assert model.apply(params, x, t).shape == (3, 4, 6, 3)
    with pytest.raises(ValueError, match='num_classes=0'):
        model.apply(params, x, t, labels)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'hidden_size': 18, 'num_heads': 4}, r'hidden_size=18 must be a multiple of 4 \(num_heads\), for example 16'),
        ({'hidden_size': 6}, 'hidden_size=6 must be a multiple of 4 .*positions.*for example 8'),
        ({'remat': 'some'}, "remat='some' is not known; choose one of 'none', 'full', 'dots'"),
        ({'attention': 'flash'}, "attention='flash' is not known; choose one of 'auto', 'xla', 'cudnn'"),
        ({'scan_layers': 'yes'}, "scan_layers='yes' is not known; choose one of True, False, 'auto'"),
        ({'compute_dtype': 'bf16'}, "compute_dtype='bf16' is not known; .*'float32', 'bfloat16', 'float16'"),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        DiT(**(TINY | changes))


def test_wrong_shapes_are_refused():
    model = as_model(DiT(**TINY))
    t, labels = jnp.zeros(1), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match='multiples of patch_size=2, got 4x5'):
        model.init(jax.random.key(0), jnp.zeros((1, 4, 5, 3)), t, labels)
    with pytest.raises(ValueError, match=r'DiT takes x of shape \[B, H, W, C\], got \(4, 4, 3\)'):
        model.init(jax.random.key(0), jnp.zeros((4, 4, 3)), t, labels)
