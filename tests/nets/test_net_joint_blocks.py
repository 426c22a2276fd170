"""MM-DiT and Flux: the settings that must change nothing, what the output depends on, conditions, and learning."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core.types import Model
from diffjax.nets import Flux, MMDiT, as_model
from diffjax.nets.stacking import stack_layers, unstack_layers

COMMON = dict(hidden_size=16, num_heads=2, text_size=6, pooled_size=3, num_classes=5, out_channels=3)  # noqa: C408
COMMON |= {'num_label_tokens': 5}
MMDIT = dict(depth=4, num_dual_blocks=1, qk_norm='rms', pos_embed_max_size=4, pos_embed_base_size=4)  # noqa: C408
FLUX = dict(depth=2, single_depth=2, rope_sizes=(2, 2, 4), guidance='embedded')  # noqa: C408
NETWORKS = {'MMDiT': (MMDiT, COMMON | MMDIT), 'Flux': (Flux, COMMON | FLUX)}
STACKS = {'MMDiT': ('dual_blocks', 'blocks'), 'Flux': ('double_blocks', 'single_blocks')}
SHAPE = (3, 4, 6, 2)


@functools.cache
def build(name, scan_layers=False, remat='none', **changes):
    network, fields = NETWORKS[name]
    return Model(*map(jax.jit, as_model(network(**(fields | changes), scan_layers=scan_layers, remat=remat))))


@pytest.fixture
def batch(image_batch):
    return image_batch(SHAPE)


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture
def params(name, batch):
    """Unrolled, with random values everywhere, such that activations keep their size."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return jnp.asarray(noise / np.sqrt(leaf.shape[-2] if path[-1].key == 'kernel' else 1))
        return jnp.asarray(0.3 * noise + (path[-1].key == 'scale'))

    shapes = jax.eval_shape(build(name).init, jax.random.key(0), *batch)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture
def words(name):
    """A condition of text: 5 tokens each."""
    rng = np.random.default_rng(3)
    cond = {'text': rng.standard_normal((3, 5, 6)), 'pooled': rng.standard_normal((3, 3))}
    cond |= {'guidance': np.array([1.0, 2.0, 4.0])} if name == 'Flux' else {}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), cond)


def change_layers(convert, name, params):
    return functools.reduce(lambda tree, stack: convert(tree, stack), STACKS[name], params)


@functools.cache
def gradient_function(model):
    def loss(params, batch):
        out = model.apply(params, *batch)
        return jnp.mean(out**2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value_and_gradient(model, params, batch):
    (_, out), gradient = gradient_function(model)(params, batch)
    return out, gradient


# Settings that must change nothing ------------------------------------------------------------------------------------


def test_scan_equals_loop_and_remat_equals_none(name, params, batch):
    """One compiled block of each kind that remembers nothing, against as many blocks that remember everything."""
    model, stacked = build(name, scan_layers=True, remat='full'), change_layers(stack_layers, name, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(stacked, jax.eval_shape(model.init, jax.random.key(0), *batch))
    out, gradient = value_and_gradient(build(name), params, batch)
    other, other_gradient = value_and_gradient(model, stacked, batch)
    assert np.std(out) > 0.3
    np.testing.assert_allclose(other, out, atol=1e-5 * np.abs(out).max())
    size = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(change_layers(unstack_layers, name, other_gradient), gradient, atol=1e-5 * size)


@pytest.mark.parametrize(('remat', 'scan_layers'), [('full', True), ('dots', False)])
def test_remat_recomputes_in_every_block(name, params, batch, remat, scan_layers):
    params = change_layers(stack_layers, name, params) if scan_layers else params

    def products(remat):
        model = build(name, remat=remat, scan_layers=scan_layers)
        program = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(model.apply(params, *batch))))(params)
        return str(program).count('dot_general')

    extra = products(remat) - products('none')
    fields = NETWORKS[name][1]
    blocks = 3 if name == 'MMDiT' else 2  # of a kind: dual, joint, last; double, single
    if not scan_layers:
        blocks = fields['depth'] + fields.get('single_depth', 0)
    attentions = blocks + (0 if name == 'Flux' else 1 if scan_layers else fields['num_dual_blocks'])
    assert extra == 2 * attentions if remat == 'dots' else extra > 3 * blocks


def test_bfloat16_computes_close_to_float32_and_keeps_float32_outside(name, params, batch):
    half = build(name, compute_dtype='bfloat16')
    fresh = jax.eval_shape(half.init, jax.random.key(0), *batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    out, half_out = build(name).apply(params, *batch), half.apply(params, *batch)
    assert half_out.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(half_out - out) / np.linalg.norm(out) < 0.02

    def precise(jaxpr):  # products of float32: embeddings of the vectors in two layers each, and the output
        inner = [value for equation in jaxpr.eqns for value in equation.params.values() if hasattr(value, 'jaxpr')]
        products = [equation for equation in jaxpr.eqns if equation.primitive.name == 'dot_general']
        here = sum(equation.invars[0].aval.dtype == jnp.float32 for equation in products)
        return here + sum(precise(value.jaxpr) for value in inner)

    assert precise(jax.make_jaxpr(half.apply)(params, *batch).jaxpr) == (6 if name == 'MMDiT' else 8)


# What the output depends on -------------------------------------------------------------------------------------------


def test_at_the_start_the_output_is_zero_and_blocks_are_the_identity(name, batch):
    model = build(name, **({'depth': 2, 'num_dual_blocks': 1} if name == 'MMDiT' else {'depth': 1, 'single_depth': 1}))
    params = model.init(jax.random.key(0), *batch)
    assert not np.any(model.apply(params, *batch))
    paths = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    modulations = [leaf for path, leaf in paths.items() if 'modulation' in path]
    streams = 4 if name == 'MMDiT' else 3
    assert len(modulations) == 2 * (streams + 1) and not any(map(np.any, modulations))
    assert all(np.all(leaf == 1) for path, leaf in paths.items() if 'scale' in path)
    zero = ('modulation', 'final')
    assert all(np.any(leaf) for path, leaf in paths.items() if 'kernel' in path and not any(n in path for n in zero))


def test_samples_are_independent_and_every_input_matters(name, params, words, batch):
    model, cond = build(name), words
    x, t, _ = batch
    out, order = model.apply(params, x, t, cond), jnp.array([2, 0, 1])
    moved = jax.tree.map(lambda a: a[order], (x, t, cond))
    chex.assert_trees_all_close(model.apply(params, *moved), out[order], atol=1e-5)
    others = [(moved[0], t, cond), (x, moved[1], cond)] + [(x, t, cond | {key: moved[2][key]}) for key in cond]
    for other in others:
        assert np.all(np.abs(model.apply(params, *other) - out).max(axis=(1, 2, 3)) > 1e-2)


def test_tokens_know_their_places(name, params, words, batch):
    """A network that does not would give, for an image with its patches in another order, its output in that order."""
    x, t, _ = batch
    out, rolled = (build(name).apply(params, image, t, words) for image in (x, jnp.roll(x, 2, axis=1)))
    assert np.all(np.abs(rolled - jnp.roll(out, 2, axis=1)).max(axis=(1, 2, 3)) > 1e-2)


def test_gradients_reach_every_parameter_that_is_used(name, params, batch):
    """Not the fixed positions, nor the last block's queries of text: published, and read by nobody."""
    _, gradient = value_and_gradient(build(name), params, batch)
    if name == 'MMDiT':
        assert not np.any(gradient.pop('pos_embed'))
        heads = gradient['last_block']['text']['heads']
        assert not np.any(heads['qkv']['kernel'][:, :16]) and not np.any(heads.pop('q_norm')['scale'])
    size = {jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree_util.tree_leaves_with_path(gradient)}
    assert min(size.values()) > 1e-8, min(size, key=size.get)


# Conditions -----------------------------------------------------------------------------------------------------------


def test_masked_tokens_are_as_good_as_absent(name, params, words, batch):
    """Samples have all 5 tokens, the first 3, and the first 3."""
    x, t, _ = batch
    apply = functools.partial(build(name).apply, params, x, t)
    out = apply(words | {'text_mask': jnp.arange(5) < jnp.array([[5], [3], [3]])})
    whole, short = apply(words), apply(words | {'text': words['text'][:, :3]})
    np.testing.assert_allclose(out, jnp.concatenate([whole[:1], short[1:]]), atol=2e-5)
    assert np.abs(whole[1:] - short[1:]).max() > 1e-2


def test_a_label_is_the_text_in_its_row_of_the_tables(name, params, batch):
    model, (x, t, _) = build(name), batch
    labels, tables = jnp.array([4, 0, 5]), params['condition']['label']  # 5 is the null label
    cond = {
        key: tables[key]['embedding'][labels].reshape(3, *shape) for key, shape in (('text', (5, 6)), ('pooled', (3,)))
    }
    cond |= {'guidance': jnp.ones(3)} if name == 'Flux' else {}
    np.testing.assert_allclose(model.apply(params, x, t, labels), model.apply(params, x, t, cond), atol=1e-5)
    assert np.isnan(model.apply(params, x, t, jnp.array([6, 6, 6]))).all()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda cond: None, 'takes cond as a dict .*, got NoneType'),
        (lambda cond: jnp.zeros(3), r'takes labels as integers of shape \(3,\), got float32 of shape \(3,\)'),
        (lambda cond: jnp.zeros(2, int), r'takes labels as integers of shape \(3,\), got int32 of shape \(2,\)'),
        (lambda cond: {'text': cond['text']}, 'lacks the condition pooled'),
        (lambda cond: cond | {'words': cond['text']}, 'does not know the condition words'),
        (lambda cond: cond | {'text': cond['pooled']}, r"takes cond\['text'\] of shape \[B, S, 6\], got \(3, 3\)"),
        (lambda cond: cond | {'text': cond['text'][..., :5]}, r'text_size=6 takes .* \[B, S, 6\], got \(3, 5, 5\)'),
        (lambda cond: cond | {'pooled': cond['text'][:, 0]}, r'pooled_size=3 takes .* \[B, 3\], got \(3, 6\)'),
    ],
)
def test_wrong_conditions_are_refused(name, words, batch, change, message):
    with pytest.raises(ValueError, match=f'{name} .*{message}'):
        jax.eval_shape(build(name).init, jax.random.key(0), *batch[:2], change(words))


def test_guidance_is_asked_for_where_it_is_embedded_and_refused_elsewhere(batch):
    cond = {'text': jnp.zeros((3, 5, 6)), 'pooled': jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match='Flux lacks the condition .*guidance'):
        jax.eval_shape(build('Flux').init, jax.random.key(0), *batch[:2], cond)
    with pytest.raises(ValueError, match='Flux does not know the condition guidance'):
        plain = build('Flux', guidance='none')
        jax.eval_shape(plain.init, jax.random.key(0), *batch[:2], cond | {'guidance': jnp.zeros(3)})
    with pytest.raises(ValueError, match='one time for each sample'):
        jax.eval_shape(build('Flux').init, jax.random.key(0), batch[0], jnp.zeros(()), jnp.zeros(3, int))


def test_without_classes_it_takes_no_labels(name, words, batch):
    model = build(name, num_classes=0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *batch[:2], words)
    assert 'label' not in shapes['condition']
    with pytest.raises(ValueError, match='takes cond as a dict'):
        jax.eval_shape(model.init, jax.random.key(0), *batch)


# Learning -------------------------------------------------------------------------------------------------------------


def test_it_learns_the_velocity_of_digits(name):
    """50 steps from labels as text; a network of zeros has the loss E (eps - x0)^2 of the same batch."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.float32) / 8 - 1, digits.target
    fields = {'hidden_size': 32, 'depth': 2, 'num_classes': 10, 'out_channels': 1}
    fields |= {'num_dual_blocks': 0} if name == 'MMDiT' else {'single_depth': 1, 'rope_sizes': (4, 6, 6)}
    model = build(name, **fields)
    optimizer = optax.adam(5e-3)

    def loss(params, key):
        keys = jax.random.split(key, 3)
        chosen = jax.random.randint(keys[0], (32,), 0, len(images))
        x0, t = jnp.asarray(images)[chosen], jax.random.uniform(keys[1], (32,))
        eps, s = jax.random.normal(keys[2], x0.shape), t[:, None, None, None]
        out = model.apply(params, (1 - s) * x0 + s * eps, 1000 * t, jnp.asarray(labels)[chosen])
        return jnp.mean((out - (eps - x0)) ** 2), jnp.mean((eps - x0) ** 2)

    @jax.jit
    def step(params, state, key):
        (value, zero), gradient = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value / zero

    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    state, ratios = optimizer.init(params), []
    for i in range(50):
        params, state, ratio = step(params, state, jax.random.key(i + 1))
        ratios.append(float(ratio))
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert np.mean(ratios[-5:]) < 0.6, ratios
