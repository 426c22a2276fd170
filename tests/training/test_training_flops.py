"""Counting operations: closed forms, XLA's own count, and the figures of the DiT paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import DiT, as_model
from diffjax.training.flops import count_flops


def count(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def conv(strides=(1, 1), padding='SAME', groups=1, lhs_dilation=None):
    def apply(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )

    return apply


def test_matrix_products():
    assert count(jnp.matmul, (5, 7), (7, 11)) == 2 * 5 * 7 * 11
    assert count(jnp.matmul, (3, 5, 7), (3, 7, 11)) == 3 * 2 * 5 * 7 * 11
    assert count(lambda x, y: jnp.einsum('bqhd,bkhd->bhqk', x, y), (2, 5, 3, 7), (2, 6, 3, 7)) == 2 * 2 * 3 * 5 * 6 * 7
    assert count(lambda x: jnp.exp(x) + x, (5, 7)) == 0


def test_convolutions():
    assert count(conv(), (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)
    assert count(conv((2, 2)), (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)
    assert count(conv(groups=4), (2, 8, 8, 8), (3, 3, 2, 16)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 2)
    # A transposed convolution multiplies each input value with the kernel once; the zeros in between are free.
    transposed = conv(padding=((1, 2), (1, 2)), lhs_dilation=(2, 2))
    assert count(transposed, (2, 4, 4, 3), (3, 3, 3, 16)) == 2 * (2 * 4 * 4 * 3) * (3 * 3 * 16)


def test_gradients_cost_as_much_again_for_each_argument():
    def loss(x, w):
        return (x @ w).sum()

    assert count(jax.grad(loss, (0, 1)), (5, 7), (7, 11)) == 3 * 2 * 5 * 7 * 11
    for strides, outputs in ((1, 1), 64), ((2, 2), 16):
        forward = 2 * (2 * outputs * 16) * (3 * 3 * 3)
        gradient = jax.grad(lambda x, k, s=strides: conv(s)(x, k).sum(), (0, 1))
        assert count(gradient, (2, 8, 8, 3), (3, 3, 3, 16)) == 3 * forward


def test_control_flow():
    def repeated(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=7)[0]

    def choice(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    one = 2 * 5 * 7 * 7
    assert count(repeated, (5, 7), (7, 7)) == 7 * one
    assert count(choice, (5, 7), (7, 7)) == 2 * one
    assert count(jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w) @ w), (5, 7), (7, 7)) == 2 * one
    assert count(jax.checkpoint(jnp.matmul), (5, 7), (7, 7)) == one
    assert count(lambda x, w: jax.lax.scan(lambda c, _: (repeated(c, w), None), x, length=3)[0], (5, 7), (7, 7)) == (
        21 * one
    )

    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert count(own, (5, 7), (7, 7)) == one


def dit_arguments(size, channels, batch=1):
    x = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    return x, jax.ShapeDtypeStruct((batch,), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_agrees_with_the_compiler(scan_layers):
    """XLA counts element-wise work too, and a scan's body once: it is asked about the unrolled network."""

    def network(scan):
        return as_model(
            DiT(patch_size=2, hidden_size=256, depth=3, num_heads=4, num_classes=10, out_channels=4, scan_layers=scan)
        )

    arguments = dit_arguments(16, 4, batch=2)
    model, unrolled = network(scan_layers), network(False)
    params, plain = (jax.eval_shape(m.init, jax.random.key(0), *arguments) for m in (model, unrolled))
    ours = count_flops(jax.make_jaxpr(model.apply)(params, *arguments))
    theirs = jax.jit(unrolled.apply).lower(plain, *arguments).compile().cost_analysis()['flops']
    assert 0.95 < ours / theirs <= 1.0


@pytest.mark.parametrize('depth, width, heads, patch, gmacs', [(12, 768, 12, 2, 23.01), (28, 1152, 16, 2, 118.64)])
def test_published_figures(depth, width, heads, patch, gmacs):
    """Peebles & Xie 2023, Table 4: B/2 and XL/2 in Gflops, one multiply-add counted once."""
    model = as_model(
        DiT(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads, num_classes=1000, out_channels=8)
    )
    arguments = dit_arguments(32, 4)
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    ours = count_flops(jax.make_jaxpr(model.apply)(params, *arguments))
    np.testing.assert_allclose(ours, 2e9 * gmacs, rtol=0.02)
