"""The MLP for points, and the two functions that every network becomes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import nets
from diffjax.core.types import Model
from diffjax.nets import MLP, DiT, UNet, as_model, count_parameters

FIELDS = {'hidden_size': 16, 'depth': 2, 'num_classes': 3, 'out_channels': 4}


MODEL = Model(*map(jax.jit, as_model(MLP(**FIELDS))))


@pytest.fixture
def case(perturb):
    model = MODEL
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.standard_normal((5, 2)), jnp.float32), jnp.asarray(rng.uniform(0, 1000, 5), jnp.float32)
    labels = jnp.array([0, 1, 2, 3, 0])
    return model, perturb(model.init(jax.random.key(0), x, t, labels)), (x, t, labels)


def test_forward_pass_equals_an_independent_one(case):
    model, params, (x, t, labels) = case
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def linear(h, layer):
        return h @ layer['kernel'] + layer['bias']

    def silu(h):
        return h / (1 + np.exp(-h))

    angles = np.asarray(t, np.float64)[:, None] * 10_000 ** (-np.arange(128) / 128)
    time = p['condition']['time']
    c = linear(silu(linear(np.concatenate([np.cos(angles), np.sin(angles)], 1), time['in'])), time['out'])
    c = silu(c + p['condition']['label']['table']['embedding'][np.asarray(labels)])
    h = linear(np.asarray(x, np.float64), p['in'])
    for i in range(2):
        shift, scale = np.split(linear(c, p[f'modulation_{i}']), 2, axis=1)
        h = h + linear(silu(linear(h, p[f'block_in_{i}']) * (1 + scale) + shift), p[f'block_out_{i}'])
    expected = linear(h, p['out'])
    np.testing.assert_allclose(model.apply(params, x, t, labels), expected, atol=1e-3 * np.std(expected))


def test_parameter_count(case):
    _, params, _ = case
    condition = (256 * 16 + 16) + (16 * 16 + 16) + (3 + 1) * 16
    block = 2 * (16 * 16 + 16) + (16 * 32 + 32)
    assert count_parameters(params) == condition + (2 * 16 + 16) + 2 * block + (16 * 4 + 4)


def test_samples_are_independent_and_every_input_matters(case):
    model, params, (x, t, labels) = case
    out = model.apply(params, x, t, labels)
    order = jnp.array([1, 2, 3, 4, 0])
    chex.assert_trees_all_close(model.apply(params, x[order], t[order], labels[order]), out[order], atol=1e-4)
    for other in ((x[order], t, labels), (x, t[order], labels), (x, t, (labels + 1) % 4)):
        assert np.all(np.abs(model.apply(params, *other) - out).max(axis=1) > 1e-3)


def test_time_is_informative_over_its_whole_range_from_the_start():
    """Ten steps of the 0..1000 scale change the output visibly wherever they are taken; nothing else does."""
    model = Model(*map(jax.jit, as_model(MLP(out_channels=2))))
    t = jnp.linspace(0, 1000, 101)
    x = jnp.ones((101, 2))
    out = model.apply(model.init(jax.random.key(0), x, t, None), x, t)
    steps = np.linalg.norm(np.diff(out, axis=0), axis=1)
    assert np.min(steps) > 0.005 * np.std(out)
    with pytest.raises(ValueError, match=r'MLP takes x of shape \[B, D\], got \(101, 2, 1\)'):
        model.init(jax.random.key(0), x[..., None], t, None)


def test_gradients_reach_every_parameter(case):
    model, params, inputs = case
    gradient = jax.grad(lambda params: jnp.mean(model.apply(params, *inputs) ** 2))(params)
    size = {jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree_util.tree_leaves_with_path(gradient)}
    assert min(size.values()) > 1e-6, min(size, key=size.get)


def test_names_for_configs_are_exactly_the_networks():
    images = ['DiT', 'EDM2', 'Flux', 'MMDiT', 'PixArt', 'UNet', 'UViT']
    assert nets.__all__ == [*images, 'SpaceTimeUNet', 'VideoDiT', 'MLP']


@pytest.mark.parametrize(
    ('module', 'shape'),
    [
        (DiT(patch_size=2, hidden_size=8, depth=1, num_heads=2, num_classes=0, out_channels=2), (2, 4, 4, 1)),
        (UNet(base_channels=4, channel_multipliers=[1], num_res_blocks=1, num_classes=0, out_channels=2), (2, 4, 4, 1)),
        (MLP(hidden_size=8, depth=1, out_channels=2), (2, 3)),
    ],
)
def test_every_network_is_two_pure_functions(module, shape):
    model = as_model(module)
    assert isinstance(model, Model)
    model = Model(*map(jax.jit, model))
    inputs = jnp.ones(shape), jnp.ones(2), None
    params = model.init(jax.random.key(0), *inputs)
    assert type(params) is dict and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert count_parameters(params) == sum(leaf.size for leaf in jax.tree.leaves(params))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert count_parameters(shapes) == count_parameters(params)
    for key in (None, jax.random.key(1)):
        out = model.apply(params, *inputs, key)
        assert (out.shape, out.dtype) == ((*shape[:-1], 2), jnp.float32)
