"""MM-DiT: the published counts, the table of positions, and what is refused. Its blocks: test_net_joint_blocks.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import MMDiT, as_model, count_parameters
from diffjax.training.flops import count_flops

TINY = dict(hidden_size=16, depth=2, num_heads=2, pos_embed_max_size=5, pos_embed_base_size=4)  # noqa: C408
TINY |= dict(text_size=6, pooled_size=3, num_classes=5, out_channels=3)  # noqa: C408


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


# The published numbers ------------------------------------------------------------------------------------------------

MEDIUM = dict(hidden_size=1536, depth=24, num_heads=24, out_channels=16)  # noqa: C408
MEDIUM_3_5 = MEDIUM | dict(num_dual_blocks=13, qk_norm='rms', pos_embed_max_size=384)  # noqa: C408
LARGE_3_5 = dict(hidden_size=2432, depth=38, num_heads=38, qk_norm='rms', out_channels=16)  # noqa: C408


def products_by_hand(d, depth, num_dual, image, text, inputs=4 * 16, text_size=4096, pooled_size=2048):
    """Multiply-adds of one forward pass: a linear layer costs its weights once for each token it sees."""
    tokens = image + text
    full = 12 * d**2 * tokens + 2 * tokens**2 * d + 12 * d**2
    last = (12 * image + 3 * text) * d**2 + 2 * image * tokens * d + 8 * d**2
    dual = 4 * d**2 * image + 2 * image**2 * d + 3 * d**2
    vectors = (256 + pooled_size + 2 * d) * d + 2 * d**2
    ends = 2 * image * inputs * d + text * text_size * d
    return (depth - 1) * full + last + num_dual * dual + vectors + ends


@pytest.mark.parametrize(
    ('fields', 'billions', 'exact', 'tera'),
    [
        (MEDIUM, 2.03, 2_028_328_000, 4.2),
        (MEDIUM_3_5, 2.24, 2_243_171_520, 5.4),
        (LARGE_3_5, 8.06, 8_056_627_520, 14.8),
    ],
    ids=['3-medium', '3.5-medium', '3.5-large'],
)
def test_published_counts(fields, billions, exact, tera):
    model = as_model(MMDiT(**fields))
    inputs = abstract(1, 128, 128, 16), abstract(1), {'text': abstract(1, 154, 4096), 'pooled': abstract(1, 2048)}
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    positions = params.pop('pos_embed')
    assert positions.shape == (fields.get('pos_embed_max_size', 192) ** 2, fields['hidden_size'])
    assert count_parameters(params) == exact
    assert round(exact / 1e9, 2) == billions
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))

    flops = count_flops(jax.make_jaxpr(model.apply)(params | {'pos_embed': positions}, *inputs))
    d, depth, dual = fields['hidden_size'], fields['depth'], fields.get('num_dual_blocks', 0)
    assert flops == 2 * products_by_hand(d, depth, dual, image=64 * 64, text=154)
    assert round(flops / 2e12, 1) == tera


# Positions ------------------------------------------------------------------------------------------------------------


def test_positions_are_the_centre_of_one_table_in_the_papers_units():
    """A usual image, 4 x 4 tokens of the table's 6 x 6, covers positions 0, 4, 8, 12: 16 units in all."""
    network = MMDiT(**(TINY | {'pos_embed_max_size': 6, 'depth': 1}))
    inputs = jnp.zeros((1, 8, 8, 2)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    table = jax.jit(lambda: network.init(jax.random.key(0), *inputs)['params']['pos_embed'])().reshape(6, 6, 16)
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    for row in range(6):
        for column in range(6):
            angles = [4 * (place - 1) * frequencies for place in (column, row)]  # the column comes first
            expected = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)])
            np.testing.assert_allclose(table[row, column], expected, atol=1e-6)


def test_an_image_takes_the_centre_of_the_table():
    """With all else silenced the output tells which rows of the table were added: each is a number of its own."""
    network = MMDiT(**(TINY | {'depth': 1, 'out_channels': 1, 'num_classes': 0}))
    x, t = jnp.zeros((1, 4, 8, 2)), jnp.zeros(1)
    cond = {'text': jnp.zeros((1, 2, 6)), 'pooled': jnp.zeros((1, 3))}
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, t, cond)['params']
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    numbers = jnp.arange(1.0, 26.0)
    params['pos_embed'] = jnp.stack([numbers, -numbers] + [jnp.full(25, 40.0), jnp.full(25, -40.0)] * 7, axis=1)
    params['final']['linear']['kernel'] = jnp.zeros((16, 4)).at[0].set(1.0)
    out = jax.jit(network.apply)({'params': params}, x, t, cond)[0, ::2, ::2, 0]
    scale = jnp.sqrt((2 * numbers**2 + 14 * 1600) / 16 + 1e-6)
    expected = (numbers / scale).reshape(5, 5)[1:3, :4]  # 2 x 4 of 5 x 5: an odd margin is wider at the end
    np.testing.assert_allclose(out, expected, rtol=1e-5)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'hidden_size': 18, 'num_heads': 4}, r'hidden_size=18 must be a multiple of 4 \(num_heads\), for example 16'),
        ({'hidden_size': 6}, 'hidden_size=6 must be a multiple of 4 .*positions.*for example 8'),
        ({'depth': 0}, 'depth=0 must be at least 1'),
        ({'num_dual_blocks': 2}, 'num_dual_blocks=2 must lie between 0 and 1: depth=2'),
        ({'qk_norm': 'l2'}, "qk_norm='l2' is not known; choose one of 'none', 'rms', 'layer'"),
        ({'remat': 'some'}, "remat='some' is not known; choose one of 'none', 'full', 'dots'"),
        ({'scan_layers': 'no'}, "scan_layers='no' is not known; choose one of True, False, 'auto'"),
        ({'attention': 'flash'}, "attention='flash' is not known; choose one of 'auto'"),
        ({'compute_dtype': 'bf16'}, "compute_dtype='bf16' is not known; .*'float32', 'bfloat16', 'float16'"),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(**(TINY | changes))


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 4, 5, 3), r'multiples of patch_size=2 up to 10 \(pos_embed_max_size=5\), got 4x5'),
        ((1, 12, 4, 3), r'multiples of patch_size=2 up to 10 \(pos_embed_max_size=5\), got 12x4'),
        ((4, 4, 3), r'MMDiT takes x of shape \[B, H, W, C\], got \(4, 4, 3\)'),
    ],
)
def test_wrong_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            as_model(MMDiT(**TINY)).init, jax.random.key(0), abstract(*shape), abstract(1), jnp.zeros(1, int)
        )
