"""The training step as the compiler for CPUs leaves it."""

import re

import jax
import jax.numpy as jnp
import pytest

from diffjax import nets
from diffjax.training.loop import KEEP_BARRIERS

pytestmark = pytest.mark.skipif(jax.default_backend() != 'cpu', reason='of the compiler for CPUs')


def gradient(options, **network):
    """The lowered gradient of a small DiT."""
    size = {'patch_size': 2, 'hidden_size': 32, 'num_heads': 2, 'num_classes': 3, 'out_channels': 3}
    model = nets.as_model(nets.DiT(**size, **network))
    x, t, labels = jnp.zeros((4, 8, 8, 3)), jnp.zeros(4), jnp.zeros(4, int)
    params = jax.eval_shape(lambda key: model.init(key, x, t, labels), jax.random.key(0))
    loss = lambda params: (model.apply(params, x, t, labels) ** 2).sum()  # noqa: E731
    return jax.jit(jax.grad(loss), compiler_options=options).lower(params)


def largest_kernel(lowered):
    """Instructions in the largest of the kernels."""
    kernels = re.findall(r'^%?fused_computation[^{]*\{\n(.*?)^\}', lowered.compile().as_text(), re.M | re.S)
    return max(kernel.count('\n') for kernel in kernels)


def test_kernels_do_not_grow_with_the_depth():
    """The gradient of the residual stream is not computed anew, from the last block on, in those of each block."""
    three, six = (largest_kernel(gradient(KEEP_BARRIERS, depth=n, scan_layers=False)) for n in (3, 6))
    assert 20 < six == three


@pytest.mark.parametrize(('scan_layers', 'barriers'), [('auto', 2), (False, 2 * 3), (True, 0)])
def test_blocks_that_are_written_out_are_kept_apart(scan_layers, barriers):
    """Forward and backward, `auto` in a function that is called three times; a loop needs no barrier."""
    text = gradient(None, depth=3, scan_layers=scan_layers).as_text()
    assert text.count('optimization_barrier') == barriers
